"""Training runs as processes of their own, watched from outside."""

import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence

from lwsam_bench.faults.forked import Forked
from lwsam_bench.support.errors import UserError


PATIENCE = 300  # seconds without an end, or a step
_GOES_ON = re.compile(r"going on from step (\d+)")


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that has come to its end.

    Attributes:
      code: Its exit code; minus the number of the signal that ended it.
      output: What it printed.
      saved: The newest checkpoint that was ever seen in its folder; 0 for none.
      reached: The last step of which it has left a row.
    """

    code: int
    output: str
    saved: int
    reached: int

    @property
    def began(self) -> int:
        """The step from which it went on; 0 if it says of none."""
        found = _GOES_ON.search(self.output)
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Trainer:
    """How the runs of a test are started.

    Attributes:
      arguments: Of `lwsam-bench train`, but for `--out`.
      cache: Folder of compiled programs that all of them share.
    """

    arguments: tuple[str, ...]
    cache: pathlib.Path

    def start(self, out: pathlib.Path) -> "Watched":
        """Start a run in a folder."""
        arguments = ["train", *self.arguments, "--out", str(out)]
        return Watched(Forked("commands.cli", arguments, self.cache), out)

    def part(self, arguments: Sequence[str], devices: int) -> Forked:
        """Start a part of a run on so many devices; see `on_devices`."""
        return Forked("faults.on_devices", arguments, self.cache, devices)

    def run(self, out: pathlib.Path) -> Ended:
        """Run to whatever end."""
        return self.start(out).wait()


class Watched:
    """A run under way, and what its folder has shown so far."""

    def __init__(self, process: Forked, out: pathlib.Path):
        self.process, self.out = process, out
        self.began = time.monotonic()
        self.saved = newest(out)

    def look(self) -> bool:
        """Note what is saved by now; return whether the process is alive."""
        self.saved = max(self.saved, newest(self.out))
        if time.monotonic() - self.began > PATIENCE:
            raise UserError(f"a run does not come to its end: {self.process.end()}")
        return self.process.poll() is None

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so, or the process has ended."""
        while self.look() and not condition():
            time.sleep(0.002)

    def wait(self, signal_number: int | None = None) -> Ended:
        """Send a signal, if one is given, and wait for the end."""
        if signal_number is not None:
            self.process.send(signal_number)
        ended = self.process.wait(PATIENCE)
        if ended is None:
            raise UserError(f"a run does not come to its end: {self.process.end()}")
        self.saved = max(self.saved, newest(self.out))
        return Ended(*ended, self.saved, rows_done(self.out))


def saved(out: pathlib.Path) -> list[int]:
    """Return the steps of the checkpoints in a folder that are said to be whole."""
    try:
        names = os.listdir(out / "checkpoints")
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isdigit())


def newest(out: pathlib.Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    return max(saved(out), default=0)


def rows_done(out: pathlib.Path) -> int:
    """Return the last step of which there is a whole row of kind `train`."""
    try:
        text = (out / "metrics.jsonl").read_bytes()
    except OSError:
        return 0
    return text.count(b'{"kind": "train"')


def unfinished(out: pathlib.Path) -> set[str]:
    """Return the checkpoints that are being written, or were when a process died."""
    try:
        names = os.listdir(out / "checkpoints")
    except OSError:
        return set()
    return {name for name in names if not name.isdigit()}
