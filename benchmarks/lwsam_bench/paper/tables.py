"""The commands `table1`, `table3`, `table4` and `lm`: what each method reaches.

Each trains what is missing and returns what is to be shown.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from lwsam_bench.paper import artefact, published, setups, traced
from lwsam_bench.paper.artefact import Artefact, Table
from lwsam_bench.paper.request import Request
from lwsam_bench.paper.runs import grouped
from lwsam_bench.paper.runs.grouped import Runs
from lwsam_bench.paper.runs.outcome import Outcome
from lwsam_bench.paper.throughput import race as throughput, report
from lwsam_bench.support.rows import write_rows
from lwsam_bench.training.config import TrainConfig


CRITERIA: Mapping[str, str] = {
    "none": "None (SGD)",
    "high": "High-Norm",
    "low": "Low-Norm",
    "random": "Random",
}
# Tables 3 and 4 leave the ViT out.
BENCHMARKS = ("cifar10", "cifar100", "flowers")

_ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1}
# Label, method, changes.
_LM: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "sgd": ("SGD", "sgd", {}),
    "adamw": ("AdamW", "sgd", _ADAMW),
    "generalized_sam": ("AdamW, generalised SAM", "generalized_sam", _ADAMW),
    "looksam": ("AdamW, LookSAM", "looksam", _ADAMW),
    "lwsam": ("AdamW, layer-wise SAM", "lwsam", _ADAMW),
}
_OURS = (
    "Ours is the accuracy on the test images after the last step, mean ± standard error"
    " over the seeds; the published one is mean ± spread over at least three runs."
)
_OURS_OF = ("ours", "FLOPs", "seeds")  # the columns of `_measured`
_FLOPS = "FLOPs are those of the mean training step over those of a step of SGD."


def table1(request: Request) -> Artefact:
    """Return Table 1: accuracy of the methods on the four benchmarks."""
    scale = request.scale

    def make(benchmark: str, what: str, seed: int) -> TrainConfig:
        return setups.config(benchmark, what, scale, seed)

    found = grouped.train(
        make,
        setups.BENCHMARKS,
        setups.LABELS,
        request,
    )
    tables = []
    for benchmark in setups.BENCHMARKS:
        setup = setups.setup(benchmark, scale)
        rows = [
            (
                setups.label(what, setup),
                *_measured(found, benchmark, what),
                _published(published.ACCURACY.get((benchmark, what))),
            )
            for what in setups.LABELS
        ]
        name = f"{grouped.title(benchmark, scale)}, {setup.model}"
        tables.append(_table(name, "method", rows))
    extra = "In brackets: LookSAM's interval, and the k of layer-wise SAM."
    notes = (_OURS, _FLOPS, extra, setups.BEYOND, *_traced(found))
    return _artefact("table1", request, found, tables, notes)


def table3(request: Request) -> Artefact:
    """Return Table 3: accuracy by the criterion that chooses the layers."""
    scale = request.scale

    def make(benchmark: str, criterion: str, seed: int) -> TrainConfig:
        if criterion == "none":
            return setups.config(benchmark, "sgd", scale, seed)
        return setups.config(benchmark, "lwsam", scale, seed, criterion=criterion)

    found = grouped.train(
        make,
        BENCHMARKS,
        CRITERIA,
        request,
    )
    tables = []
    for benchmark in BENCHMARKS:
        setup = setups.setup(benchmark, scale)
        rows = [
            (
                label,
                *_measured(found, benchmark, what),
                _published(published.CRITERION.get((benchmark, what))),
            )
            for what, label in CRITERIA.items()
        ]
        name = f"{grouped.title(benchmark, scale)}, {setup.model}, k = {setup.k}"
        tables.append(_table(name, "criterion", rows))
    return _artefact("table3", request, found, tables, (_OURS, _FLOPS))


def table4(request: Request) -> Artefact:
    """Return Table 4: accuracy and cost by the number of layers."""
    scale = request.scale

    def make(benchmark: str, k: Any, seed: int) -> TrainConfig:
        if throughput.lane_of(setups.setup(benchmark, scale), k) == "generalized_sam":
            return setups.config(benchmark, "generalized_sam", scale, seed)
        return setups.config(benchmark, "lwsam", scale, seed, k=k)

    found = grouped.train(
        make,
        BENCHMARKS,
        published.KS,
        request,
    )
    tables: list[Table] = []
    races: list[dict[str, Any]] = []
    for benchmark in BENCHMARKS:
        setup = setups.setup(benchmark, scale)
        race = throughput.finished(request.out, benchmark, scale)
        lanes = {k: throughput.lane_of(setup, k) for k in published.KS}
        rows = []
        for k, lane in lanes.items():
            mean, spread, speed = published.BY_K[benchmark, k]
            rows.append(
                (
                    str(k),
                    *_measured(found, benchmark, k),
                    report.speed(race, lane),
                    published.accuracy(mean, spread),
                    f"{speed:.1f}",
                )
            )
        beyond = [
            f"{k}" for k, x in lanes.items() if k != "all" and x == "generalized_sam"
        ]
        many = (
            f"{setup.model} has {setup.layers} layers: k = {', '.join(beyond)} is all."
        )
        notes = ((many,) if beyond else ()) + report.how(race)[:1]
        races += [race["origin"]] if race else []
        name = f"{grouped.title(benchmark, scale)}, {setup.model}"
        header = ("k", *_OURS_OF, "images/s", "published", "published, images/s")
        tables.append(Table(name, header, tuple(rows), notes))
    extra = (
        "All is generalised SAM, as in the paper, which gives both the same numbers; it"
        " also perturbs biases and BatchNorm, which are no layers. Our images/s are of"
        " the race of Table 2, if that has been run in this folder.",
    )
    notes = (_OURS, _FLOPS, *extra)
    made = _artefact("table4", request, found, tables, notes)
    return dataclasses.replace(made, origins=(*made.origins, *races))


def lm(request: Request) -> Artefact:
    """Return the perplexity of a small language model; the paper has no such numbers."""

    def make(benchmark: str, what: str, seed: int) -> TrainConfig:
        _, method, changes = _LM[what]
        return setups.config(benchmark, method, request.scale, seed, **changes)

    found = grouped.train(make, ["lm"], _LM, request)
    setup = setups.setup("lm", request.scale)
    rows = [
        (
            label,
            found.cell("lm", what, perplexity, _three_digits),
            found.mean("lm", what, grouped.flops, grouped.times),
            found.seeds("lm", what),
            "",
        )
        for what, (label, _, _) in _LM.items()
    ]
    name = (
        f"{setups.TITLES['lm']}, {setup.model}, validation perplexity after"
        f" {setup.steps:,} steps of {setup.batch_size} excerpts"
    )
    extra = (
        "The paper says that small k do for language models, too, but has no numbers of"
        " one: there is nothing to compare with. Perplexity is the exponential of the"
        " mean loss of a character; ± is the standard error over the seeds.",
        f"Layer-wise SAM perturbs {setup.k} of {setup.layers} layers, LookSAM ascends"
        f" once in {setup.every} steps. The learning rate is {setup.lr:g} for SGD and"
        f" {_ADAMW['lr']:g} for AdamW, whose weight decay is {_ADAMW['weight_decay']:g};"
        " nothing was tuned.",
    )
    notes = (_FLOPS, *extra, *_traced(found))
    return _artefact("lm", request, found, [_table(name, "method", rows)], notes)


def perplexity(outcome: Outcome) -> float:
    """Return the perplexity at the end of a run."""
    assert outcome.end is not None  # it is done
    return math.exp(outcome.end["loss"])


def _measured(found: Runs, benchmark: str, what: Hashable) -> tuple[str, str, str]:
    return (
        found.cell(benchmark, what, grouped.accuracy, grouped.percent),
        found.mean(benchmark, what, grouped.flops, grouped.times),
        found.seeds(benchmark, what),
    )


def _published(number: tuple[float, float] | None) -> str:
    return "" if number is None else published.accuracy(*number)


def _traced(found: Runs) -> tuple[str, ...]:
    """Trace the networks of the paper's size where none of them is trained."""
    return (traced.sizes(found.benchmarks()),) if found.scale == "smoke" else ()


def _three_digits(mean: float, error: float | None) -> str:
    return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _table(
    title: str,
    first: str,
    rows: Sequence[tuple[str, ...]],
) -> Table:
    return Table(title, (first, *_OURS_OF, "published"), tuple(rows))


def _artefact(
    name: str,
    request: Request,
    found: Runs,
    tables: Sequence[Table],
    notes: Sequence[str],
) -> Artefact:
    """Return what is shown; leave a row for each run in `<name>.jsonl`."""
    write_rows(request.out / f"{name}.jsonl", found.rows())
    return Artefact(
        name=name,
        title=artefact.TITLES[name],
        scale=found.scale,
        command=artefact.command_line(),
        tables=tuple(tables),
        notes=(*notes, *found.notes(), *published.NOTES.get(name, ())),
        origins=found.origins(),
    )
