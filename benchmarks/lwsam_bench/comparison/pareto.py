"""The command `pareto`: what a price buys, in accuracy on real images.

Every method is tuned on seeds of its own and then evaluated on others; each run is one
row of a file that is written as the runs end. The command goes on where it was stopped:
runs whose rows are there are not repeated.
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from lwsam_bench.comparison import pareto_report
from lwsam_bench.comparison.pareto_methods import LADDER, Method, METHODS
from lwsam_bench.comparison.pareto_train import Course, Runner, Task
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.progress import reading
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.row_lock import row_lock
from lwsam_bench.support.rows import MetricsFile, output_folder, read_rows, Row
from lwsam_bench.training.config import differences


TASKS: Mapping[str, Task] = {
    "digits": Task("digits", steps=400, train_images=1_000),
    "fashion_mnist": Task("fashion_mnist", steps=400, train_images=2_000, pool=2),
}
SEEDS: Mapping[str, int] = {"digits": 5, "fashion_mnist": 3}
# Of the first radius that is tried; the best is a matter of the data, too.
RADIUS: Mapping[str, float] = {"digits": 1.0, "fashion_mnist": 0.67}

# None that is evaluated. Near the radius where training diverges one may be lucky.
TUNING_SEEDS: Mapping[str, tuple[int, ...]] = {
    "digits": (100, 101),
    "fashion_mnist": (100,),
}


@dataclasses.dataclass(frozen=True)
class ParetoConfig:
    """Everything that decides which runs there are."""

    datasets: tuple[str, ...] = tuple(TASKS)
    methods: tuple[Method, ...] = METHODS
    seeds: int | None = None  # None: as many as `SEEDS` says
    steps: int | None = None  # None: those of the task
    ladder: tuple[float, ...] = LADDER

    def task(self, dataset: str) -> Task:
        """Return the task on a dataset."""
        task = TASKS[dataset]
        return dataclasses.replace(task, steps=self.steps or task.steps)


def choose_methods(names: Sequence[str]) -> tuple[Method, ...]:
    """Return the methods of these names; all if there is none.

    Raises:
      UserError: On an unknown name.
    """
    known = {method.name: method for method in METHODS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"unknown method {', '.join(unknown)}: expected some of {', '.join(known)}"
        )
    return tuple(known[name] for name in names) or METHODS


def run(
    config: ParetoConfig,
    data_dir: str | None,
    out: str,
    docs: str | None,
    console: Console,
    *,
    render_only: bool = False,
) -> int:
    """Train what is missing in `out`, then render tables and plots.

    Args:
      config: Which runs there are.
      data_dir: Folder of tensorflow-datasets.
      out: Folder of the rows; tables and plots come here, too.
      docs: Folder with a page `pareto.md` to be brought up to date, or None.
      console: Where to report.
      render_only: Whether to leave it at the rows that are there.
    """
    folder = output_folder(out)
    if not render_only:
        for dataset in config.datasets:
            _Sweep(config, dataset, folder, console).run(data_dir)
    found = {
        name: list(read_rows(folder / f"{name}.jsonl")) for name in config.datasets
    }
    pareto_report.render({k: v for k, v in found.items() if v}, folder, docs)
    made = f"; tables and plots are in {docs}/" if docs else ", tables and plots too"
    console.print(f"rows are in {folder}/{made}", soft_wrap=True)
    return 0


class _Sweep:
    """All runs on one dataset."""

    def __init__(
        self,
        config: ParetoConfig,
        dataset: str,
        folder: pathlib.Path,
        console: Console,
    ):
        self._config, self._console = config, console
        self._path = folder / f"{dataset}.jsonl"
        self._task = config.task(dataset)
        self._rows: list[Row] = []
        self._course: Course | None = None

    def run(self, data_dir: str | None) -> None:
        """Run what is missing, method by method.

        Raises:
          UserError: If another process is writing the rows, or they are of another task.
        """
        with row_lock(self._path):
            self._read()
            self._run(data_dir)

    def _read(self) -> None:
        self._rows = list(read_rows(self._path))
        wanted = dataclasses.asdict(self._task)
        for row in self._rows:
            changes = differences(row.get("task", {}), wanted)
            if changes:
                raise UserError(
                    f"{self._path} holds runs of another task ({'; '.join(changes)});"
                    " choose another --out"
                )

    def _run(self, data_dir: str | None) -> None:
        dataset = self._task.dataset
        seeds = range(self._config.seeds or SEEDS[dataset])
        tuning = TUNING_SEEDS[dataset]
        with MetricsFile(self._path, keep_until=0) as file:
            for method in self._config.methods:
                self._runner: Runner | None = None  # made for the first missing run
                one = functools.partial(self._one, file, method, data_dir)
                rho = None
                if method.start is not None:
                    scale = RADIUS[dataset]
                    rho = climb(
                        self._config.ladder,
                        scale * method.start,
                        lambda rho, one=one: merit(
                            [one(rho, seed, "tuning") for seed in tuning]
                        ),
                    )
                for seed in seeds:
                    one(rho, seed, "evaluation")

    def _one(
        self,
        file: MetricsFile,
        method: Method,
        data_dir: str | None,
        rho: float | None,
        seed: int,
        phase: str,
    ) -> Row:
        """Return the row of a run; run it if it is not there."""
        for row in self._rows:
            if (row["method"], row["rho"], row["seed"]) == (method.name, rho, seed):
                return row
        if self._course is None:
            with reading(self._console, self._task.dataset) as on_record:
                self._course = Course(self._task, data_dir, on_record)
        if self._runner is None:
            self._runner = self._course.runner(method)
        row: Row = {
            "kind": "run",
            "phase": phase,
            "dataset": self._task.dataset,
            "method": method.name,
            "label": method.label,
            "family": method.family,
            "rho": rho,
            "seed": seed,
            **self._runner.run(rho, seed),
            "task": dataclasses.asdict(self._task),
            "origin": provenance(),
        }
        self._rows.append(row)
        file.write(row)
        radius = "" if rho is None else f", rho {rho:g}"
        self._console.print(
            f"{self._task.dataset}, {method.label}{radius}, {phase} seed {seed}:"
            f" {row['test_accuracy']:.1%} at {1 + row['overhead']:.2f},"
            f" {row['seconds']:.0f} s{', diverged' if row['diverged'] else ''}",
            highlight=False,
            soft_wrap=True,
        )
        return row


def merit(rows: Sequence[Row]) -> tuple[bool, float]:
    """Return what makes a radius the best in tuning: first, that no run diverged."""
    sound = not any(row["diverged"] for row in rows)
    return sound, statistics.mean(row["validation_accuracy"] for row in rows)


def climb(
    ladder: Sequence[float], start: float, measure: Callable[[float], Any]
) -> float:
    """Return the radius from which a step up and a step down the ladder are no better.

    Args:
      ladder: Radii, rising.
      start: The climb begins at the nearest one.
      measure: Returns the merit of a radius; called once for each that is looked at.
    """
    found: dict[int, Any] = {}

    def look(place: int) -> Any:
        if place not in found:
            found[place] = measure(ladder[place])
        return found[place]

    here = min(range(len(ladder)), key=lambda i: abs(ladder[i] / start - 1))
    while True:
        around = [i for i in (here, here - 1, here + 1) if 0 <= i < len(ladder)]
        best = max(around, key=look)  # on a tie, where it stands
        if best == here:
            return ladder[here]
        here = best
