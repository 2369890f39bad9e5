"""The runs behind a table or a figure: by benchmark, by what varies, and by seed."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from lwsam_bench.pages import report
from lwsam_bench.paper import setups
from lwsam_bench.paper.request import Request
from lwsam_bench.paper.runs.outcome import DONE, FAILED, MISSING, Outcome
from lwsam_bench.paper.runs.sweep import Sweep
from lwsam_bench.support.rows import Row
from lwsam_bench.training.config import TrainConfig


Key = tuple[str, Hashable]  # benchmark, and what varies


@dataclasses.dataclass(frozen=True)
class Runs:
    """Outcomes of the runs of a command, those of the seeds side by side.

    Attributes:
      scale: One of `setups.SCALES`.
      outcomes: By benchmark and by what varies, then by seed.
    """

    scale: str
    outcomes: Mapping[Key, tuple[Outcome, ...]]

    def done(self, benchmark: str, what: Hashable) -> list[Outcome]:
        """Return the runs that ended as they should."""
        found = self.outcomes.get((benchmark, what), ())
        return [outcome for outcome in found if outcome.status == DONE]

    def mean(
        self,
        benchmark: str,
        what: Hashable,
        value: Callable[[Outcome], float],
        show: Callable[[float, float | None], str],
    ) -> str:
        """Return mean and standard error over the seeds as a cell; empty if none ran.

        Args:
          benchmark: Of the runs.
          what: Of the runs.
          value: Reads the number off a run.
          show: Formats the mean and the error, which is None for one seed.
        """
        values = [value(outcome) for outcome in self.done(benchmark, what)]
        if not values:
            return ""
        mean, error = report.mean_and_error(values)
        return show(mean, error if len(values) > 1 else None)

    def cell(
        self,
        benchmark: str,
        what: Hashable,
        value: Callable[[Outcome], float],
        show: Callable[[float, float | None], str],
    ) -> str:
        """Return what `mean` does, and how many of the runs failed."""
        found = self.outcomes.get((benchmark, what), ())
        failed = sum(outcome.status == FAILED for outcome in found)
        text = self.mean(benchmark, what, value, show)
        if not failed:
            return text
        return f"{text} ({failed} of {len(found)} failed)" if text else "failed"

    def seeds(self, benchmark: str, what: Hashable) -> str:
        """Return the number of runs behind a cell; empty if there are none."""
        return str(len(self.done(benchmark, what)) or "")

    def benchmarks(self) -> tuple[str, ...]:
        """Return the benchmarks, in order."""
        return tuple(dict.fromkeys(benchmark for benchmark, _ in self.outcomes))

    def rows(self) -> list[Row]:
        """Return a row for each run that was trained: what it is, and how it ended.

        A run that stands in several places of a table has a row in each.
        """
        return [
            {
                "benchmark": benchmark,
                "what": what,
                "run": outcome.folder.name,
                "status": outcome.status,
                "reason": outcome.reason,
                **outcome.record(),
                "end": outcome.end,
            }
            for (benchmark, what), outcomes in self.outcomes.items()
            for outcome in outcomes
            if outcome.status in (DONE, FAILED)
        ]

    def notes(self) -> tuple[str, ...]:
        """Return what a reader must know: data, what is missing, what failed, scale."""
        told = []
        for run in self._each_once():
            source = run.record().get("data", {})
            if run.status == DONE and source.get("note"):
                told.append(f"{source['name']}: {source['note']}")
        for benchmark in self.benchmarks():
            if any(
                outcome.status == MISSING
                for (name, _), found in self.outcomes.items()
                for outcome in found
                if name == benchmark
            ):
                setup = setups.setup(benchmark, self.scale)
                told.append(
                    f"{title(benchmark, self.scale)} is empty: its data ({setup.dataset},"
                    f" and what {setup.model} needs) were not there."
                )
        told += [
            f"The run {outcome.folder.name} failed: {outcome.reason}."
            for outcome in self._each_once()
            if outcome.status == FAILED
        ]
        told += setups.notes(self.benchmarks(), self.scale)
        return tuple(dict.fromkeys(told))

    def origins(self) -> tuple[dict[str, Any], ...]:
        """Return where the rows were made; of equal origins the first and the last."""
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for run in self._each_once():
            for origin in run.record().get("provenance", ()):
                origin = {k: v for k, v in origin.items() if k != "from_step"}
                kind = repr(sorted((k, v) for k, v in origin.items() if k != "time"))
                by_kind.setdefault(kind, []).append(origin)
        kept = []
        for origins in by_kind.values():
            origins.sort(key=lambda origin: str(origin.get("time")))
            kept += [origins[0], *origins[1:][-1:]]
        return tuple(kept)

    def _each_once(self) -> list[Outcome]:
        every = [o for outcomes in self.outcomes.values() for o in outcomes]
        return list({outcome.folder: outcome for outcome in every}.values())


def train(
    make: Callable[[str, Any, int], TrainConfig],
    benchmarks: Iterable[str],
    whats: Iterable[Hashable],
    request: Request,
) -> Runs:
    """Train what is missing of a grid of runs.

    Args:
      make: Returns the configuration for a benchmark, what varies, and a seed.
      benchmarks: Of the grid.
      whats: What varies in each benchmark.
      request: What the command was asked for.
    """
    whats = list(whats)
    wanted = {
        (benchmark, what): [
            make(benchmark, what, seed)
            for seed in setups.seeds(request.scale, request.seeds)
        ]
        for benchmark in benchmarks
        for what in whats
    }
    every = [config for configs in wanted.values() for config in configs]
    found = Sweep.of(request).ensure(every)
    return Runs(
        request.scale,
        {key: tuple(found[c] for c in configs) for key, configs in wanted.items()},
    )


def title(benchmark: str, scale: str) -> str:
    """Return the name of a benchmark; a subset of a dataset goes under its own."""
    subset = setups.setup(benchmark, scale).dataset.endswith("_subset")
    return setups.TITLES[benchmark] + (" subset" if subset else "")


def percent(mean: float, error: float | None) -> str:
    """Return an accuracy as a cell."""
    spread = "" if error is None else f" ± {100 * error:.2f}"
    return f"{100 * mean:.2f}{spread} %"


def times(mean: float, error: float | None) -> str:
    """Return FLOPs over those of a plain step as a cell, without their spread."""
    del error
    return f"{mean:.2f} ×"


def accuracy(outcome: Outcome) -> float:
    """Return the test accuracy at the end of a run."""
    assert outcome.end is not None  # it is done
    return outcome.end["accuracy"]


def flops(outcome: Outcome) -> float:
    """Return the mean FLOPs of a run's steps over those of a plain one."""
    assert outcome.end is not None  # it is done
    return 1.0 + outcome.end["overhead"]
