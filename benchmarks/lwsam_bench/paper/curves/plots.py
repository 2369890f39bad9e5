"""Pictures of rows, one for each benchmark, to be read on a page and on a phone."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lwsam_bench.pages import report
from lwsam_bench.paper.setups import METHODS
from lwsam_bench.support.rows import Row


# A method has one colour in all figures.
_COLOURS = dict(zip(METHODS, report.COLOURS, strict=False))
_WIDTH = 7.0  # inches, and panels below each other: a phone is narrow
_FONT = 11
_MOST_NAMES = 12  # layers that a legend has room for


def layer_norms(path: pathlib.Path, title: str, rows: Sequence[Row]) -> None:
    """Draw the norm of each layer over the epochs."""
    names = list(rows[0]["norms"])
    with _picture(path, 1, 4.5) as (figure, (axis,)):
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(names)))
        for name, colour in zip(names, colours, strict=True):
            epochs, values = _by_run(rows, lambda row, name=name: row["norms"][name])
            axis.plot(epochs, values.mean(axis=0), color=colour, label=name, **_MARK)
        _over_epochs(axis, f"{title}: gradient norm of each layer", log=True)
        if len(names) <= _MOST_NAMES:
            figure.legend(loc="outside lower center", ncols=3, frameon=False)
        else:
            scale = Normalize(1, 1 + (len(names) - 1) / 0.95)
            bar = figure.colorbar(ScalarMappable(scale, "viridis"), ax=axis)
            bar.ax.set_ylim(1, len(names))
            bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            bar.set_label(f"layer, from {names[0]} to {names[-1]}")


def learning_curves(path: pathlib.Path, title: str, rows: Sequence[Row]) -> None:
    """Draw test accuracy and training loss over the epochs, a line for each method."""
    with _picture(path, 2, 7.5) as (figure, (above, below)):
        _lines(above, rows, lambda row: row["test_accuracy"])
        _lines(below, rows, lambda row: row["train_loss"])
        _over_epochs(above, f"{title}: test accuracy")
        _over_epochs(below, f"{title}: training loss")
        above.yaxis.set_major_formatter(PercentFormatter(1.0))
        _legend(figure, above)


def full_norm(path: pathlib.Path, title: str, rows: Sequence[Row]) -> None:
    """Draw the norm of the whole gradient over the epochs, a line for each method."""
    with _picture(path, 1, 4.5) as (figure, (axis,)):
        _lines(axis, rows, lambda row: row["norm"])
        _over_epochs(axis, f"{title}: gradient norm of the full model")
        axis.set_ylim(bottom=0)
        _legend(figure, axis)


def perturbations(path: pathlib.Path, title: str, rows: Sequence[Row]) -> None:
    """Draw in how many steps each layer is perturbed, a bar for each method."""
    names = list(rows[0]["perturbations"])
    methods = [method for method in METHODS if any(_of(rows, method))]
    thickness = 0.8 / len(methods)
    with _picture(path, 1, 1.6 + 0.36 * len(names)) as (figure, (axis,)):
        places = np.arange(len(names))
        for index, method in enumerate(methods):
            counts = np.asarray(
                [[row["perturbations"][n] for n in names] for row in _of(rows, method)]
            )
            axis.barh(
                places + (index - (len(methods) - 1) / 2) * thickness,
                counts.mean(axis=0),
                thickness,
                color=_COLOURS[method],
                label=METHODS[method],
            )
        axis.set_yticks(places, names)
        axis.margins(y=0.01)
        axis.invert_yaxis()  # the input on top
        steps = max(row["steps"] for row in rows)
        # Over the names of the layers, too: they leave too little room beside them.
        figure.suptitle(
            f"{title}: perturbations in {steps:,} steps", fontsize=_FONT + 1
        )
        _legend(figure, axis)


_MARK: dict[str, Any] = {"marker": "o", "markersize": 2.5, "linewidth": 1.5}


@contextlib.contextmanager
def _picture(path: pathlib.Path, panels: int, height: float) -> Iterator[Any]:
    """Yield a figure and its axes, one below the other; save it."""
    with matplotlib.rc_context({"font.size": _FONT, "axes.titlesize": _FONT + 1}):
        figure, axes = plt.subplots(
            panels, 1, figsize=(_WIDTH, height), layout="constrained", squeeze=False
        )
        yield figure, axes[:, 0]
        report._save(figure, list(axes[:, 0]), path)


def _lines(axis: Any, rows: Sequence[Row], get: Callable[[Row], float]) -> None:
    for method, label in METHODS.items():
        mine = _of(rows, method)
        if not mine:
            continue
        epochs, values = _by_run(mine, get)
        mean = values.mean(axis=0)
        axis.plot(epochs, mean, color=_COLOURS[method], label=label, **_MARK)
        if len(values) > 1:
            error = values.std(axis=0, ddof=1) / len(values) ** 0.5
            low, high = mean - error, mean + error
            axis.fill_between(
                epochs, low, high, color=_COLOURS[method], alpha=0.15, lw=0
            )


def _of(rows: Sequence[Row], method: str) -> list[Row]:
    return [row for row in rows if row["method"] == method]


def _by_run(
    rows: Sequence[Row], get: Callable[[Row], float]
) -> tuple[list[int], np.ndarray]:
    """Return the epochs [T] and the values f64[runs, T]."""
    by_run: dict[str, dict[int, float]] = {}
    for row in rows:
        by_run.setdefault(row["run"], {})[row["epoch"]] = get(row)
    epochs = sorted(next(iter(by_run.values())))
    values = [[run[epoch] for epoch in epochs] for run in by_run.values()]
    return epochs, np.asarray(values, float)


def _over_epochs(axis: Any, title: str, *, log: bool = False) -> None:
    axis.set(xlabel="epoch", title=title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axis.set_yscale("log")


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
