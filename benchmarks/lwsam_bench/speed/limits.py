"""The limits that `speed --check` compares with what was measured, from its rows."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lwsam_bench.pages import report
from lwsam_bench.speed import flops
from lwsam_bench.speed.racers import (
    budget,
    MOMENTUM_SAM,
    NOISE,
    OPTAX_SAM,
    PAPER,
    PERTURBED,
    SGD,
    TENTH,
)
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row


# Most that an optimizer may cost in time, over the one that it wraps.
OPTIMIZERS: Mapping[str, float] = {MOMENTUM_SAM: 1.02, PERTURBED: 1.02, NOISE: 1.05}
# Those whose time has a limit, after the one that it is over.
TIMED = (SGD, OPTAX_SAM, budget(0.10), TENTH, *OPTIMIZERS)
METHODS = (*TIMED, PAPER)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured number and its limit."""

    title: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the limit is kept; a number that is missing breaks it."""
        if self.at_least:
            return self.value >= self.limit
        return self.value <= self.limit

    def cells(self) -> list[str]:
        """Return its line of a table."""
        sign = "≥" if self.at_least else "≤"
        verdict = "kept" if self.holds else "**missed**"
        return [self.title, f"{self.value:.4g}", f"{sign} {self.limit:g}", verdict]


def table(figures: Sequence[Figure]) -> str:
    """Return the Markdown of numbers beside their limits."""
    header = ["what", "measured", "limit", ""]
    return report.markdown(header, [figure.cells() for figure in figures], "")


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Return what the check compares with its limits.

    Raises:
      UserError: If the rows are those of an earlier version's check.
    """
    methods = {row["method"]: row for row in rows if row["kind"] == "speed"}
    prices = {row["case"]: row["flops_xla"] for row in rows if row["kind"] == "price"}
    cases = {case.title: case.limit for case in flops.CASES if case.limit is not None}
    missing = [name for name in METHODS if name not in methods]
    missing += [title for title in cases if title not in prices]
    if missing:
        raise UserError(f"these rows of the check are missing: {', '.join(missing)}")
    return [
        *_paper(methods[PAPER]),
        *_budgeted(methods[budget(0.10)], methods[OPTAX_SAM]),
        *_tenth(methods[TENTH]),
        *(
            Figure(f"{name}: time", _number(methods[name], "time"), limit)
            for name, limit in OPTIMIZERS.items()
        ),
        *(Figure(f"{x}: FLOPs", prices[x], limit) for x, limit in cases.items()),
    ]


def _paper(row: Row) -> list[Figure]:
    second = row["steps"] - row["steps"] // 2
    return [
        Figure(f"{PAPER}: executables", len(row["programs"]), 12),
        Figure(f"{PAPER}: compiling, s", row["compile_seconds"], 125),
        Figure(f"{PAPER}: mean FLOPs", row["flops_xla"], 1.82),
        _off(row),
        Figure(  # fewer than 2 %
            f"{PAPER}: steps that waited, of the last {second}",
            round(row["waits"] * second),
            math.ceil(0.02 * second) - 1,
        ),
        Figure(f"{PAPER}: memory", row["memory"], 1.15),
        _host(row),
    ]


def _budgeted(row: Row, optax_sam: Row) -> list[Figure]:
    name, time = row["method"], _number(row, "time")
    return [
        Figure(f"{name}: FLOPs of the dearest step", _dearest(row), 1.10),
        Figure(f"{name}: time", time, 1.12),
        Figure(
            f"{OPTAX_SAM}: time over that of {name}",
            _number(optax_sam, "time") / time,
            1.5,
            at_least=True,
        ),
        Figure(f"{name}: memory", row["memory"], 1.05),
        _host(row),
    ]


def _tenth(row: Row) -> list[Figure]:
    return [
        Figure(f"{TENTH}: FLOPs of the dearest step", _dearest(row), 1.11),
        _off(row),
        Figure(f"{TENTH}: time", _number(row, "time"), 1.10),
        Figure(f"{TENTH}: memory", row["memory"], 1.03),
    ]


def _dearest(row: Row) -> float:
    return max(row["flops_most"], row["flops_most_xla"])


def _off(row: Row) -> Figure:
    title = f"{row['method']}: XLA's mean FLOPs off the cost model's"
    return Figure(title, abs(row["flops_xla"] / row["flops"] - 1), 0.02)


def _host(row: Row) -> Figure:
    return Figure(f"{row['method']}: host time of a step, µs", row["host_us"], 300)


def _number(row: Row, field: str) -> float:
    """Return a number of a row; in a file one that is not known is null."""
    return math.nan if row[field] is None else row[field]
