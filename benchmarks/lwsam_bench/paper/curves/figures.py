"""The commands `figure1`, `figure3`, `figure4` and `figure5`: what happens in training.

Each trains what is missing, writes the numbers behind the figure as `<name>.jsonl`, and
draws one picture for each benchmark from those rows alone.
"""

import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence

from lwsam_bench.paper import artefact, setups
from lwsam_bench.paper.artefact import Artefact
from lwsam_bench.paper.curves import plots as curve_plots
from lwsam_bench.paper.request import Request
from lwsam_bench.paper.runs import grouped
from lwsam_bench.paper.runs.grouped import Runs
from lwsam_bench.paper.runs.outcome import Outcome
from lwsam_bench.support.rows import read_rows, Row, write_rows
from lwsam_bench.training.config import TrainConfig


# The paper leaves the ViT out: most of it is frozen.
_THREE = ("cifar10", "cifar100", "flowers")
_EPOCH = "The value of an epoch is the mean over its rows"


def figure1(request: Request) -> Artefact:
    """Return Figure 1: gradient norm of each layer over the epochs of SGD."""
    found = grouped.train(
        _config(request.scale),
        ("cifar10", "flowers"),
        ("sgd",),
        request,
    )

    def rows(outcome: Outcome) -> list[Row]:
        names = layers(outcome)
        return [
            {
                "epoch": n,
                "norms": {x: _mean(row["norms"][x] for row in some) for x in names},
            }
            for n, some in _by_epoch(outcome.rows("train"))
        ]

    notes = (f"{_EPOCH}, and over the seeds. Layers are weights, as perturbed.",)
    return _figure("figure1", found, rows, curve_plots.layer_norms, request, notes)


def figure3(request: Request) -> Artefact:
    """Return Figure 3: test accuracy and training loss over the epochs."""
    found = _compared(request, setups.METHODS)

    def rows(outcome: Outcome) -> list[Row]:
        tested = {_epoch(row): row["accuracy"] for row in outcome.rows("test")}
        return [
            {
                "epoch": n,
                "train_loss": _mean(row["loss"] for row in some),
                "test_accuracy": tested[n],
            }
            for n, some in _by_epoch(outcome.rows("train"))
        ]

    notes = (
        "Test accuracy at the end of an epoch, training loss (that of the unperturbed"
        " network) as the mean over the rows of the epoch. Lines are means over the"
        " seeds, bands their standard error.",
    )
    return _figure("figure3", found, rows, curve_plots.learning_curves, request, notes)


def figure4(request: Request) -> Artefact:
    """Return Figure 4: gradient norm of the full model over the epochs."""
    found = _compared(request, setups.METHODS)
    weights = _weights(found)

    def rows(outcome: Outcome) -> list[Row]:
        names = weights(outcome)
        return [
            {"epoch": n, "norm": _mean(_norm(row["norms"], names) for row in some)}
            for n, some in _by_epoch(outcome.rows("train"))
        ]

    notes = (
        "The norm is over the weights of all layers, biases and BatchNorm aside, of the"
        " gradient that Algorithm 1 collects in line 9: at the perturbed point, where"
        f" there is one. {_EPOCH}; lines are means over the seeds, bands their standard"
        " error.",
    )
    return _figure("figure4", found, rows, curve_plots.full_norm, request, notes)


def figure5(request: Request) -> Artefact:
    """Return Figure 5: in how many steps each layer is perturbed."""
    found = _compared(request, [m for m in setups.METHODS if m != "sgd"])
    weights = _weights(found)

    def rows(outcome: Outcome) -> list[Row]:
        end = outcome.end
        assert end is not None  # it is done
        counts = {name: end["perturbed"][name] for name in weights(outcome)}
        return [{"steps": end["step"], "perturbations": counts}]

    notes = (
        "Counted over all steps, mean over the seeds. SGD perturbs nothing. Layers are"
        " weights, from the input on.",
    )
    return _figure("figure5", found, rows, curve_plots.perturbations, request, notes)


def _compared(request: Request, methods: Iterable[str]) -> Runs:
    """Return the runs of methods on the three benchmarks."""
    return grouped.train(_config(request.scale), _THREE, methods, request)


def _config(scale: str) -> Callable[[str, str, int], TrainConfig]:
    return lambda benchmark, method, seed: setups.config(benchmark, method, scale, seed)


def _figure(
    name: str,
    found: Runs,
    rows: Callable[[Outcome], Sequence[Row]],
    plot: Callable[[pathlib.Path, str, Sequence[Row]], None],
    request: Request,
    notes: Sequence[str],
) -> Artefact:
    """Write the rows of a figure, then draw it from them.

    Args:
      name: Of the figure.
      found: The runs.
      rows: Returns the rows of a run.
      plot: Draws the rows of a benchmark under a title into a file.
      request: What the command was asked for.
      notes: About the figure.
    """
    out = request.out
    path = out / f"{name}.jsonl"
    write_rows(
        path,
        [
            {"benchmark": benchmark, "method": what, "run": outcome.folder.name, **row}
            for benchmark, what in found.outcomes
            for outcome in found.done(benchmark, what)
            for row in rows(outcome)
        ],
    )
    plots = []
    written = list(read_rows(path))
    for benchmark in found.benchmarks():
        some = [row for row in written if row["benchmark"] == benchmark]
        if some:
            plots.append(f"{name}-{benchmark}.png")
            title = f"{grouped.title(benchmark, found.scale)}"
            model = setups.setup(benchmark, found.scale).model
            plot(out / plots[-1], f"{title} ({model})", some)
    numbers = (
        f"The numbers are in {name}.jsonl. The paper gives its own as a picture only."
    )
    return Artefact(
        name=name,
        title=artefact.TITLES[name],
        scale=found.scale,
        command=artefact.command_line(),
        plots=tuple(plots),
        notes=(*notes, numbers, *found.notes()),
        origins=found.origins(),
    )


def _epoch(row: Row) -> int:
    """Return the epoch that a row is of, the first being 1."""
    return math.ceil(row["epoch"] - 1e-9)


def _by_epoch(rows: Iterable[Row]) -> list[tuple[int, list[Row]]]:
    epochs: dict[int, list[Row]] = {}
    for row in rows:
        epochs.setdefault(_epoch(row), []).append(row)
    return sorted(epochs.items())


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the numbers; rows have None for what was not finite."""
    found = [value for value in values if value is not None]
    return statistics.mean(found) if found else None


def _norm(norms: dict[str, float | None], names: Iterable[str]) -> float | None:
    parts = [norms[name] for name in names]
    found = [part for part in parts if part is not None]
    return math.hypot(*found) if len(found) == len(parts) else None


def layers(outcome: Outcome) -> list[str]:
    """Return the layers of a run, from the input on."""
    assert outcome.end is not None  # it is done
    return list(outcome.end["perturbed"])


def _weights(found: Runs) -> Callable[[Outcome], list[str]]:
    """Return what names the layers of a run that are weights, from the input on.

    Where every parameter is perturbed each is a layer; to layer-wise SAM, and to SGD,
    only weights are.
    """
    names: dict[pathlib.Path, list[str]] = {}
    for benchmark in found.benchmarks():
        done = [o for what in setups.METHODS for o in found.done(benchmark, what)]
        fewest = min(map(layers, done), key=len, default=[])
        names.update({outcome.folder: fewest for outcome in done})
    return lambda outcome: names[outcome.folder]
