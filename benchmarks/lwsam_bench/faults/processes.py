"""One process of several is killed: the others end too, and all of them go on."""

import pathlib
import random
import shutil
import signal
import socket
import time
from collections.abc import Sequence

from lwsam_bench.faults.compare import arrays, largest_difference
from lwsam_bench.faults.forked import Forked
from lwsam_bench.faults.trainer import newest, PATIENCE, Trainer
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row


EVERY = 5  # steps between two checkpoints
LIMIT = 60  # seconds within which the others have ended
TOLERANCE = 1e-4  # of the norm of each array, in float32


class Together:
    """A run of several processes, each with its share of every batch.

    Args:
      trainer: Starts them.
      folder: For the runs.
      count: Processes.
      steps: Of a run.
    """

    def __init__(self, trainer: Trainer, folder: pathlib.Path, count: int, steps: int):
        self._trainer, self._count, self._steps = trainer, count, steps
        self._unbroken, self._broken = folder / "unbroken", folder / "broken"
        self._left = folder / "left"  # by the last kill

    def kill_one(self, victims: Sequence[int], seed: int = 0) -> Row:
        """Kill one of the processes, and let all of them go on.

        Args:
          victims: Which one, one time after the other; 0 is the coordinator.
          seed: Of the moments.
        """
        draw = random.Random(seed)
        self._all(self._unbroken)
        saves = range(EVERY, self._steps - EVERY, EVERY)
        promised = lost = 0
        slowest = 0.0
        for victim, target in zip(
            victims, sorted(draw.sample(saves, len(victims))), strict=True
        ):
            processes = self._start(self._broken, self._count, self._steps)
            _until(self._broken, target, processes)
            time.sleep(draw.uniform(0, 0.05))
            processes[victim].send(signal.SIGKILL)
            began = time.monotonic()
            codes, outputs = _ends(processes, LIMIT)
            slowest = max(slowest, time.monotonic() - began)
            if codes[victim] != -signal.SIGKILL or 0 in codes:
                raise UserError(f"process {victim} was killed, and all end so: {codes}")
            lost += _lost(promised, outputs[:1])
            promised = newest(self._broken)
        shutil.copytree(self._broken, self._left)
        lost += _lost(promised, self._all(self._broken))
        got, expected = arrays(self._broken), arrays(self._unbroken)
        return {
            "fault": "one process killed",
            "how": f"SIGKILL for process {', then '.join(map(str, victims))} of"
            f" {self._count}; the others end with an error within {slowest:.0f} s",
            "restarts": len(victims),
            "lost": lost,
            "repeated": 0,
            "differences": [
                f"the array {name}"
                for name, x in expected.items()
                if name not in got or got[name].tobytes() != x.tobytes()
            ],
        }

    def fewer(self, counts: Sequence[int]) -> Row:
        """Go on in fewer processes, from where the last kill has left the run."""
        lost, first = 0, newest(self._left)
        for i, count in enumerate(counts):
            promised = newest(self._left)
            until = first + (self._steps - first) * (i + 1) // len(counts)
            lost += _lost(promised, _must_end(self._start(self._left, count, until)))
        difference = largest_difference(arrays(self._left), arrays(self._unbroken))
        is_far = difference > TOLERANCE
        return {
            "fault": "fewer processes",
            "how": f"{', then '.join(map(str, counts))} of {self._count} go on after"
            f" that; arrays within {TOLERANCE:g}",
            "restarts": len(counts),
            "lost": lost,
            "repeated": 0,
            "differences": [f"arrays differ by {difference:.1e}"] if is_far else [],
            "largest": difference,
        }

    def _all(self, out: pathlib.Path) -> list[str]:
        return _must_end(self._start(out, self._count, self._steps))

    def _start(self, out: pathlib.Path, count: int, until: int) -> list[Forked]:
        out.mkdir(parents=True, exist_ok=True)
        arguments = [str(out), str(until), "--every", str(EVERY)]
        if count == 1:
            return [self._trainer.part(arguments, 1)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        arguments += ["--coordinator", f"localhost:{port}"]
        arguments += ["--num-processes", str(count)]
        return [
            self._trainer.part([*arguments, "--process-id", str(number)], 1)
            for number in range(count)
        ]


def _lost(promised: int, outputs: Sequence[str]) -> int:
    """Return the steps that were saved, and that the next run did not go on from."""
    said = f"going on from step {promised} "
    return 0 if not promised or all(said in text for text in outputs) else promised


def _until(out: pathlib.Path, target: int, processes: Sequence[Forked]) -> None:
    """Wait for a checkpoint, or the end of a process."""
    deadline = time.monotonic() + PATIENCE
    while newest(out) < target and all(p.poll() is None for p in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)


def _ends(processes: Sequence[Forked], seconds: float) -> tuple[list[int], list[str]]:
    """Return exit codes and outputs; a process that has not ended by then is an error."""
    deadline = time.monotonic() + seconds
    ends = [
        process.wait(max(0.0, deadline - time.monotonic())) for process in processes
    ]
    late = [p.end() for p, end in zip(processes, ends, strict=True) if end is None]
    if late:
        raise UserError(f"processes do not end within {seconds} s: {late[0]}")
    ended = [end for end in ends if end is not None]
    return [code for code, _ in ended], [output for _, output in ended]


def _must_end(processes: Sequence[Forked]) -> list[str]:
    codes, outputs = _ends(processes, PATIENCE)
    for code, output in zip(codes, outputs, strict=True):
        if code:
            raise UserError(f"a run in {len(processes)} processes fails: {output}")
    return outputs
