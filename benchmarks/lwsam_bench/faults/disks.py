"""Disks that fail: torn files, flipped bits, no space, no right to write."""

import contextlib
import os
import pathlib
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator

from lwsam_bench.faults.compare import differences
from lwsam_bench.faults.trainer import Ended, newest, rows_done, saved, Trainer
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row


_REFUSED = 2  # exit code of an error that the user can mend


def damage(
    trainer: Trainer,
    half: pathlib.Path,
    out: pathlib.Path,
    reference: pathlib.Path,
    name: str,
) -> Row:
    """Damage the newest checkpoint of a run that was stopped half way, and go on.

    Args:
      trainer: Of the run.
      half: The run that was stopped; copied.
      out: For the copy.
      reference: The same run, unbroken.
      name: One of `DAMAGES`.
    """
    shutil.copytree(half, out)
    before = saved(out)
    files = [
        p for p in (out / "checkpoints" / str(before[-1])).rglob("*") if p.is_file()
    ]
    DAMAGES[name](max(files, key=lambda path: path.stat().st_size))
    ended = trainer.run(out)
    _must_end(ended)
    return {
        "fault": name,
        "how": f"the newest of the checkpoints {', '.join(map(str, before))}",
        "restarts": 1,
        # What can still be read is the one before; what it says is kept.
        "lost": max(0, before[-2] - ended.began),
        "repeated": rows_done(half) - ended.began,
        "differences": differences(out, reference),
    }


def _truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[pathlib.Path], None]] = {
    "truncated checkpoint": _truncate,
    "flipped bit": _flip,
}


def fill(trainer: Trainer, out: pathlib.Path, reference: pathlib.Path) -> Row:
    """Run where there is room for one checkpoint and a half; then make room."""
    one = _blocks(reference / "checkpoints" / str(newest(reference)))
    with _small_disk(out, one * 3 // 2) as disk:
        first = disk.run(trainer)
        kept = newest(out)
        again = disk.run(trainer)
        disk.grow()
        ended = trainer.run(out)
        _must_refuse(first, "no space")
        _must_refuse(again, "no space")
        _must_end(ended)
        return {
            "fault": "full disk",
            "how": disk.how,
            "restarts": 2,
            "lost": max(0, max(first.saved, again.saved, kept) - ended.began),
            "repeated": max(first.reached, again.reached) - ended.began,
            "differences": differences(out, reference),
        }


def forbid(trainer: Trainer, out: pathlib.Path, reference: pathlib.Path) -> Row:
    """Take away the right to write in the midst of a run, and give it back."""
    with _guarded(out) as guard:
        if not guard.can_close:
            raise UserError("root may write anywhere: run it as another user")
        run = trainer.start(out)
        run.until(lambda: newest(out) > 0)
        guard.close()
        first = run.wait()
        again = trainer.run(out)
        guard.open()
        ended = trainer.run(out)
        _must_refuse(first, "read-only")
        _must_refuse(again, "read-only")
        _must_end(ended)
        return {
            "fault": "read-only folder",
            "how": guard.how,
            "restarts": 2,
            "lost": max(0, max(first.saved, again.saved) - ended.began),
            "repeated": max(first.reached, again.reached) - ended.began,
            "differences": differences(out, reference),
        }


def _must_refuse(ended: Ended, what: str) -> None:
    """Raise unless a run ended in a message of ours, and no traceback."""
    is_ours = ended.code == _REFUSED and "lwsam-bench: cannot" in ended.output
    if not is_ours or "Traceback" in ended.output:
        raise UserError(f"{what}, and a run ends with {ended.code}: {ended.output}")


def _must_end(ended: Ended) -> None:
    if ended.code:
        raise UserError(f"a run does not go on ({ended.code}): {ended.output}")


def _blocks(folder: pathlib.Path) -> int:
    """Return the bytes that a folder takes on a disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


class _Disk:
    """A file system of its own, or where none may be mounted a limit on files."""

    def __init__(self, out: pathlib.Path, size: int):
        self._out, self._size = out, size
        out.mkdir(parents=True)
        self.is_mounted = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(out))
        self.how = (
            f"a tmpfs of {size // 1024} KiB"
            if self.is_mounted
            else "RLIMIT_FSIZE of the process"
        )

    def run(self, trainer: Trainer) -> Ended:
        """Run where no file may be as large as the largest of a checkpoint."""
        run = trainer.start(self._out)
        if not self.is_mounted:
            most = self._size // 3
            resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (most, most))
        return run.wait()

    def grow(self) -> None:
        """Make room."""
        if self.is_mounted:
            _mount("-o", f"remount,size={100 * self._size}", str(self._out))


@contextlib.contextmanager
def _small_disk(out: pathlib.Path, size: int) -> Iterator[_Disk]:
    disk = _Disk(out, size)
    try:
        yield disk
    finally:
        if disk.is_mounted:
            subprocess.run(["umount", str(out)], check=True)


class _Guard:
    """Closes the folder of the checkpoints to whoever would write there."""

    def __init__(self, out: pathlib.Path):
        self._folder = out / "checkpoints"
        self._folder.mkdir(parents=True)
        self.is_mounted = _mount("-t", "tmpfs", "tmpfs", str(self._folder))
        self.how = "a file system remounted" if self.is_mounted else "chmod a-w"
        self.how += " in the midst of the run"
        self.can_close = self.is_mounted or os.geteuid() != 0

    def close(self) -> None:
        """Forbid to write."""
        if not self.is_mounted:
            self._folder.chmod(0o555)
            return
        # Busy while a checkpoint is being written.
        while not _mount("-o", "remount,ro", str(self._folder)):
            pass

    def open(self) -> None:
        """Allow it again."""
        if not self.is_mounted:
            self._folder.chmod(0o755)
        else:
            _mount("-o", "remount,rw", str(self._folder))


@contextlib.contextmanager
def _guarded(out: pathlib.Path) -> Iterator[_Guard]:
    guard = _Guard(out)
    try:
        yield guard
    finally:
        guard.open()
        if guard.is_mounted:
            subprocess.run(["umount", str(out / "checkpoints")], check=True)


def _mount(*arguments: str) -> bool:
    """Return whether it could be mounted; only the administrator may."""
    if shutil.which("mount") is None:
        return False
    done = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    return done.returncode == 0


def stop_half_way(trainer: Trainer, out: pathlib.Path, steps: int) -> None:
    """Run to half of the steps, and leave as a run that is asked to end."""
    run = trainer.start(out)
    run.until(lambda: rows_done(out) >= steps // 2)
    ended = run.wait(signal.SIGTERM)
    if ended.code != 128 + signal.SIGTERM or len(saved(out)) < 2:
        raise UserError(f"a run that should stop half way did not: {ended.output}")
