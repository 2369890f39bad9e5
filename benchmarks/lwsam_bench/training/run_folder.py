"""The folder of a training run: whose it is, who may write, how to start over."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import filelock

from lwsam_bench.support.errors import UserError
from lwsam_bench.training import earlier
from lwsam_bench.training.config import differences, TrainConfig


CONFIG, METRICS, CHECKPOINTS = "config.json", "metrics.jsonl", "checkpoints"
TENSORBOARD, LOCK = "tensorboard", ".lock"
_REMOVED = ".removed"
_NOT_COMPARED = ("weights",)  # a path; what the file holds is part of the identity


@contextlib.contextmanager
def lock(out: pathlib.Path) -> Iterator[None]:
    """Keep other processes from writing the run in a folder.

    Raises:
      UserError: If one does.
    """
    file = filelock.FileLock(out / LOCK)
    try:
        file.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(
            f"another process is writing the run in {out}: wait for it to end, or use"
            " another --out"
        ) from error
    except OSError as error:
        raise UserError(f"cannot lock {out}: {error}") from error
    try:
        yield
    finally:
        file.release()


def identity(
    config: TrainConfig, data: str | None, weights: str | None
) -> dict[str, Any]:
    """Return what makes two runs the same run.

    Args:
      config: The run.
      data: Fingerprint of the training data, if known.
      weights: Digest of the file of published weights, if there is one.
    """
    found = {"data_sha256": data, "weights_sha256": weights}
    known = {name: value for name, value in found.items() if value is not None}
    return {**dataclasses.asdict(config), **known}


def check_same_run(
    out: pathlib.Path, config: TrainConfig, weights: str | None = None
) -> dict[str, Any] | None:
    """Return the record of the run in a folder, if there is one; refuse another run.

    Args:
      out: The folder.
      config: The run that is wanted.
      weights: As for `identity`; not compared where one of the two is not known.
    """
    path = out / CONFIG
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        old = record["config"]
        record["provenance"] = list(record["provenance"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Use another --out, or --no-resume to"
            " start over"
        ) from error
    if weights is not None and "weights_sha256" in record:
        old = {**old, "weights_sha256": record["weights_sha256"]}
    else:
        weights = None
    refuse_other_run(out, old, identity(config, None, weights))
    return record


def refuse_other_run(
    out: pathlib.Path, old: dict[str, Any], new: dict[str, Any]
) -> None:
    """Raise a UserError that names each entry in which two configurations differ."""
    changes = differences(_comparable(old), _comparable(new))
    if changes:
        raise UserError(
            f"{out} holds a run with another configuration ({'; '.join(changes)}). Use"
            " another --out, or --no-resume to replace that run"
        )


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as JSON has it, whichever version it is from."""
    whole = json.loads(json.dumps(earlier.config(config)))
    return {name: value for name, value in whole.items() if name not in _NOT_COMPARED}


def start_over(out: pathlib.Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    try:
        # Removing a tree takes its time. Moved away at once, checkpoints are all there or
        # all gone, whenever this is cut off; a run without any begins at its first step.
        removed = out / _REMOVED
        shutil.rmtree(removed, ignore_errors=True)
        removed.mkdir()
        for name in (CHECKPOINTS, METRICS, TENSORBOARD, CONFIG):
            if (out / name).exists():
                (out / name).replace(removed / name)
        shutil.rmtree(removed)
    except OSError as error:
        raise UserError(f"cannot replace the run in {out}: {error}") from error
