"""The rows of a run as TensorBoard shows them."""

import math
import pathlib
from typing import Self

from tensorboardX import SummaryWriter

from lwsam_bench.support.rows import Row


POINTS = 1_000  # in a curve; more than that TensorBoard does not draw
_TRAIN = ("loss", "perturbed_loss", "accuracy", "lr", "overhead")
_NO_CURVE = ("kind", "step", "epoch")


class Board:
    """Writes the numbers of rows into an event file.

    Args:
      folder: Folder of the event files of the run.
      done: Steps done so far: what an interrupted run logged of later ones is hidden.
      total: Steps of the whole run; of a long one not every row is drawn.
    """

    def __init__(self, folder: pathlib.Path, done: int, total: int):
        self._writer = SummaryWriter(
            str(folder),
            purge_step=done + 1,  # it hides this step, too
            filename_suffix=f".{done}",  # files of one second have one name
        )
        self._apart, self._next = max(1, total // POINTS), done

    def write(self, row: Row) -> None:
        """Add the numbers of a row of kind `train` or `test`."""
        step, kind = row["step"], row["kind"]
        names = [name for name in row if name not in _NO_CURVE]
        if kind == "train":
            if step < self._next:
                return
            self._next = step + self._apart
            names = list(_TRAIN)
        for name in names:
            if math.isfinite(row[name]):
                self._writer.add_scalar(f"{kind}/{name}", row[name], step)

    def flush(self) -> None:
        """Hand over to the disk what was added."""
        self._writer.flush()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._writer.close()
