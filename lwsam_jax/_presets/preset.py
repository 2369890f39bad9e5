"""What all presets share: parts of the caller's own replace those of the preset."""

from __future__ import annotations

from typing import Any

from .._method import Method


def preset(parts: dict[str, Any], **own: Any) -> Method:
    """Returns the `Method` of a preset's own parts, but for those of the caller."""
    return Method(**{**own, **parts})
