"""Which layers are perturbed: the state of a selection and its static forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from . import _checks
from ._layers import Layers


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
        raise TypeError(
            _checks.message(
                who, argument, "a tuple of layer names", repr(names), remedy
            )
        )
    return tuple(names)


def static_selection(
    who: str, selection: Any, layers: Layers
) -> tuple[tuple[int, ...], bool]:
    """Returns the layers that a static selection names, and whether it is a cover."""
    is_cover = isinstance(selection, Cover)
    if selection is None:
        remedy = "Pass a tuple of names, or lwsam.selection(opt_state)."
        raise TypeError(
            _checks.message(who, "selection", "a tuple of layer names", None, remedy)
        )
    names = (
        selection.names if is_cover else _tuple_of_names(who, "selection", selection)
    )
    return layers.indices(who, names), is_cover


@jax.tree_util.register_pytree_node_class
class StaticLayers:
    """A pytree node without leaves that carries the `Layers` through a state.

    `is_placeholder` marks one that `optax.tree.map_params` made from parameters that are
    not there. Its structure equals that of any other, for it is mapped with a real one,
    and takes on the layers of that: the result of the mapping has the placeholder's.
    """

    def __init__(self, layers: Layers | None, is_placeholder: bool = False) -> None:
        self.layers, self._is_placeholder = layers, is_placeholder

    def tree_flatten(self) -> tuple[tuple[()], _Static]:
        return (), _Static(self.layers, self._is_placeholder)

    @classmethod
    def tree_unflatten(cls, static: _Static, children: tuple[()]) -> StaticLayers:
        del children
        return cls(static.layers, static.is_placeholder)

    def __repr__(self) -> str:
        return f"StaticLayers({self.layers and self.layers.names})"


class _Static:
    """Static data of `StaticLayers`, with the equality that it documents."""

    def __init__(self, layers: Layers | None, is_placeholder: bool) -> None:
        self.layers, self.is_placeholder = layers, is_placeholder

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static):
            return NotImplemented
        for one, another in ((self, other), (other, self)):
            if one.is_placeholder and one.layers is None:
                one.layers = another.layers
        either = self.is_placeholder or other.is_placeholder
        return either or self.layers == other.layers

    def __hash__(self) -> int:
        return hash(_Static)  # equal values need equal hashes, and some equal all

    def __repr__(self) -> str:
        return repr(self.layers)


class LayerwiseSAMState(NamedTuple):
    """State of the method: arrays, and one static node with the layers.

    Attributes:
      step_count: int32[], steps done.
      norms: f32[L], gradient norms of the last step (Algorithm 1, line 9), 0 at first.
      mask: bool[L], layers that the next step perturbs.
      value: f32[], clean loss of the last step that computed it, +inf at first.
      layers: Static node that holds the `Layers`.
      pending: Only in a `TrainState`: `selection_lag` masks bool[L] of the steps after
        the next.
      budget: Only in a `TrainState`: what was spent and saved.
      direction: Only in a `TrainState`, and only with `reuse`: for each leaf that belongs
        to a layer, the stored direction, 0 at first.
    """

    step_count: jax.Array
    norms: jax.Array
    mask: jax.Array
    value: jax.Array
    layers: StaticLayers
    pending: tuple[jax.Array, ...] = ()
    budget: Any = ()
    direction: tuple[jax.Array, ...] = ()


def _is_multi_steps(node: Any) -> bool:
    return type(node).__name__ == "MultiStepsState"


def refuse_multi_steps(who: str, state: Any) -> None:
    """Raises if an optax.MultiSteps stands anywhere in a state."""
    nodes = jax.tree.leaves(state, is_leaf=_is_multi_steps)
    if any(_is_multi_steps(node) for node in nodes):
        remedy = (
            "Inside MultiSteps the loss sees only the last micro-batch: accumulate in "
            "the loss, or call the step once for each micro-batch without MultiSteps."
        )
        raise ValueError(
            _checks.message(who, "state", "free of optax.MultiSteps", "one", remedy)
        )


def find_states(state: Any) -> list[LayerwiseSAMState]:
    """Returns every state of ours inside any pytree."""
    is_ours = lambda node: isinstance(node, LayerwiseSAMState)
    return [s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s)]


def _only_state(who: str, state: Any) -> LayerwiseSAMState:
    refuse_multi_steps(who, state)
    found = find_states(state)
    if len(found) != 1:
        remedy = (
            "Pass the state of one optax.chain with one layerwise_sam, or a TrainState."
        )
        raise ValueError(
            _checks.message(
                who,
                "state",
                "a state of one layerwise_sam",
                f"{len(found)} of them",
                remedy,
            )
        )
    return found[0]


def _array(node: Any) -> Any:
    """Returns the array of a leaf; NNX wraps those of its optimizers in Variables."""
    (leaf,) = jax.tree.leaves(node)
    return leaf


def value(state: Any) -> jax.Array:
    """Returns the clean loss of the last `update(value_fn=...)`.

    Args:
      state: Any pytree that holds exactly one `LayerwiseSAMState`.

    Returns:
      f32[] (float64 for float64 parameters); +inf before the first such update. Under
      `pmap` it has the device axis of the state.

    Raises:
      ValueError: If there is none or several of our states, or one inside MultiSteps.
    """
    return _array(_only_state("lwsam.value", state).value)


def selection(state: Any, cover: str | None = None) -> tuple[str, ...] | Cover:
    """Returns the layers that the next step perturbs, as a static value.

    Reads one mask of L bytes from the device, and so waits for the step that wrote it.

    Args:
      state: Any pytree that holds exactly one `LayerwiseSAMState`: an optimizer state, a
        `TrainState`. A leading device axis (pmap) is accepted.
      cover: None for exactly the selected layers, as a tuple of names; "depth" for the
        `Cover` of every layer from the input-most selected one on.

    Returns:
      A hashable value: pass it to a jitted step as a static argument.

    Raises:
      ValueError: If there is none or several of our states, one inside MultiSteps, an
        unknown `cover`, or a leading axis over which the masks differ (an ensemble).
      TypeError: Under tracing, where the mask has no value yet.

    Examples:
      >>> import optax, jax.numpy as jnp, lwsam_jax as lwsam
      >>> tx = optax.chain(lwsam.layerwise_sam(k=1, rho=0.1, alpha=0.8), optax.sgd(0.1))
      >>> state = tx.init({"w1": jnp.ones((2, 2)), "w2": jnp.ones((2, 2))})
      >>> lwsam.selection(state)
      ('w2',)
    """
    who = "lwsam.selection"
    if cover is not None:
        _checks.choice(who, "cover", cover, ("depth",))
    found = _only_state(who, state)
    layers = found.layers.layers
    mask = _array(found.mask)
    if isinstance(mask, Tracer):
        remedy = (
            "Call it between the steps, outside jit, and pass the result as static."
        )
        raise TypeError(
            _checks.message(who, "state", "concrete", "a traced one", remedy)
        )
    if layers is None:
        remedy = "Take the state of tx.init(params) or tx.update(...)."
        raise ValueError(
            _checks.message(
                who, "state", "one with layers", "one of placeholders", remedy
            )
        )
    mask = read_mask(mask)
    if mask.ndim > 1:
        mask = _one_of_equals(who, mask.reshape(-1, len(layers)))
    return depth_cover(layers, mask) if cover else layers.selected(mask)


def _one_of_equals(who: str, masks: np.ndarray) -> np.ndarray:
    """Returns the mask that all devices share; members of an ensemble have their own."""
    if (masks != masks[0]).any():
        remedy = (
            "A static selection holds for one model: take the state of one member, or "
            "leave the selection to the traced mask (selection=None)."
        )
        got = f"{len(masks)} different ones (a vmapped ensemble?)"
        raise ValueError(
            _checks.message(who, "state", "one mask for all devices", got, remedy)
        )
    return masks[0]


def read_mask(mask: Any) -> np.ndarray:
    """Copies a mask to the host; of one that spans hosts the part that is here."""
    if getattr(mask, "is_fully_addressable", True) or mask.is_fully_replicated:
        return np.asarray(mask)
    return np.asarray(mask.addressable_data(0))  # of a state with a device axis


def depth_cover(layers: Layers, mask: np.ndarray) -> Cover:
    """Returns the cover of every layer from the input-most masked one on."""
    if not mask.any():
        return Cover(())
    cut = min(d for d, chosen in zip(layers.depth, mask, strict=True) if chosen)
    return Cover(layers.from_depth(cut))
