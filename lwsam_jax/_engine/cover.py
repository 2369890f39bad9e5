"""Static forms of a selection: a tuple of names, a `Cover`, and pieces of leaves."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


class Range(NamedTuple):
    """A part of a leaf, from the first perturbed index of a stack to the last.

    Attributes:
      axis: The axis of the stack.
      start: The first index.
      stop: The index behind the last.
      length: Of the whole stack.
    """

    axis: int
    start: int
    stop: int
    length: int

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """The parts of the leaf, in order and without the empty ones."""
        cuts = (0, self.start, self.stop, self.length)
        return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]

    def is_chosen(self, bounds: tuple[int, int]) -> bool:
        """Whether a part is the perturbed one."""
        return bounds == (self.start, self.stop)


class Pieces(NamedTuple):
    """The leaves of a parameter tree in two: what is perturbed, and the rest.

    Attributes:
      count: How many leaves there are.
      selected: The places of those that are perturbed, ascending.
      ranges: For those of them that are not perturbed as a whole what is.
    """

    count: int
    selected: Sequence[int]
    ranges: dict[int, Range]

    @staticmethod
    def of(layers: Layers, chosen: Sequence[int]) -> Pieces:
        """Returns the pieces that a selection of layers perturbs."""
        among, selected, ranges = set(chosen), [], {}
        for place in layers.member_leaves:
            own = layers.of_leaf(place)
            at = [i for i, layer in enumerate(own) if layer in among]
            if not at:
                continue
            selected.append(place)
            stack = layers.stacks[place]
            if stack is not None and at[-1] + 1 - at[0] < stack.length:
                ranges[place] = Range(stack.axis, at[0], at[-1] + 1, stack.length)
        return Pieces(len(layers.leaf_layer), selected, ranges)

    @property
    def others(self) -> list[int]:
        """The places of the leaves of which nothing is perturbed."""
        return [i for i in range(self.count) if i not in set(self.selected)]

    def take(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Returns the perturbed pieces of leaves, and the rest."""
        chosen, rest = [], [leaves[i] for i in self.others]
        for i in self.selected:
            if i not in self.ranges:
                chosen.append(leaves[i])
                continue
            own = self.ranges[i]
            for bounds in own.bounds:
                piece = jax.lax.slice_in_dim(leaves[i], *bounds, axis=own.axis)
                (chosen if own.is_chosen(bounds) else rest).append(piece)
        return chosen, rest

    def join(self, chosen: Sequence[Any], rest: Sequence[Any]) -> list[Any]:
        """Returns the leaves of both kinds of pieces, as `take` returns them."""
        mine, others = iter(chosen), iter(rest)
        flat = {i: next(others) for i in self.others}
        for i in self.selected:
            if i not in self.ranges:
                flat[i] = next(mine)
                continue
            own = self.ranges[i]
            parts = [next(mine if own.is_chosen(b) else others) for b in own.bounds]
            flat[i] = jax.lax.concatenate(parts, own.axis)
        return [flat[i] for i in range(self.count)]

    def widen(self, chosen: Sequence[Any]) -> list[Any]:
        """Returns the perturbed pieces as the selected leaves, with zeros around them."""
        return [self._widened(i, x) for i, x in zip(self.selected, chosen, strict=True)]

    def _widened(self, place: int, x: Any) -> Any:
        if place not in self.ranges:
            return x
        own = self.ranges[place]
        widths = [(0, 0)] * x.ndim
        widths[own.axis] = (own.start, own.length - own.stop)
        return jnp.pad(x, widths)
