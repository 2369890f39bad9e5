"""The two passes of a step: from the ascent to the gradient for the optimizer.

Algorithm 1, lines 5 to 9, for any ascent, shape and combination.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _tree
from .._engine.run import split_loss
from .moves import combined, gated, move, reads_all, without_ascent
from .plan import LayerwiseGrad, Memory, Plan
from .separate import as_gradient, ascend, descend, Losses, three_gradients
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
    losses: Losses | None = None,
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
      losses: Losses of the passes, where each has its own.

    Returns:
      The gradient, and what is to be remembered.
    """
    axis = plan.axis_name
    params = varying(params, axis)
    loss = local(loss, params, axis)
    if not plan.chosen:
        return _plain(plan, memory, loss, params)
    if losses is not None:
        cast: Any = lambda f: f and local(f, params, axis)
        own = {name: cast(getattr(losses, name)) for name in losses._fields[:4]}
        losses = losses._replace(**own)
        return three_gradients(plan, memory, losses, params, direction)
    if direction is not None:
        along = as_gradient(plan, params, direction)
        moved, memory = move(plan, memory, params, along, along)
        return descend(plan, memory, loss, moved, None, None)
    if ascent_loss is not None or descent_loss is not None:
        first = loss if ascent_loss is None else local(ascent_loss, params, axis)
        value, aux, ascent, whole = ascend(plan, first, params)
        if descent_loss is None:

            def finish():
                moved, after = move(plan, memory, params, ascent, whole)
                return descend(plan, after, loss, moved, value, whole or ascent)

            def plain():
                out, after = _plain(plan, memory, loss, params)
                return out._replace(ascent_value=value), after

            return gated(plan, memory, whole, finish, plain)
        moved, memory = move(plan, memory, params, ascent, whole)
        perturbed, perturbed_aux = loss(moved)
        part = local(descent_loss(aux, perturbed_aux), params, axis)
        out, memory = descend(plan, memory, part, moved, value, whole or ascent)
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
        along = as_gradient(plan, params, direction)

    def finish():
        moved, after = move(plan, memory, params, along, along)
        descent = descent_of(moved)
        ascent = along if direction is None else None
        final, _, after = combined(plan, after, ascent, descent)
        nothing = jnp.zeros(())  # no loss is known
        norms = plan.layers.norms(descent)
        return LayerwiseGrad(nothing, None, final, norms, nothing), after

    def plain():
        nothing = jnp.zeros(())
        out, after = _without_ascent(plan, memory, nothing, None, grads)
        return out._replace(ascent_value=None), after

    out, memory = gated(plan, memory, along, finish, plain)
    return out.grads, out.norms, memory


def _plain(
    plan: Plan, memory: Memory, loss: Loss, params: Any
) -> tuple[LayerwiseGrad, Memory]:
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    value, grads = mean((value, grads), plan.axis_name)
    return _without_ascent(plan, memory, value, aux, grads)


def _without_ascent(
    plan: Plan, memory: Memory, value: jax.Array, aux: Any, grads: Any
) -> tuple[LayerwiseGrad, Memory]:
    """Returns a step on the gradient at the parameters."""
    norms = plan.layers.norms(grads)
    late = None
    if plan.combine.late is not None:
        late = jax.tree.map(lambda g: jnp.zeros_like(_tree.wide(g)), grads)
    grads = without_ascent(plan.combine, plan.layers, grads, memory.combine)
    return LayerwiseGrad(value, aux, grads, norms, value, value, late), memory


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
    wants_all = reads_all(plan, params)
    value, clean, ascent, residual_grads = run(weights, residuals, wants_all)
    if wants_all:
        ascent, rest = mean((ascent, pull_rest(residual_grads)[0]), axis)
        whole = assemble(ascent, rest)
    else:
        ascent = mean(ascent, axis)

    def finish():
        moved, after = move(plan, memory, params, ascent, whole)
        moved_leaves = jax.tree.leaves(moved)
        perturbed_value, perturbed, descent, residual_grads = run(
            [moved_leaves[i] for i in selected], residuals, True
        )
        (rest,) = pull_rest(residual_grads)
        perturbed_value, descent, rest = mean((perturbed_value, descent, rest), axis)
        outputs = clean if plan.aux_from == "clean" else perturbed
        _, aux = jax.tree.unflatten(parts.out_tree, [value, *outputs])
        found = jax.tree.unflatten(treedef, assemble(descent, rest))
        grads, late, after = combined(plan, after, whole or ascent, found)
        norms = plan.layers.norms(found)
        out = LayerwiseGrad(value, aux, grads, norms, perturbed_value, value, late)
        return out, after

    def plain():
        _, aux = jax.tree.unflatten(parts.out_tree, [value, *clean])
        found = jax.tree.unflatten(treedef, whole or ())
        return _without_ascent(plan, memory, value, aux, found)

    value = mean(value, axis)
    return gated(plan, memory, whole, finish, plain)
