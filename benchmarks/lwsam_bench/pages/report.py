"""Tables and plots from rows; the rows are all that they know."""

import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib


matplotlib.use("Agg")  # writes files, needs no screen

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row


# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error of the mean; the error is NaN for one value.

    Both are NaN where a value is.
    """
    if any(math.isnan(x) for x in values):
        return float("nan"), float("nan")
    if len(values) < 2:
        return values[0], float("nan")
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table over the last rows of each run.

    Args:
      rows: One for each method, with `label`, `rho`, `test_accuracy` (a list over the
        seeds), `overhead` and `time`.
    """
    header = ["method", "ρ", "test accuracy", "FLOPs per step", "time per step"]
    cells = []
    for row in rows:
        mean, error = mean_and_error(row["test_accuracy"])
        spread = "" if np.isnan(error) else f" ± {100 * error:.1f}"
        cells.append(
            [
                row["label"],
                f"{row['rho']:g}" if row["rho"] else "–",
                f"{100 * mean:.1f}{spread} %",
                f"{1 + row['overhead']:.2f} ×",
                "–" if np.isnan(row["time"]) else f"{row['time']:.2f} ×",
            ]
        )
    return header, cells


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]], notes: str) -> str:
    """Return a Markdown table with a paragraph below it."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{notes}\n"
    )


def plot_learning_curves(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Draw test accuracy and training loss over the steps, a line for each method.

    The band is the standard error over the seeds.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (
        (axes[0], "test_accuracy", "test accuracy"),
        (axes[1], "train_loss", "training loss (noisy labels)"),
    )
    for label, colour in zip(_labels(rows), _cycle(), strict=False):
        for axis, field, title in panels:
            steps, values = _by_seed([r for r in rows if r["label"] == label], field)
            mean = values.mean(axis=0)
            axis.plot(steps, mean, color=colour, label=label)
            if len(values) > 1:
                error = values.std(axis=0, ddof=1) / len(values) ** 0.5
                axis.fill_between(
                    steps, mean - error, mean + error, color=colour, alpha=0.15, lw=0
                )
            axis.set(xlabel="step", title=title)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    # The first epochs are far below what there is to compare.
    axes[0].set_ylim(bottom=max(0.0, _floor_of_interest(rows)))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False
    )
    _save(figure, axes, path)


def plot_norms(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Draw the gradient norm of each layer over the steps, mean over the seeds."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = list(rows[0]["norms"])
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(names)))
    for name, colour in zip(names, colours, strict=True):
        steps, values = _by_seed(rows, lambda row, name=name: row["norms"][name])
        axis.plot(steps, values.mean(axis=0), color=colour, label=name)
    axis.set(
        xlabel="step",
        yscale="log",
        title=f"gradient norm of each layer: {rows[0]['label']}",
    )
    figure.legend(
        loc="outside right upper", frameon=False, title="from the input on", fontsize=8
    )
    _save(figure, [axis], path)


def plot_selection(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Draw in how many of all steps each layer was perturbed."""
    names = list(rows[0]["perturbed"])
    counts = np.sum(
        [[row["perturbed"][name] for name in names] for row in rows], axis=0
    )
    # The rows of a seed follow each other in steps; each covers the same number.
    last = {row["seed"]: row["step"] for row in rows}
    share = counts / sum(last.values())
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    bars = axis.barh(names, share, color=COLOURS[2])
    axis.bar_label(bars, [f"{x:.0%}" for x in share], padding=3)
    axis.invert_yaxis()  # the input on top
    axis.set(
        xlim=(0, 1.1),
        xlabel="steps in which the layer was perturbed",
        title=f"how often each layer was perturbed: {rows[0]['label']}",
    )
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    _save(figure, [axis], path)


def _labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["label"] for row in rows))


def _cycle() -> list[str]:
    return [*COLOURS] * 4


def _by_seed(rows: Sequence[Row], field: Any) -> tuple[list[int], np.ndarray]:
    """Return the steps [T] and the values f64[seeds, T] of a field."""
    get = field if callable(field) else lambda row: row[field]
    seeds = dict.fromkeys(row["seed"] for row in rows)
    values = [[get(row) for row in rows if row["seed"] == seed] for seed in seeds]
    steps = [row["step"] for row in rows if row["seed"] == rows[0]["seed"]]
    return steps, np.asarray(values, float)


def _floor_of_interest(rows: Sequence[Row]) -> float:
    """Return an accuracy a little below all that come after the first fifth."""
    late = max(row["step"] for row in rows) / 5
    return min(row["test_accuracy"] for row in rows if row["step"] >= late) - 0.05


def _save(figure: Any, axes: Sequence[Any], path: pathlib.Path) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error}") from error
    finally:
        plt.close(figure)
