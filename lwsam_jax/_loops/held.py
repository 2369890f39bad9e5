"""The perturbed parameters that a loop holds, and the way back from them.

What was added is the direction times factors. The direction is computed again from what
made it, the base optimizer's moment or the key of the noise; the factors are kept.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _tree
from .._axes import shape as _shape
from .._axes.combine import descend
from .._engine.layers import Layers
from .moves import move
from .plan import Memory, Plan
from .static import Static


class PerturbedState(NamedTuple):
    """State of `perturbed`: that of the base optimizer, and what was added.

    Attributes:
      step_count: int32[], steps done.
      base: State of the base optimizer.
      ascent: What the ascent keeps, () where the base optimizer has a moment.
      shape: State of the shape.
      factors: f32[n], what each direction was multiplied by, 0 where nothing was added;
        for a shape that is no factor for each leaf or filter, the radius.
      kept: The unperturbed parameters that are not computed back: all for such a shape,
        else those below float32, with `optax.MaskedNode`s for the others; () if none is.
      seed: int32[], of what is drawn at random.
      mask: bool[L], layers that are perturbed.
      hyperparams: `rho`, which a loop may set; it holds from the next update on.
      made_of: Static node with the layers and the parts.
    """

    step_count: jax.Array
    base: Any
    ascent: Any
    shape: Any
    factors: jax.Array
    kept: Any
    seed: jax.Array
    mask: jax.Array
    hyperparams: Any
    made_of: Static


class MadeOf(NamedTuple):
    """What a state must know about how it was made; hashable."""

    layers: Layers
    ascent: Any
    shape: Any
    is_plain: bool


def _is_whole(parts: MadeOf, leaf: Any) -> bool:
    """Whether a leaf is kept, for it could not be computed back without drift."""
    if parts.is_plain:
        return False
    return jnp.finfo(leaf.dtype).bits < 32 or not _is_undone(parts)


def _is_undone(parts: MadeOf) -> bool:
    """Whether direction and factors can be computed without the parameters."""
    moves = getattr(parts.ascent, "reads_params", True)
    return hasattr(parts.shape, "factors") and not moves


def keep(parts: MadeOf, params: Any) -> Any:
    """Returns the leaves that are kept, as a tree that holds these alone; () if none."""
    leaves, treedef = jax.tree.flatten(params)
    kept = [
        x if at >= 0 and _is_whole(parts, x) else optax.MaskedNode()
        for at, x in zip(parts.layers.leaf_layer, leaves, strict=True)
    ]
    if all(isinstance(x, optax.MaskedNode) for x in kept):
        return ()  # the Variables of older NNX hold no placeholder
    return jax.tree.unflatten(treedef, kept)


def _shapes_of_factors(parts: MadeOf, leaves: list[Any]) -> list[tuple[int, ...]]:
    """Returns the shape of each leaf's factors; one radius for any other shape."""
    if not hasattr(parts.shape, "factors"):
        return [()]
    shapes = jax.eval_shape(
        lambda xs: parts.shape.factors(xs, xs, parts.layers),
        [
            jax.eval_shape(_tree.wide, x) if at >= 0 else x
            for at, x in zip(parts.layers.leaf_layer, leaves, strict=True)
        ],
    )
    return [s.shape for s in shapes]


def count_factors(parts: MadeOf, leaves: list[Any]) -> int:
    """Returns how many factors a state keeps."""
    return sum(map(math.prod, _shapes_of_factors(parts, leaves)))


def _direction(parts: MadeOf, state: PerturbedState, params: Any) -> list[jax.Array]:
    key = jax.random.fold_in(jax.random.key(state.seed), state.step_count)
    along = parts.ascent.direction(state.ascent, state.base, params, key)
    return parts.layers.flatten("ascent", "direction", along)


