"""The rows of a tuning on disk: one a run, no run twice, whatever kills the command."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import MetricsFile, read_rows, Row
from lwsam_bench.training.config import differences
from lwsam_bench.tuning.method import Method
from lwsam_bench.tuning.protocol import Protocol, Request
from lwsam_bench.tuning.tasks import Task


ROWS = "rows.jsonl"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method in one set of draws: what one process does in one piece."""

    method: Method
    draws: int

    def holds(self, row: Row) -> bool:
        """Whether a row is of it."""
        return (row["method"], row["draws"]) == (self.method.name, self.draws)

    def row(self, request: Request, found: Row, task: Task, trials: int) -> Row:
        """Return the row of a run, given what was measured."""
        return {
            "kind": "run",
            "method": self.method.name,
            "draws": self.draws,
            "phase": request.phase,
            "trial": request.trial,
            "seed": request.seed,
            "length": request.length,
            "config": dict(request.config),
            "ranges": {n: [x.low, x.high] for n, x in request.space.items()},
            **found,
            "trials": trials,
            "task": dataclasses.asdict(task),
        }


def key(row: Row) -> tuple[Any, ...]:
    """Return what no other row of a file has."""
    place = (row["method"], row["draws"])
    return *place, row["phase"], row["trial"], row["seed"], row["length"]


def lookup(known: Sequence[Row], request: Request) -> Row | None:
    """Return the row that a run left among those of its cell.

    Raises:
      UserError: If it had another configuration.
    """
    for row in known:
        if (row["phase"], row["trial"], row["seed"], row["length"]) == request.key:
            if row["config"] != dict(request.config):
                changes = differences(row["config"], dict(request.config))
                raise UserError(
                    f"the rows of {row['method']} were drawn from other ranges"
                    f" ({'; '.join(changes)}); choose another --out"
                )
            return row
    return None


class Results:
    """The rows of a folder; holds the file open.

    Args:
      folder: The folder.
      task: The task of the runs.
      protocol: How much is tried.

    Raises:
      UserError: If there are rows of another task or of another number of trials.
    """

    def __init__(self, folder: pathlib.Path, task: Task, protocol: Protocol):
        self._path = folder / ROWS
        self.rows = list(read(self._path))
        wanted = {**dataclasses.asdict(task), "trials": protocol.trials}
        wanted["steps"] = list(task.steps)  # as JSON has it
        # Older rows lack what a task has got since, and had it as it is by default.
        usual = {
            x.name: x.default
            for x in dataclasses.fields(Task)
            if x.default is not dataclasses.MISSING
        }
        for row in self.rows:
            found = {**usual, **row["task"], "trials": row["trials"]}
            changes = differences(found, wanted)
            if changes:
                raise UserError(
                    f"{self._path} holds runs of another tuning"
                    f" ({'; '.join(changes)}); choose another --out"
                )
        self._keys = {key(row) for row in self.rows}
        self._file = MetricsFile(self._path, keep_until=0)

    def add(self, row: Row) -> None:
        """Write a row, unless that run is there."""
        if key(row) in self._keys:
            return
        self._keys.add(key(row))
        self.rows.append(row)
        self._file.write(row)

    def close(self) -> None:
        """Wait until all rows are on the disk."""
        self._file.sync()
        self._file.__exit__()


def read(path: pathlib.Path) -> Iterator[Row]:
    """Yield the rows of a file, each run once, up to one that was torn apart."""
    seen = set()
    for row in read_rows(path):
        if key(row) not in seen:
            seen.add(key(row))
            yield row
