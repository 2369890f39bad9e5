"""Attempts at several runs at one time, each a process of its own on a GPU in turn."""

import collections
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from lwsam_bench.paper.runs.attempts import request, Result, STOPPED
from lwsam_bench.paper.runs.outcome import FAILED, record_failure
from lwsam_bench.support.stopping import Stop
from lwsam_bench.training.config import RunOptions, TrainConfig


LOG = "log.txt"
_POLL = 0.2  # seconds

Work = tuple[TrainConfig, RunOptions]


class Pool:
    """Runs attempts side by side; as an iterator it yields them as they end.

    Args:
      jobs: How many at one time.
      stop: Notes signals; once it has one no attempt is started any more, and those
        under way are told to stop.
    """

    def __init__(self, jobs: int, stop: Stop):
        self._jobs, self._stop = jobs, stop
        self._devices = visible_devices()
        self._under_way: dict[subprocess.Popen[bytes], tuple[Work, int]] = {}
        self._killed: collections.Counter[str] = collections.Counter()  # by folder

    def run(self, todo: collections.deque[Work]) -> Iterator[tuple[Work, Result]]:
        """Yield each piece of work with its result; take more from `todo` meanwhile.

        The caller may remove from `todo` what has become pointless.
        """
        told = False
        with tempfile.TemporaryDirectory() as name, self._cleaning_up():
            folder = pathlib.Path(name)
            while (todo and not self._stop.signal) or self._under_way:
                while todo and not self._stop.signal and self._free():
                    self._start(todo.popleft(), folder, self._free()[0])
                if self._stop.signal and not told:
                    told = True
                    for process in self._under_way:
                        process.send_signal(self._stop.signal)
                ended = [p for p in self._under_way if p.poll() is not None]
                for process in ended:
                    work, place = self._under_way.pop(process)
                    result = self._result(process, work, folder / str(place))
                    if result is None:
                        todo.appendleft(work)
                    else:
                        yield work, result
                if not ended:
                    time.sleep(_POLL)

    def _free(self) -> list[int]:
        taken = {place for _, place in self._under_way.values()}
        return [place for place in range(self._jobs) if place not in taken]

    def _start(self, work: Work, folder: pathlib.Path, place: int) -> None:
        config, options = work
        out = pathlib.Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (folder / str(place)).unlink(missing_ok=True)
        with (out / LOG).open("ab") as log:
            process = subprocess.Popen(
                request(config, options, folder / str(place)),
                env=environment(place, self._jobs, self._devices),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C on the terminal is for this process, which passes it on.
                start_new_session=True,
            )
        self._under_way[process] = (work, place)

    def _result(
        self, process: subprocess.Popen[bytes], work: Work, path: pathlib.Path
    ) -> Result | None:
        """Return what a process left, or record that it ended without leaving it.

        None: it was killed for the first time, and may go on from its last checkpoint.
        """
        try:
            return Result(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            pass
        code = process.returncode
        if self._stop.signal:
            return Result(STOPPED, code=128 + self._stop.signal)
        out = pathlib.Path(work[1].out)
        how = f"exit code {code}"
        if code < 0:
            self._killed[work[1].out] += 1
            if self._killed[work[1].out] == 1:
                return None
            how = f"killed by signal {-code}"
            with contextlib.suppress(ValueError):
                how += f" ({signal.Signals(-code).name})"
        reason = f"its process ended early: {how}; see {LOG} in its folder"
        record_failure(out, reason)
        return Result(FAILED, reason)

    @contextlib.contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        """Leave no process behind, whatever happens here."""
        try:
            yield
        finally:
            for process in self._under_way:
                process.terminate()
            for process in self._under_way:
                process.wait()


def visible_devices() -> tuple[str, ...]:
    """Return the GPUs that processes may be given, by the names CUDA has for them.

    JAX is not asked: this process would take memory on all of them.
    """
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(filter(None, named.split(",")))
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(str(i) for i, _ in enumerate(listed.strip().splitlines()))


def environment(place: int, jobs: int, devices: Sequence[str]) -> dict[str, str]:
    """Return the environment of the process at a place among those under way."""
    path = os.pathsep.join(filter(None, sys.path))  # as this process imports
    values = {**os.environ, "PYTHONPATH": path}
    if devices:
        values["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
        if jobs > len(devices):  # they share one, so none may take all its memory
            values.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return values
