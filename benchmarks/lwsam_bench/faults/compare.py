"""Whether two runs are one: the state at the end bit by bit, and every row."""

import pathlib
from collections.abc import Mapping

import numpy as np
import orbax.checkpoint as ocp

from lwsam_bench.faults.trainer import newest
from lwsam_bench.support.rows import read_rows, Row


TIMES = ("seconds", "compile_seconds")


def arrays(out: pathlib.Path) -> Mapping[str, np.ndarray]:
    """Return the last checkpoint as it is written, by no code that writes it."""
    folder = (out / "checkpoints" / str(newest(out)) / "state").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder)
    return {name: np.asarray(x) for name, x in state.items()}


def differences(out: pathlib.Path, reference: pathlib.Path) -> list[str]:
    """Return in what a run differs from the unbroken one: nothing, if all is well."""
    got, expected = arrays(out), arrays(reference)
    found = [f"no array {name}" for name in expected.keys() ^ got.keys()]
    found += [
        f"the array {name}"
        for name in expected.keys() & got.keys()
        if expected[name].tobytes() != got[name].tobytes()
    ]
    mine, others = _rows(out), _rows(reference)
    if len(mine) != len(others):
        found.append(f"{len(mine)} rows and not {len(others)}")
    pairs = zip(mine, others, strict=False)
    found += [f"the row {a}" for a, b in pairs if a != b]
    return found


def _rows(out: pathlib.Path) -> list[Row]:
    """Return the rows of a run but for the time that they took."""
    rows = read_rows(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def largest_difference(
    some: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]
) -> float:
    """Return the largest difference of two states, over the norm of each array."""
    found = [0.0]
    for name, x in others.items():
        if np.issubdtype(x.dtype, np.floating):
            size = np.linalg.norm(x.ravel())
            error = np.linalg.norm((some[name] - x).ravel())
            found.append(float(error / size) if size else float(error))
    return max(found)
