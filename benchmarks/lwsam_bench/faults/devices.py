"""Restarts onto another number of devices."""

import pathlib

from lwsam_bench.faults.compare import arrays, largest_difference
from lwsam_bench.faults.trainer import newest, PATIENCE, Trainer
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row


COUNTS = (4, 2, 1)  # devices, one after the other
TOLERANCE = 1e-4  # of the norm of each array, in float32


def change(trainer: Trainer, folder: pathlib.Path, steps: int) -> Row:
    """Go on with one run on 4, 2 and 1 devices, and compare with 1 from the start."""
    _part(trainer, folder / "unbroken", steps, 1)
    out, lost = folder / "changed", 0
    for i, count in enumerate(COUNTS):
        promised = newest(out)
        output = _part(trainer, out, steps * (i + 1) // len(COUNTS), count)
        if promised and f"going on from step {promised} on {count}" not in output:
            lost += promised
    difference = largest_difference(arrays(out), arrays(folder / "unbroken"))
    too_far = [f"arrays differ by {difference:.1e}"] if difference > TOLERANCE else []
    counts = ", ".join(map(str, COUNTS))
    return {
        "fault": "other devices",
        "how": f"{counts} devices one after the other; arrays within {TOLERANCE:g}",
        "restarts": len(COUNTS) - 1,
        "lost": lost,
        "repeated": 0,
        "differences": too_far,
        "largest": difference,
    }


def _part(trainer: Trainer, out: pathlib.Path, until: int, count: int) -> str:
    out.mkdir(parents=True, exist_ok=True)
    process = trainer.part([str(out), str(until)], count)
    ended = process.wait(PATIENCE)
    if ended is None or ended[0]:
        output = process.end() if ended is None else ended[1]
        raise UserError(f"a run on {count} devices fails: {output}")
    return ended[1]