def _perturbed_part(
    parts: MadeOf, state: PerturbedState, along: list[jax.Array]
) -> list[jax.Array]:
    """Returns a direction that is 0 where nothing is perturbed."""
    layers = parts.layers
    part = [jnp.zeros_like(x) for x in along]
    for i in layers.member_leaves:
        part[i] = jnp.where(layers.at_leaf(state.mask, i), along[i], 0)
    return part


def perturb(
    parts: MadeOf, state: PerturbedState, own: Any, radius: Any
) -> tuple[Any, PerturbedState]:
    """Returns the perturbed parameters, and the state that remembers how."""
    dtype = state.factors.dtype
    radius = jnp.maximum(jnp.asarray(radius, dtype), 0)
    if hasattr(parts.shape, "factors"):
        leaves = jax.tree.leaves(own)
        along = _direction(parts, state, own)  # once: noise is not cheap
        part = _perturbed_part(parts, state, along)
        seen = along if _shape.wants_whole_ascent(parts.shape, own) else part
        found = parts.shape.factors(seen, leaves, parts.layers)
        flat = [radius * jnp.ravel(f).astype(dtype) for f in found]
        state = state._replace(factors=jnp.concatenate(flat))
        return _add(parts, state, own, part, 1.0), state
    state = state._replace(factors=radius[None])
    moved, shape_state = _move_by_shape(parts, state, own)
    return moved, state._replace(shape=shape_state)


def _move_by_shape(parts: MadeOf, state: PerturbedState, own: Any) -> tuple[Any, Any]:
    """Returns the parameters perturbed by a shape that is no factor, and its state."""
    plan = Plan(
        layers=parts.layers,
        chosen=range(len(parts.layers)),
        mask=state.mask,
        rho=state.factors[0],
        alpha=None,
        shape=parts.shape,
        combine=descend(),
    )
    along = [jnp.conj(x) for x in _direction(parts, state, own)]  # as of a gradient
    moved, memory = move(plan, Memory(shape=state.shape), own, along, along)
    return moved, memory.shape


def perturb_again(parts: MadeOf, state: PerturbedState, own: Any) -> Any:
    """Returns the perturbed parameters of a state."""
    if parts.is_plain:
        return own
    if hasattr(parts.shape, "factors"):
        part = _perturbed_part(parts, state, _direction(parts, state, own))
        return _add(parts, state, own, part, 1.0)
    if jax.tree.leaves(state.shape):
        remedy = "Keep the parameters that the loop held."
        expected, got = "one whose shape keeps no state", "another"
        raise _checks.value_error("train_params", "opt_state", expected, got, remedy)
    return _move_by_shape(parts, state, own)[0]


def _add(
    parts: MadeOf,
    state: PerturbedState,
    params: Any,
    along: list[jax.Array],
    sign: float,
) -> Any:
    """Adds a direction (or takes it away) by the factors in the state."""
    leaves, treedef = jax.tree.flatten(params)
    start, moved = 0, []
    shapes = _shapes_of_factors(parts, leaves)
    rows = zip(parts.layers.leaf_layer, leaves, along, shapes, strict=True)
    for at, w, x, shape in rows:
        count = math.prod(shape)
        factor = state.factors[start : start + count].reshape(shape)
        start += count
        moved.append(
            _tree.add_scaled(w, jnp.asarray(sign), factor * x) if at >= 0 else w
        )
    return jax.tree.unflatten(treedef, moved)


def unperturbed(parts: MadeOf, state: PerturbedState, params: Any) -> Any:
    """Returns the unperturbed parameters of a state."""
    if parts.is_plain:
        return params
    own = params
    if _is_undone(parts):
        part = _perturbed_part(parts, state, _direction(parts, state, params))
        own = _add(parts, state, params, part, -1.0)
    leaves, treedef = jax.tree.flatten(own)
    kept = iter(jax.tree.leaves(state.kept))
    final = [
        next(kept) if at >= 0 and _is_whole(parts, x) else x
        for at, x in zip(parts.layers.leaf_layer, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, final)
