"""Between and after the two gradients: the step to the perturbed point, and the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _tree
from .._axes import shape as _shape
from .._axes.combine import Combine
from .._engine.layers import Layers
from .plan import Memory, Plan


def without_ascent(combine: Combine, layers: Layers, grads: Any, state: Any) -> Any:
    """Returns the gradient of a step without an ascent."""
    if combine.otherwise is None or not state:  # a plain method remembers nothing
        return grads
    leaves, treedef = jax.tree.flatten(grads)
    members = layers.member_leaves
    found = combine.otherwise(tuple(leaves[i] for i in members), state)
    for i, leaf in zip(members, found, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)


def reads_all(plan: Plan, params: Any) -> bool:
    """Returns whether some part reads the ascent gradient of every leaf."""
    whole_shape = _shape.wants_whole_ascent(plan.shape, params)
    return whole_shape or plan.combine.needs == "all" or plan.gate is not None


def gated(
    plan: Plan,
    memory: Memory,
    ascent: Sequence[jax.Array] | None,
    finish: Callable[[], Any],
    plain: Callable[[], Any],
) -> Any:
    """Returns `finish()`, or where a gate is closed `plain()`; one of them runs.

    Both return what the step does, and the memory after it.
    """
    if plan.gate is None:
        return finish()
    size = _tree.norm(ascent or ())
    is_open, kept = plan.gate.decide(memory.gate, size**2, plan.step)
    out, after = jax.lax.cond(is_open, finish, plain)
    return out._replace(ascended=is_open), after._replace(gate=kept)


def move(
    plan: Plan,
    memory: Memory,
    params: Any,
    direction: Sequence[jax.Array],
    whole: Sequence[jax.Array] | None,
) -> tuple[Any, Memory]:
    """Returns the perturbed parameters: w + rho * shape(direction).

    JAX's gradient of a real function of complex z is the conjugate of the direction of
    steepest ascent; for real leaves the conjugation does nothing.

    Args:
      plan: What the step does.
      memory: What it remembers.
      params: Parameter tree.
      direction: That of the selected leaves, or of all.
      whole: That of all leaves, where it is known.
    """
    leaves, treedef = jax.tree.flatten(params)
    if len(direction) == len(leaves):
        given = {i: direction[i] for i in plan.selected}
    else:
        given = dict(zip(plan.selected, direction, strict=True))
    active = dict(zip(plan.selected, plan.active, strict=True))
    if whole is not None and _shape.wants_whole_ascent(plan.shape, params):
        seen_leaves = [jnp.conj(_tree.wide(g)) for g in whole]
        seen: list[Any] = [True] * len(leaves)
    else:
        zero = lambda x: jnp.zeros(jnp.shape(x), _tree.wide(x).dtype)
        seen_leaves = [
            _where(active[i], jnp.conj(_tree.wide(given[i])), zero(w))
            if i in given
            else zero(w)
            for i, w in enumerate(leaves)
        ]
        seen = [
            i in given and (active[i] is None or active[i]) for i in range(len(leaves))
        ]
    shaped, state = plan.shape.update(
        jax.tree.unflatten(treedef, seen_leaves),
        memory.shape,
        params,
        layers=plan.layers,
        mask=plan.bits,
    )
    state = _shape.keep_unseen(state, memory.shape, params, seen)
    found = jax.tree.leaves(shaped)
    rho = jnp.maximum(jnp.asarray(plan.rho), 0)
    moved = [
        _where(active[i], _tree.add_scaled(w, rho, found[i]), w) if i in given else w
        for i, w in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, moved), memory._replace(shape=state)


def combined(
    plan: Plan, memory: Memory, ascent: Sequence[jax.Array] | None, descent: Any
) -> tuple[Any, Any, Memory]:
    """Returns the gradient for the optimizer from both gradients, and what is late."""
    combine = plan.combine
    leaves, treedef = jax.tree.flatten(descent)
    places = range(len(leaves)) if combine.needs == "all" else plan.selected
    if ascent is None:  # a stale one; `needs` is "none"
        ascent = [jnp.zeros_like(leaves[i]) for i in places]
    if len(ascent) != len(places):  # all of them, for the shape's sake
        ascent = [ascent[i] for i in places]
    active = [None] * len(places) if combine.needs == "all" else plan.active
    below = tuple(leaves[i] for i in places)
    # What looks across leaves must not see those that a mask leaves out.
    seen = lambda xs: tuple(
        _where(on, x, jnp.zeros_like(x)) for on, x in zip(active, xs, strict=True)
    )
    above, under = seen(ascent), seen(below)
    found, state = combine.update(above, under, memory.combine, plan.alpha)
    final, late = list(leaves), None
    for i, on, new, old in zip(places, active, found, below, strict=True):
        final[i] = _where(on, new, old)
    if combine.late is not None:
        kept = dict(zip(places, combine.late(above, under, plan.alpha), strict=True))
        late = [kept.get(i, jnp.zeros_like(x)) for i, x in enumerate(leaves)]
        late = jax.tree.unflatten(treedef, late)
    grads = jax.tree.unflatten(treedef, final)
    if plan.mask is not None and (combine.otherwise or combine.needs == "all"):
        # The mask may select nothing, and then this is a step without an ascent.
        ascended = jnp.any(plan.bits)
        plain = without_ascent(combine, plan.layers, descent, memory.combine)
        pick = lambda new, old: jnp.where(ascended, new, old)
        grads = jax.tree.map(pick, grads, plain)
        state = jax.tree.map(pick, state, memory.combine)
        late = jax.tree.map(lambda x: jnp.where(ascended, x, 0), late)
    return grads, late, memory._replace(combine=state)


def _where(on: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if on is None else jnp.where(on, new, old)
