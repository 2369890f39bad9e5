"""Which layers are perturbed: selectors, the state of a selection, its static forms."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks
from ._layers import Layers


Selector = Callable[[jax.Array, jax.Array], jax.Array]


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
        remedy = "Pass a tuple of layer names such as ('Dense_0',), or lwsam.Cover(...)."
        raise TypeError(
            _checks.message(who, argument, "a tuple of layer names", names, remedy)
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


# --- selectors ------------------------------------------------------------------------


def _ranks(scores: jax.Array, depth: Sequence[int] | None) -> jax.Array:
    """Returns each layer's rank by falling score; ties go to the deepest layer.

    Pairwise, since L is small and a sort with two keys costs more than L * L compares.
    """
    deeper = jnp.arange(scores.shape[0]) if depth is None else jnp.asarray(depth)
    ahead = (scores[None, :] > scores[:, None]) | (
        (scores[None, :] == scores[:, None]) & (deeper[None, :] > deeper[:, None])
    )
    return jnp.sum(ahead, axis=1)


@dataclasses.dataclass(frozen=True)
class _Best:
    """The k layers of highest score; the score is a function of (norms, key)."""

    k: Any
    score: Callable[[jax.Array, jax.Array], jax.Array]
    depth: tuple[int, ...] | None = None

    def bind(self, layers: Layers) -> _Best:
        if _checks.is_number(self.k) and self.k > len(layers):
            remedy = f"Pass k <= {len(layers)}; the layers are {', '.join(layers.names)}."
            raise ValueError(
                _checks.message(
                    "lwsam", "k", f"<= the number of layers, {len(layers)}", self.k, remedy
                )
            )
        return dataclasses.replace(self, depth=layers.depth)

    def __call__(self, norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
        finite = jnp.isfinite(norms)
        scores = jnp.where(finite, self.score(norms, key), -jnp.inf)
        return (_ranks(scores, self.depth) < self.k) & finite


def _high(norms, key):
    del key
    return norms


def _low(norms, key):
    del key
    return -norms


def _uniform(norms, key):
    if key is None:
        remedy = "Pass a jax.random.key; inside a transformation it comes from seed=."
        raise TypeError(_checks.message("random_k", "key", "a PRNG key", None, remedy))
    return jax.random.uniform(key, norms.shape, norms.dtype)


def top_k(k: int) -> Selector:
    """Selects the k layers of the largest gradient norm (Algorithm 1, line 4).

    Args:
      k: Number of layers, >= 0; may be a traced integer.

    Returns:
      A selector `(norms f32[L], key) -> bool[L]`. Ties go to the deepest layers; a
      non-finite norm is never selected, so that fewer than k may be.

    Raises:
      TypeError: If k is not an integer.
      ValueError: If k is negative, or (once the layers are known) larger than L.

    Examples:
      >>> import jax.numpy as jnp
      >>> top_k(2)(jnp.array([3.0, 1.0, 2.0]), None).tolist()
      [True, False, True]
    """
    _checks.count_of_layers("top_k", "k", k)
    return _Best(k, _high)


def bottom_k(k: int) -> Selector:
    """Selects the k layers of the smallest gradient norm (Table 3, Low-Norm).

    Args, returns and raises are those of `top_k`.
    """
    _checks.count_of_layers("bottom_k", "k", k)
    return _Best(k, _low)


def random_k(k: int) -> Selector:
    """Selects k layers uniformly at random, without replacement (Table 3, Random).

    Args, returns and raises are those of `top_k`; the selector needs its key.
    """
    _checks.count_of_layers("random_k", "k", k)
    return _Best(k, _uniform)


@dataclasses.dataclass(frozen=True)
class _Named:
    pattern: str
    chosen: tuple[bool, ...] | None = None

    def bind(self, layers: Layers) -> _Named:
        chosen = tuple(bool(re.search(self.pattern, name)) for name in layers.names)
        if not any(chosen):
            remedy = f"The layers are: {', '.join(layers.names)}."
            raise ValueError(
                _checks.message(
                    "named", "regex", "found in a layer's name", self.pattern, remedy
                )
            )
        return dataclasses.replace(self, chosen=chosen)

    def __call__(self, norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
        del key
        if self.chosen is None:
            remedy = "Call named(regex).bind(layers) first, with the Layers it is for."
            raise TypeError(
                _checks.message("named", "layers", "known", "an unbound selector", remedy)
            )
        return jnp.asarray(self.chosen) & jnp.isfinite(norms)


def named(regex: str) -> Selector:
    """Selects the layers in whose name `re.search(regex, name)` finds something.

    Args:
      regex: A regular expression over the names of `Layers.names`.

    Returns:
      A selector `(norms, key) -> bool[L]`, bound to the layers by the transformation;
      a direct call needs `named(regex).bind(layers)`.

    Raises:
      ValueError: If it is no regular expression, or (once the layers are known) names
        none of them.
    """
    try:
        re.compile(regex)
    except (re.error, TypeError) as error:
        remedy = f"Python's re says: {error}."
        raise ValueError(
            _checks.message("named", "regex", "a regular expression", regex, remedy)
        ) from None
    return _Named(regex)


def _everything(norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
    del key
    return jnp.isfinite(norms)


def _nothing(norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
    del key
    return jnp.zeros(norms.shape, bool)


def everything() -> Selector:
    """Selects every layer (whose norm is finite): generalized SAM, or SAM at alpha=1."""
    return _everything


def nothing() -> Selector:
    """Selects no layer: the base optimizer."""
    return _nothing


def bind(selector: Selector, layers: Layers) -> Selector:
    """Tells a selector which layers there are, if it wants to know."""
    return selector.bind(layers) if hasattr(selector, "bind") else selector


# --- state ----------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
class StaticLayers:
    """A pytree node without leaves that carries the `Layers` through a state.

    `layers=None` stands for any layers when compared: `optax.tree.map_params` builds a
    state of placeholders, from which no layer can be known, and maps it with a real one.
    """

    def __init__(self, layers: Layers | None) -> None:
        self.layers = layers

    def tree_flatten(self) -> tuple[tuple[()], _AnyLayers]:
        return (), _AnyLayers(self.layers)

    @classmethod
    def tree_unflatten(cls, aux: _AnyLayers, children: tuple[()]) -> StaticLayers:
        del children
        return cls(aux.layers)

    def __repr__(self) -> str:
        return f"StaticLayers({self.layers and self.layers.names})"


class _AnyLayers:
    """Static data of `StaticLayers`, with the equality that it documents."""

    def __init__(self, layers: Layers | None) -> None:
        self.layers = layers

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _AnyLayers):
            return NotImplemented
        return None in (self.layers, other.layers) or self.layers == other.layers

    def __hash__(self) -> int:
        return hash(_AnyLayers)  # equal values need equal hashes, and None equals all

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
    """

    step_count: jax.Array
    norms: jax.Array
    mask: jax.Array
    value: jax.Array
    layers: StaticLayers


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
        remedy = "Pass the state of one optax.chain with one layerwise_sam, or a TrainState."
        raise ValueError(
            _checks.message(
                who, "state", "a state of one layerwise_sam", f"{len(found)} of them", remedy
            )
        )
    return found[0]


