"""Table 2 from the rows of its races."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lwsam_bench.paper import published, setups
from lwsam_bench.paper.artefact import Artefact, command_line, Table, TITLES
from lwsam_bench.paper.runs import grouped
from lwsam_bench.support.rows import Row


_NAME = "table2"
_HEADER = (
    "method",
    "images/s",
    "of SGD",
    "quartiles",
    "FLOPs",
    "published, images/s",
    "published, of SGD",
)
_NOTES = (
    "Published: two NVIDIA RTX A6000, communication included, TensorFlow 2.9.3. Ours is"
    " another machine and another program: compare the shares of SGD's throughput.",
    "Ours is the median over blocks of steps, without warm-up and without steps that"
    " compiled; batches are made before the clock starts. FLOPs are the mean over all"
    " steps over those of SGD, by the cost model. In brackets: LookSAM's interval, and"
    " the k of layer-wise SAM.",
    setups.BEYOND,
)


def render(found: Mapping[str, Row], missing: Sequence[str], scale: str) -> Artefact:
    """Return the artefact.

    Args:
      found: Rows of the races that ran, by benchmark, of those that failed as well.
      missing: The benchmarks whose data were not there.
      scale: One of `setups.SCALES`.
    """
    missing_notes = [
        f"{grouped.title(benchmark, scale)} is empty: its data"
        f" ({setups.setup(benchmark, scale).dataset}), or what else it needs, were not"
        " there."
        for benchmark in missing
    ]
    return Artefact(
        name=_NAME,
        title=TITLES[_NAME],
        scale=scale,
        command=command_line(),
        tables=tuple(_table(b, scale, found.get(b)) for b in setups.BENCHMARKS),
        notes=(
            *_NOTES,
            *missing_notes,
            *setups.notes(setups.BENCHMARKS, scale),
            *published.NOTES[_NAME],
        ),
        origins=tuple(row["origin"] for row in found.values()),
    )


def _table(benchmark: str, scale: str, row: Row | None) -> Table:
    setup = setups.setup(benchmark, scale)
    cells = [
        (setups.label(method, setup), *_ours(row, method), *_theirs(benchmark, method))
        for method in setups.LABELS
    ]
    name = f"{grouped.title(benchmark, scale)}, {setup.model}, batch {setup.batch_size}"
    return Table(name, _HEADER, tuple(cells), how(row))


def speed(row: Row | None, method: str) -> str:
    """Return the images a second of a method as a cell; empty if it was not raced."""
    is_there = row is not None and method in row.get("methods", ())
    return _ours(row, method)[0] if is_there else ""


def _ours(row: Row | None, method: str) -> tuple[str, str, str, str]:
    if row is None:
        return "", "", "", ""
    if "failed" in row:
        return "failed", "", "", ""
    found = row["methods"][method]
    flops = f"{found['flops']:.2f} ×"
    time = found["time"]
    # Where every step compiled: null in a file, NaN in a row that is new.
    if time is None or np.isnan(time):
        return "–", "–", "–", flops
    low, high = found["time_quartiles"]
    return (
        _rate(found["images_per_second"]),
        f"{1 / time:.0%}",
        f"{1 / high:.0%} to {1 / low:.0%}",
        flops,
    )


def _theirs(benchmark: str, method: str) -> tuple[str, str]:
    speed = published.THROUGHPUT.get((benchmark, method))
    if speed is None:
        return "", ""
    return f"{speed:g}", f"{speed / published.THROUGHPUT[benchmark, 'sgd']:.0%}"


def how(row: Row | None) -> tuple[str, ...]:
    """Return where and how a race was run, and on which data."""
    if row is None:
        return ()
    if "failed" in row:
        return (f"The race failed: {row['failed']}.",)
    turns = "step by step" if row["burst"] == 1 else f"every {row['burst']} steps"
    told = (
        f"Ours: {_hardware(row['origin'])}, {row['steps']} steps of real training, the"
        f" methods taking turns {turns} in one process."
    )
    return (told, row["data"]) if row["data"] else (told,)


def _hardware(origin: Mapping[str, Any]) -> str:
    if origin["platform"] == "cpu":
        return f"a CPU with {origin['cpu_count']} cores"
    return f"one {origin['device']}"


def _rate(images_per_second: float) -> str:
    digits = 0 if images_per_second >= 100 else 1
    return f"{images_per_second:,.{digits}f}"
