"""What the rows of a tuning say: each method in each set of draws, and beside SGD."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lwsam_bench.pages.report import mean_and_error
from lwsam_bench.support.rows import Row
from lwsam_bench.tuning.method import Method
from lwsam_bench.tuning.methods import BY_NAME
from lwsam_bench.tuning.protocol import merit
from lwsam_bench.tuning.space import Range


PRICES = (1.0, 1.1, 2.0)  # in gradients of the base optimizer, a step
STOPS = {"last": "last step", "selected": "step that validation selects"}
HARMLESS = 0.2  # of the range of the radius, at its lower end


@dataclasses.dataclass(frozen=True)
class Measure:
    """What counts on a task.

    Attributes:
      field: Its name in the rows.
      name: Its name on a page.
      unit: What stands behind a number; it is "%" for a share.
      points: What stands behind a difference.
      sign: 1 if more is better, else -1.
    """

    field: str
    name: str
    unit: str
    points: str
    sign: int = 1

    def number(self, value: float, signed: bool = False) -> str:
        """Return a number, or a difference with its sign, as a page has it."""
        if self.unit == "%":
            return f"{100 * value:{'+' * signed}.1f}"
        return f"{value:{'+' * signed}.3f}"

    def text(self, mean: float, error: float, signed: bool = False) -> str:
        """Return a mean with its standard error, unless that is NaN."""
        spread = "" if math.isnan(error) else f" ± {self.number(error)}"
        return self.number(mean, signed) + spread


ACCURACY = Measure("accuracy", "test accuracy", "%", "points")
BITS = Measure("bits", "bits per character of the test", "bits", "bits", sign=-1)


def measure_of(last: Row) -> Measure:
    """Return what counts, given what was measured at the end of a run."""
    return BITS if "bits" in last else ACCURACY


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
    def measure(self) -> Measure:
        """What counts on its task."""
        return measure_of(self.one["last"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration, with the steps that were run."""
        return {**self.one["config"], "steps": self.one["steps"]}

    def mean(self, *fields: str) -> tuple[float, float]:
        """Return mean and standard error over seeds of a number of the rows."""
        return mean_and_error(self.values(*fields))

    def values(self, *fields: str) -> list[float]:
        """Return a number of each row; NaN where it has none."""
        return [_at(row, fields) for row in self.rows.values()]

    def score(self, stop: str) -> tuple[float, float]:
        """Return mean and standard error of what counts, by one of `STOPS`."""
        return self.mean(stop, self.measure.field)

    @property
    def cost(self) -> float:
        """Mean gradients of a whole run."""
        return self.mean("gradients")[0]

    def part(self, number: int) -> tuple[float, float]:
        """Return mean and standard error of the last accuracy on a turn's classes."""
        last = [row["last"]["parts"][number] for row in self.rows.values()]
        return mean_and_error(last)

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
      mean: Mean lead, above 0 where the first one is better.
      error: Its standard error; NaN for one seed.
      measure: What counts.
    """

    mean: float
    error: float
    measure: Measure = ACCURACY

    def __str__(self) -> str:
        """Return the difference as a page has it: fewer bits are below 0."""
        return self.measure.text(self.measure.sign * self.mean, self.error, signed=True)

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
    for method in BY_NAME.values():
        by_draws: dict[int, list[Tuned]] = {}
        for length in (1.0, 2.0):
            for tuned in length_of(rows, method.name, length):
                by_draws.setdefault(tuned.draws, []).append(tuned)
        if by_draws:
            found[method.name] = [
                max(some, key=lambda t: merit(list(t.rows.values())))
                for _, some in sorted(by_draws.items())
            ]
    return found


def length_of(rows: Sequence[Row], name: str, length: float) -> list[Tuned]:
    """Return a method's final runs at one of `protocol.LENGTHS` in each set of draws."""
    mine = [row for row in rows if row["method"] == name]
    found = []
    for draws in sorted({row["draws"] for row in mine}):
        here = [row for row in mine if row["draws"] == draws]
        final = [
            row for row in here if row["phase"] == "final" and row["length"] == length
        ]
        if final:
            by_seed = {
                row["seed"]: row for row in sorted(final, key=lambda r: r["seed"])
            }
            trials = sum(row["phase"] == "trial" for row in here)
            found.append(Tuned(BY_NAME[name], draws, by_seed, trials))
    return found


def gaps(found: Mapping[str, list[Tuned]], name: str, what: str) -> list[Gap]:
    """Return a method's gap to its base optimizer in each set of draws.

    Args:
      found: From `summarize`.
      name: The method.
      what: One of `STOPS`, or of the changes that a net may survive.
    """
    made = []
    for ours in found[name]:
        base = _of_draws(found.get(ours.method.family, []), ours.draws)
        if base is None:
            continue
        made.append(gap(ours, base, what))
    return [x for x in made if x is not None]


def gap(ours: Tuned, theirs: Tuned, what: str) -> Gap | None:
    """Return a lead in what counts over the seeds that both have; None without any."""
    measured = what, ours.measure.field
    fields = measured if what in STOPS else ("last", "survival", what)
    pairs = [
        ours.measure.sign
        * (_at(ours.rows[seed], fields) - _at(theirs.rows[seed], fields))
        for seed in ours.rows
        if seed in theirs.rows
    ]
    return Gap(*mean_and_error(pairs), ours.measure) if pairs else None


def worst(some: Sequence[Gap]) -> Gap | None:
    """Return the gap that counts: the smallest of all sets of draws."""
    return min(some, key=lambda x: x.mean, default=None)


def counted(tuned: Sequence[Tuned], stop: str) -> Tuned:
    """Return the set of draws that counts: the worse one."""
    return min(tuned, key=lambda t: t.measure.sign * t.score(stop)[0])


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


def leader(
    found: Mapping[str, list[Tuned]], family: str, price: float, what: str
) -> tuple[list[Tuned], Gap] | None:
    """Return what is furthest ahead of the base optimizer at a price, and by how much.

    None where nothing is ahead by more than two standard errors in the worse set of
    draws.

    Args:
      found: From `summarize`.
      family: The base optimizer.
      price: As much as a step may cost, in its gradients.
      what: One of `STOPS`, or of the changes that a net may survive.
    """
    ahead = [
        (tuned, gap)
        for tuned in payable(found, family, price)
        if (gap := worst(gaps(found, tuned[0].method.name, what))) is not None
        and gap.verdict == "better"
    ]
    return max(ahead, key=lambda x: x[1].mean, default=None)


def cpu_hours(rows: Sequence[Row]) -> float | None:
    """Return what all runs took of one core, compiling and measuring too.

    None where a row has no such number: older ones have not.
    """
    if any("all_cpu_seconds" not in row for row in rows):
        return None
    return sum(row["all_cpu_seconds"] for row in rows) / 3600


def wall_hours(rows: Sequence[Row]) -> float:
    """Return how long all runs took by the clock, one after another."""
    return sum(row["wall_seconds"] for row in rows) / 3600


def _of_draws(tuned: Sequence[Tuned], draws: int) -> Tuned | None:
    return next((t for t in tuned if t.draws == draws), None)


def _at(row: Row, fields: Sequence[str]) -> float:
    value: Any = row
    for field in fields:
        value = value.get(field)
    return math.nan if value is None else value