def _array(leaf: Any) -> Any:
    """Returns the array of a leaf; NNX keeps an optimizer's state in Variables."""
    return leaf if isinstance(leaf, (jax.Array, np.ndarray)) else getattr(leaf, "value", leaf)


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
      ValueError: If there is none or several of our states, one inside MultiSteps, or an
        unknown `cover`.
      TypeError: Under tracing, where the mask has no value yet.

    Examples:
      >>> import optax, jax.numpy as jnp, lwsam_jax as lwsam
      >>> tx = optax.chain(lwsam.layerwise_sam(k=1, rho=0.1, alpha=0.8), optax.sgd(0.1))
      >>> state = tx.init({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))})
      >>> lwsam.selection(state)
      ('b',)
    """
    who = "lwsam.selection"
    if cover is not None:
        _checks.choice(who, "cover", cover, ("depth",))
    found = _only_state(who, state)
    layers = found.layers.layers
    mask = _array(found.mask)
    if isinstance(mask, jax.core.Tracer):
        remedy = "Call it between the steps, outside jit, and pass the result as static."
        raise TypeError(_checks.message(who, "state", "concrete", "a traced one", remedy))
    if layers is None:
        remedy = "Take the state of tx.init(params) or tx.update(...)."
        raise ValueError(
            _checks.message(who, "state", "one with layers", "one of placeholders", remedy)
        )
    if getattr(mask, "is_fully_addressable", True):
        mask = np.asarray(mask)
    else:
        mask = np.asarray(mask.addressable_data(0))
    mask = mask if mask.ndim == 1 else mask.reshape(-1, len(layers))[0]
    return depth_cover(layers, mask) if cover else layers.selected(mask)


def depth_cover(layers: Layers, mask: np.ndarray) -> Cover:
    """Returns the cover of every layer from the input-most masked one on."""
    if not mask.any():
        return Cover(())
    cut = min(d for d, chosen in zip(layers.depth, mask, strict=True) if chosen)
    return Cover(layers.from_depth(cut))
