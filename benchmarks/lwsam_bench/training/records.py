"""Where the rows of a run go: into `metrics.jsonl`, and to TensorBoard."""

import contextlib
import pathlib
from typing import Self

from lwsam_bench.support.rows import MetricsFile, Row
from lwsam_bench.support.tensorboard import Board
from lwsam_bench.training import run_folder


class Records:
    """Writes the rows of a run, in one process; in the others it does nothing.

    Args:
      out: Folder of the run.
      done: Steps done so far; rows of later ones are cut away.
      total: Steps of the whole run.
      writes: Whether it is this process that writes.
    """

    def __init__(self, out: pathlib.Path, done: int, total: int, writes: bool):
        self._stack = contextlib.ExitStack()
        self._metrics: MetricsFile | None = None
        self._board: Board | None = None
        if writes:
            enter = self._stack.enter_context
            self._metrics = enter(MetricsFile(out / run_folder.METRICS, done or None))
            self._board = enter(Board(out / run_folder.TENSORBOARD, done, total))

    def write(self, row: Row) -> None:
        """Add a row."""
        if self._metrics is not None:
            self._metrics.write(row)
        if self._board is not None and row["kind"] != "end":
            self._board.write(row)

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        if self._metrics is not None:
            self._metrics.sync()
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._stack.close()
