"""The folder of a training run: whose it is, and how to start over."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

from lwsam_bench._errors import UserError
from lwsam_bench.config import differences, TrainConfig


CONFIG, METRICS, CHECKPOINTS = "config.json", "metrics.jsonl", "checkpoints"
_NOT_COMPARED = ("weights",)  # a path; what the file holds is part of the identity


def check_same_run(out: pathlib.Path, config: TrainConfig) -> dict[str, Any] | None:
    """Return the record of the run in a folder, if there is one; refuse another run."""
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
    refuse_other_run(out, old, dataclasses.asdict(config))
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
    """Return a configuration as JSON has it, with the fields that it does not know.

    A run from before a field was there is one with the field's default.
    """
    known = {
        field.name: field.default
        for field in dataclasses.fields(TrainConfig)
        if field.default is not dataclasses.MISSING
    }
    whole = json.loads(json.dumps({**known, **config}))
    return {name: value for name, value in whole.items() if name not in _NOT_COMPARED}


def start_over(out: pathlib.Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    try:
        # First the configuration: without it the rest belongs to no run.
        for name in (CONFIG, METRICS):
            (out / name).unlink(missing_ok=True)
        if (out / CHECKPOINTS).exists():
            shutil.rmtree(out / CHECKPOINTS)
    except OSError as error:
        raise UserError(f"cannot replace the run in {out}: {error}") from error
