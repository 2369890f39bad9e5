"""Static forms of a selection: a tuple of names, or a `Cover`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _checks
from .layers import Layers


@dataclasses.dataclass(frozen=True)
class Cover:
    """A static set of layers to compile for; a mask picks among them at run time.

    Hashable: pass it to a jitted function as a static argument. `lwsam.selection(state,
    cover="depth")` gives the cover of every layer from the input-most selected one on,
    so that at most L + 1 different covers occur for L layers, at the price of weight
    gradients of unselected layers above the cut.

    Attributes:
      names: Names of the layers, in pytree order; empty: the plain step.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", _tuple_of_names("Cover", "names", self.names))

    def __len__(self) -> int:
        """Returns the number of layers that are compiled for."""
        return len(self.names)


def _tuple_of_names(who: str, argument: str, names: Any) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        remedy = (
            "Pass a tuple of layer names such as ('Dense_0',), or lwsam.Cover(...)."
        )
        raise _checks.type_error(
            who, argument, "a tuple of layer names", repr(names), remedy
        )
    return tuple(names)


def static_selection(
    who: str, selection: Any, layers: Layers
) -> tuple[tuple[int, ...], bool]:
    """Returns the layers that a static selection names, and whether it is a cover."""
    is_cover = isinstance(selection, Cover)
    if selection is None:
        remedy = "Pass a tuple of names, or lwsam.selection(opt_state)."
        raise _checks.type_error(
            who, "selection", "a tuple of layer names", None, remedy
        )
    names = (
        selection.names if is_cover else _tuple_of_names(who, "selection", selection)
    )
    return layers.indices(who, names), is_cover


def depth_cover(layers: Layers, mask: np.ndarray) -> Cover:
    """Returns the cover of every layer from the input-most masked one on."""
    if not mask.any():
        return Cover(())
    cut = min(d for d, chosen in zip(layers.depth, mask, strict=True) if chosen)
    return Cover(layers.from_depth(cut))
