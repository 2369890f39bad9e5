"""The two passes of a step: from the ascent to the gradient for the optimizer.

Algorithm 1, lines 5 to 9, for any ascent, shape and combination.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._axes import shape as _shape
from .._axes.combine import Combine
from .._engine.layers import Layers
from .._engine.run import split_loss
from .plan import LayerwiseGrad, Memory, Plan
from .varying import local, mean, varying


Loss = Callable[[Any], tuple[jax.Array, Any]]


def evaluate(
    plan: Plan,
    memory: Memory,
    loss: Loss,
    params: Any,
    *,
    ascent_loss: Loss | None = None,
    direction: Any = None,
    descent_loss: Callable[[Any, Any], Loss] | None = None,
) -> tuple[LayerwiseGrad, Memory]:
    """Evaluates the gradient of a method.

    Args:
      plan: What the step does.
      memory: What it remembers.
      loss: Loss of the parameters on the whole batch, to (value, aux).
      params: Parameter tree.
      ascent_loss: Loss on what the ascent sees, where that is another batch.
      direction: A direction that is known already, in place of an ascent.
      descent_loss: `(clean aux, perturbed aux) -> loss` on the examples that the descent
        sees; None: on the whole batch.

    Returns:
      The gradient, and what is to be remembered.
    """
    axis = plan.axis_name
    params = varying(params, axis)
    loss = local(loss, params, axis)
    if not plan.chosen:
        return _plain(plan, memory, loss, params)
    if direction is not None:
        along = _as_gradient(plan, params, direction)
        moved, memory = move(plan, memory, params, along, along)
        return _descend(plan, memory, loss, moved, None, None)
    if ascent_loss is not None or descent_loss is not None:
        first = loss if ascent_loss is None else local(ascent_loss, params, axis)
        value, aux, ascent, whole = _ascend(plan, first, params)
        moved, memory = move(plan, memory, params, ascent, whole)
        if descent_loss is None:
            return _descend(plan, memory, loss, moved, value, whole or ascent)
        perturbed, perturbed_aux = loss(moved)
        part = local(descent_loss(aux, perturbed_aux), params, axis)
        out, memory = _descend(plan, memory, part, moved, value, whole or ascent)
        perturbed = mean(perturbed, axis)
        out = out._replace(value=value, aux=aux, perturbed_value=perturbed)
        return out, memory
    return _split(plan, memory, loss, params)


def from_gradients(
    plan: Plan,
    memory: Memory,
    grads: Any,
    params: Any,
    descent_of: Callable[[Any], Any],
    direction: Any,
) -> tuple[Any, jax.Array, Memory]:
    """Evaluates the gradient of a method where the ascent gradient is there already.

    Args:
      plan: What the step does.
      memory: What it remembers.
      grads: Gradient at the parameters.
      params: Parameter tree.
      descent_of: Gradient as a function of the parameters.
      direction: A direction in place of these gradients, or None.

    Returns:
      The gradient for the optimizer, the norms of the descent, the memory.
    """
    along = jax.tree.leaves(grads)
    if direction is not None:
        along = _as_gradient(plan, params, direction)
    moved, memory = move(plan, memory, params, along, along)
    descent = descent_of(moved)
    ascent = along if direction is None else None
    final, memory = _combined(plan, memory, ascent, descent)
    return final, plan.layers.norms(descent), memory


def _as_gradient(plan: Plan, params: Any, direction: Any) -> list[jax.Array]:
    """Returns the leaves of a direction, conjugated as `move` takes gradients."""
    along = plan.layers.flatten("ascent", "direction", direction)
    for x, w in zip(along, jax.tree.leaves(params), strict=True):
        if jnp.shape(x) != jnp.shape(w):
            remedy = "Return a direction with the shapes of the parameters."
            expected, got = f"of shape {jnp.shape(w)}", str(jnp.shape(x))
            raise _checks.value_error("ascent", "direction", expected, got, remedy)
    return [jnp.conj(x) for x in along]


def _plain(
    plan: Plan, memory: Memory, loss: Loss, params: Any
) -> tuple[LayerwiseGrad, Memory]:
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    value, grads = mean((value, grads), plan.axis_name)
    norms = plan.layers.norms(grads)
    grads = without_ascent(plan.combine, plan.layers, grads, memory.combine)
    return LayerwiseGrad(value, aux, grads, norms, value, value), memory


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


def _wants_all(plan: Plan, params: Any) -> bool:
    whole_shape = _shape.wants_whole_ascent(plan.shape, params)
    return whole_shape or plan.combine.needs == "all"


def _split(
    plan: Plan, memory: Memory, loss: Loss, params: Any
) -> tuple[LayerwiseGrad, Memory]:
    """Both passes on one batch, which share what no selected leaf reaches."""
    leaves, treedef = jax.tree.flatten(params)
    selected = plan.selected
    others = [i for i in range(len(leaves)) if i not in set(selected)]
    weights = [leaves[i] for i in selected]
    parts = split_loss(loss, params, selected)
    residuals, pull_rest, constants = jax.vjp(
        parts.prefix, [leaves[i] for i in others], has_aux=True
    )

    def run(weights, residuals, through_residuals):
        if through_residuals:
            inner = lambda w, r: parts.suffix(w, r, constants)
            value, pull, outputs = jax.vjp(inner, weights, residuals, has_aux=True)
            return value, outputs, *pull(jnp.ones_like(value))
        inner = lambda w: parts.suffix(w, residuals, constants)
        value, pull, outputs = jax.vjp(inner, weights, has_aux=True)
        return value, outputs, pull(jnp.ones_like(value))[0], None

    def assemble(of_selected, of_others):
        flat = dict(zip(selected, of_selected, strict=True))
        flat.update(zip(others, of_others, strict=True))
        return [flat[i] for i in range(len(leaves))]

    axis = plan.axis_name
    whole = None
    wants_all = _wants_all(plan, params)
    value, clean, ascent, residual_grads = run(weights, residuals, wants_all)
    if wants_all:
        ascent, rest = mean((ascent, pull_rest(residual_grads)[0]), axis)
        whole = assemble(ascent, rest)
    else:
        ascent = mean(ascent, axis)
    moved, memory = move(plan, memory, params, ascent, whole)
    moved_leaves = jax.tree.leaves(moved)
    perturbed_value, perturbed, descent, residual_grads = run(
        [moved_leaves[i] for i in selected], residuals, True
    )
    (rest,) = pull_rest(residual_grads)
    value, perturbed_value, descent, rest = mean(
        (value, perturbed_value, descent, rest), axis
    )
    outputs = clean if plan.aux_from == "clean" else perturbed
    _, aux = jax.tree.unflatten(parts.out_tree, [value, *outputs])
    found = jax.tree.unflatten(treedef, assemble(descent, rest))
    grads, memory = _combined(plan, memory, whole or ascent, found)
    norms = plan.layers.norms(found)
    return LayerwiseGrad(value, aux, grads, norms, perturbed_value, value), memory


def _ascend(plan: Plan, loss: Loss, params: Any) -> tuple[Any, Any, Any, Any]:
    """Returns value, aux, and the gradients of the selected, and of all leaves."""
    leaves, treedef = jax.tree.flatten(params)
    wants_all = _wants_all(plan, params)
    places = range(len(leaves)) if wants_all else plan.selected

    def of_some(some):
        now = list(leaves)
        for i, leaf in zip(places, some, strict=True):
            now[i] = leaf
        return loss(jax.tree.unflatten(treedef, now))

    (value, aux), grads = jax.value_and_grad(of_some, has_aux=True)(
        [leaves[i] for i in places]
    )
    value, grads = mean((value, grads), plan.axis_name)
    if wants_all:
        return value, aux, [grads[i] for i in plan.selected], grads
    return value, aux, grads, None


def _descend(
    plan: Plan, memory: Memory, loss: Loss, moved: Any, ascent_value: Any, ascent: Any
) -> tuple[LayerwiseGrad, Memory]:
    """The descent by itself, where it shares nothing with the ascent."""
    (value, aux), descent = jax.value_and_grad(loss, has_aux=True)(moved)
    value, descent = mean((value, descent), plan.axis_name)
    norms = plan.layers.norms(descent)
    grads, memory = _combined(plan, memory, ascent, descent)
    return LayerwiseGrad(value, aux, grads, norms, value, ascent_value), memory


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


def _combined(
    plan: Plan, memory: Memory, ascent: Sequence[jax.Array] | None, descent: Any
) -> tuple[Any, Memory]:
    """Returns the gradient for the optimizer, from both gradients."""
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
    found, state = combine.update(seen(ascent), seen(below), memory.combine, plan.alpha)
    final = list(leaves)
    for i, on, new, old in zip(places, active, found, below, strict=True):
        final[i] = _where(on, new, old)
    grads = jax.tree.unflatten(treedef, final)
    if plan.mask is not None and (combine.otherwise or combine.needs == "all"):
        # The mask may select nothing, and then this is a step without an ascent.
        ascended = jnp.any(plan.bits)
        plain = without_ascent(combine, plan.layers, descent, memory.combine)
        pick = lambda new, old: jnp.where(ascended, new, old)
        grads = jax.tree.map(pick, grads, plain)
        state = jax.tree.map(pick, state, memory.combine)
    return grads, memory._replace(combine=state)


def _where(on: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if on is None else jnp.where(on, new, old)
