"""What earlier versions wrote, read as this one means it; no file is rewritten.

Before configurations had the field `ascent`, `gsam` was the name of generalised SAM. Now
it is that of the surrogate gap.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lwsam_bench.support.rows import Row
from lwsam_bench.training.config import TrainConfig


# What methods are called in the names of run folders: those that are there stay in use.
NAMES_OF_FOLDERS = {"generalized_sam": "gsam", "gsam": "surrogate_gap"}

_RENAMED = {"gsam": "generalized_sam"}


def config(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that was saved, as one of this version.

    A run from before a field was there is one with the field's default.
    """
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(TrainConfig)
        if field.default is not dataclasses.MISSING
    }
    found = {**defaults, **record}
    if _is_early(record):
        found["method"] = _now(found["method"])
    return found


def race(row: Row) -> Row:
    """Return a row of Table 2 with its methods called as they are now."""
    saved = row.get("configs", {})
    is_early = any(map(_is_early, saved.values()))
    name = lambda lane: _now(lane) if is_early else lane
    found = {**row, "configs": {name(lane): config(saved[lane]) for lane in saved}}
    if "methods" in row:  # a race that failed has none
        found["methods"] = {name(lane): x for lane, x in row["methods"].items()}
    return found


def _is_early(record: Mapping[str, Any]) -> bool:
    return "ascent" not in record


def _now(method: str) -> str:
    return _RENAMED.get(method, method)
