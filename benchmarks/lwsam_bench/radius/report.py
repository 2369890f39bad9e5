"""What a sweep proposed, beside what each radius of the grid came to."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from lwsam_bench.support.rows import Row


WORSE = 2.0  # standard errors by which a proposal may be behind SGD
BEHIND = 0.02  # of accuracy, by which it may be behind the grid's best under noise


class Accuracy(NamedTuple):
    """Mean over seeds, and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        """Return both in percent."""
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}"


class Judged(NamedTuple):
    """A task.

    Attributes:
      task: Its name.
      sgd: Without a radius.
      best: The radius of the grid that does best on the images of the test.
      of_best: What that comes to.
      proposed: What the sweep proposes.
      of_proposed: What that comes to.
      cost: The sweep's plain gradients over those of a training by SGD.
      change: The proposal's accuracy over SGD's, seed by seed.
    """

    task: str
    sgd: Accuracy
    best: float
    of_best: Accuracy
    proposed: float
    of_proposed: Accuracy
    cost: float
    change: Accuracy

    @property
    def does_no_harm(self) -> bool:
        """Whether it is not behind SGD by more than two standard errors."""
        return self.change.mean >= -WORSE * self.change.error

    @property
    def is_near_the_best(self) -> bool:
        """Whether it is within two points of the grid's best."""
        return self.of_best.mean - self.of_proposed.mean <= BEHIND


def judge(task: str, rows: Sequence[Row], steps: int) -> Judged:
    """Return what the rows of a task say.

    Args:
      task: Its name.
      rows: Its rows.
      steps: Steps of a training.
    """
    (sweep,) = (row for row in rows if row["kind"] == "sweep")
    by_rho: dict[float, dict[int, float]] = {}
    for row in rows:
        if row["kind"] == "grid":
            by_rho.setdefault(row["rho"], {})[row["seed"]] = row["accuracy"]
    of = {rho: _mean(list(found.values())) for rho, found in by_rho.items()}
    best = max((rho for rho in of if rho), key=lambda rho: of[rho].mean)
    proposed = min(of, key=lambda rho: abs(rho - sweep["rho"]))
    pairs = [by_rho[proposed][seed] - by_rho[0.0][seed] for seed in by_rho[0.0]]
    return Judged(
        task=task,
        sgd=of[0.0],
        best=best,
        of_best=of[best],
        proposed=proposed,
        of_proposed=of[proposed],
        cost=sweep["gradients"] / steps,
        change=_mean(pairs),
    )


def table(judged: Sequence[Judged]) -> str:
    """Return a table in Markdown."""
    head = (
        "| task | SGD | grid's best | sweep's proposal | over SGD | cost of the sweep |\n"
        "|---|---|---|---|---|---|\n"
    )
    lines = [
        f"| {x.task} | {x.sgd} | {x.of_best} ({x.best:g}) | {x.of_proposed}"
        f" ({x.proposed:g}) | {_signed(x.change)} | {x.cost:.1f} trainings |\n"
        for x in judged
    ]
    return head + "".join(lines)


def verdict(judged: Sequence[Judged]) -> str:
    """Return in words where a proposal does harm, and where it misses the best."""
    lines = []
    for does, asked in (
        (lambda x: x.does_no_harm, "behind SGD by more than two standard errors"),
        (lambda x: x.is_near_the_best, "more than two points behind the grid's best"),
    ):
        failing = [x.task for x in judged if not does(x)]
        where = f"on {'; '.join(failing)}" if failing else "on no task"
        lines.append(f"- The proposal is {asked} {where}.\n")
    return "".join(lines)


def _signed(x: Accuracy) -> str:
    return f"{100 * x.mean:+.1f} ± {100 * x.error:.1f}"


def _mean(values: Sequence[float]) -> Accuracy:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Accuracy(statistics.mean(values), spread / len(values) ** 0.5)
