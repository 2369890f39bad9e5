"""What the rows of a tuning say: each method in each set of draws, and beside SGD."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lwsam_bench.pages.report import mean_and_error
from lwsam_bench.support.rows import Row
from lwsam_bench.tuning.methods import Method, METHODS
from lwsam_bench.tuning.protocol import merit
from lwsam_bench.tuning.space import Range


STOPS = {"last": "last step", "selected": "step that validation selects"}
HARMLESS = 0.2  # of the range of the radius, at its lower end


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A method at the best configuration of one set of draws.

    Attributes:
      method: The method.
      draws: Number of the set of draws.
      rows: Its final runs, by seed.
      trials: Configurations that were tried.
    """

    method: Method
    draws: int
    rows: Mapping[int, Row]
    trials: int

    @property
    def one(self) -> Row:
        """Any of the final rows, for what all have in common."""
        return next(iter(self.rows.values()))

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration, with the steps that were run."""
        return {**self.one["config"], "steps": self.one["steps"]}

    def mean(self, *fields: str) -> tuple[float, float]:
        """Return mean and standard error over seeds of a number of the rows."""
        return mean_and_error(self.values(*fields))

    def values(self, *fields: str) -> list[float]:
        """Return a number of each row."""
        return [_at(row, fields) for row in self.rows.values()]

    @property
    def radius_place(self) -> float | None:
        """Where in its range the best radius lies; None if there is none."""
        if "rho" not in self.one["config"]:
            return None
        low, high = self.one["ranges"]["rho"]
        return Range(low, high).place(self.one["config"]["rho"])


@dataclasses.dataclass(frozen=True)
class Gap:
    """A difference of two methods, paired by seed.

    Attributes:
      mean: Mean difference.
      error: Its standard error; NaN for one seed.
    """

    mean: float
    error: float

    @property
    def verdict(self) -> str:
        """Whether it is more than two standard errors."""
        if not abs(self.mean) > 2 * self.error:
            return "no difference"
        return "better" if self.mean > 0 else "worse"


def summarize(rows: Sequence[Row]) -> dict[str, list[Tuned]]:
    """Return by method what its sets of draws led to, as far as final runs are there.

    A base optimizer is the better of the same and of twice the steps, by validation.
    """
    found: dict[str, list[Tuned]] = {}
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method.name]
        for draws in sorted({row["draws"] for row in mine}):
            here = [row for row in mine if row["draws"] == draws]
            final = [row for row in here if row["phase"] == "final"]
            lengths = [
                [row for row in final if row["length"] == length]
                for length in (1.0, 2.0)
            ]
            whole = [some for some in lengths if some]
            if not whole:
                continue
            best = max(whole, key=merit)
            tuned = Tuned(
                method,
                draws,
                {row["seed"]: row for row in sorted(best, key=lambda r: r["seed"])},
                sum(row["phase"] == "trial" for row in here),
            )
            found.setdefault(method.name, []).append(tuned)
    return found


def gaps(found: Mapping[str, list[Tuned]], name: str, stop: str) -> list[Gap]:
    """Return a method's gap to its base optimizer in each set of draws.

    Args:
      found: From `summarize`.
      name: The method.
      stop: One of `STOPS`.
    """
    made = []
    for ours in found[name]:
        base = _of_draws(found.get(ours.method.family, []), ours.draws)
        if base is None:
            continue
        made.append(gap(ours, base, stop))
    return [x for x in made if x is not None]


def gap(ours: Tuned, theirs: Tuned, stop: str) -> Gap | None:
    """Return a difference in accuracy over the seeds that both have; None without any."""
    pairs = [
        ours.rows[seed][stop]["accuracy"] - theirs.rows[seed][stop]["accuracy"]
        for seed in ours.rows
        if seed in theirs.rows
    ]
    return Gap(*mean_and_error(pairs)) if pairs else None


def worst(some: Sequence[Gap]) -> Gap | None:
    """Return the gap that counts: the smallest of all sets of draws."""
    return min(some, key=lambda x: x.mean, default=None)


def counted(tuned: Sequence[Tuned], stop: str) -> Tuned:
    """Return the set of draws that counts: the one of the lower accuracy."""
    return min(tuned, key=lambda t: t.mean(stop, "accuracy")[0])


def payable(
    found: Mapping[str, list[Tuned]], family: str, price: float
) -> list[list[Tuned]]:
    """Return the methods beside the base optimizer that a price pays for."""
    return [
        tuned
        for tuned in found.values()
        if tuned[0].method.family == family
        and not tuned[0].method.is_base
        and max(t.mean("price")[0] for t in tuned) <= price + 0.005
    ]


def hours(rows: Sequence[Row]) -> float:
    """Return how long all runs took one after another, compiling and measuring too."""
    return sum(row["wall_seconds"] for row in rows) / 3600


def _of_draws(tuned: Sequence[Tuned], draws: int) -> Tuned | None:
    return next((t for t in tuned if t.draws == draws), None)


def _at(row: Row, fields: Sequence[str]) -> float:
    value: Any = row
    for field in fields:
        value = value[field]
    return math.nan if value is None else value


def spread(values: Sequence[float]) -> float:
    """Return the median, for numbers that do not change between seeds but for noise."""
    return statistics.median(values)
