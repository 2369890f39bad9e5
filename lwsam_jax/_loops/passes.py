"""The two passes of a step: from the ascent to the gradient for the optimizer.

Algorithm 1, lines 5 to 9, for any ascent, shape and combination.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _tree
from .._engine.cover import Pieces
from .._engine.loss_scale import narrowed, seed, unscaled, value_and_grad
from .._engine.run import split_loss
from .._engine.trace import trace, Traced
from .moves import (
    combined,
    fall_back,
    gated,
    move,
    reads_all,
    report_plain,
    without_ascent,
)
from .plan import LayerwiseGrad, Memory, Plan
from .separate import (
    as_gradient,
    ascend,
    climb,
    descend,
    finished,
    Losses,
    of_suffix,
    paired_gradients,
    three_gradients,
)
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
    traced: Traced | None = None,
) -> tuple[LayerwiseGrad, Memory]:
    """Evaluates the gradient of a method.

    Args:
      plan: What the step does.
      memory: What it remembers.
      loss: Loss of the parameters on the whole batch, to (value, aux).
      params: Parameter tree.
      ascent_loss: Loss on what the ascent sees, where that is another batch.
      direction: A direction that is known already, in place of an ascent; or a function
        to it of the loss as a function of the parameters.
      descent_loss: `(clean aux, perturbed aux) -> loss` on the examples that the descent
        sees; None: on the whole batch.
      losses: Losses of the passes, where each has its own.
      traced: What `trace_loss` returned of this loss, if it was called.

    Returns:
      The gradient, and what is to be remembered.
    """
    axis = plan.axis_name
    params = varying(params, axis)
    loss = local(loss, params, axis)
    if not plan.chosen:
        return _plain(plan, memory, loss, params)
    if callable(direction):
        direction = direction(_value_fn(plan, loss, params))
    if losses is not None:
        cast: Any = lambda f: f and local(f, params, axis)
        own = {name: cast(getattr(losses, name)) for name in losses._fields[:4]}
        losses = losses._replace(**own)
        return three_gradients(plan, memory, losses, params, direction)
    if direction is not None:
        along = as_gradient(plan, params, direction)
        return descend(climb(plan, memory, params, along, along), loss, None, None)
    if plan.combine.pair is not None:
        is_whole = ascent_loss is None
        first = loss if ascent_loss is None else local(ascent_loss, params, axis)
        return paired_gradients(plan, memory, first, loss, params, is_whole)
    in_cuts = hasattr(loss, "of_each")  # nothing is kept for a second pass
    if ascent_loss is not None or descent_loss is not None or in_cuts:
        first = loss if ascent_loss is None else local(ascent_loss, params, axis)
        value, aux, ascent, whole = ascend(plan, first, params)
        if descent_loss is None:

            def finish():
                there = climb(plan, memory, params, ascent, whole)
                out, after = descend(there, loss, value, whole or ascent)
                if ascent_loss is None:
                    own = aux if plan.aux_from == "clean" else out.aux
                    finite = out.finite & jnp.isfinite(value)
                    out = out._replace(value=value, aux=own, finite=finite)
                return out, after

            def plain():
                if ascent_loss is None:
                    return _clean(plan, memory, value, aux, known or (), params)
                out, after = _plain(plan, memory, loss, params)
                return out._replace(ascent_value=value), after

            known = _on_all(plan, ascent, whole)
            found = gated(plan, memory, whole, finish, plain)
            if ascent_loss is not None:
                return found
            return fall_back(plan, found, plain if known else None, params)
        there = climb(plan, memory, params, ascent, whole)
        perturbed, perturbed_aux = loss(there.params)
        part = local(descent_loss(aux, perturbed_aux), params, axis)
        out, after = descend(there, part, value, whole or ascent)
        perturbed = mean(perturbed, axis)
        finite = out.finite & _tree.all_finite((value, perturbed))
        out = out._replace(
            value=value, aux=aux, perturbed_value=perturbed, finite=finite
        )
        known = _on_all(plan, ascent, whole)
        plain = lambda: _clean(plan, memory, value, aux, known or (), params)
        return fall_back(plan, (out, after), plain if known else None, params)
    return _split(plan, memory, loss, params, traced)


def trace_loss(loss: Loss, params: Any, axis_name: Any) -> Traced:
    """Traces a loss as `evaluate` runs it."""
    params = varying(params, axis_name)
    return trace(local(loss, params, axis_name), params)


def _value_fn(plan: Plan, loss: Loss, params: Any) -> Callable[[Any], jax.Array]:
    """Returns the loss over all devices as a function of what the step perturbs."""
    leaves, treedef = jax.tree.flatten(params)
    active = dict(zip(plan.selected, plan.active, strict=True))

    def value(other):
        moved = list(leaves)
        for i, new in enumerate(jax.tree.leaves(other)):
            if i in active:
                moved[i] = (
                    new if active[i] is None else jnp.where(active[i], new, moved[i])
                )
        found, _ = loss(jax.tree.unflatten(treedef, moved))
        return mean(found, plan.axis_name)

    return value


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
    (value, aux), grads = value_and_grad(loss, params, plan.scale)
    value, grads = mean((value, grads), plan.axis_name)
    grads = jax.tree.leaves(unscaled(grads, plan.scale))
    return _clean(plan, memory, value, aux, grads, params)


def _clean(
    plan: Plan,
    memory: Memory,
    value: jax.Array,
    aux: Any,
    grads: Sequence[jax.Array],
    params: Any,
) -> tuple[LayerwiseGrad, Memory]:
    """Returns a step on the gradient at the parameters, of all leaves."""
    leaves, treedef = jax.tree.flatten(params)
    norms = plan.layers.norms(jax.tree.unflatten(treedef, grads))
    narrow = jax.tree.unflatten(treedef, narrowed(grads, leaves, plan.scale))
    out, memory = _without_ascent(plan, memory, value, aux, narrow)
    return report_plain(plan, out._replace(norms=norms)), memory


def _on_all(
    plan: Plan, ascent: Sequence[jax.Array], whole: Any
) -> Sequence[jax.Array] | None:
    """Returns the ascent gradient of all leaves, None if it is known of some only."""
    pieces = Pieces.of(plan.layers, plan.chosen)
    is_all = not pieces.others and not pieces.ranges
    return ascent if whole is None and is_all else whole


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
    plan: Plan, memory: Memory, loss: Loss, params: Any, traced: Traced | None
) -> tuple[LayerwiseGrad, Memory]:
    """Both passes on one batch, which share what no selected leaf reaches."""
    leaves = jax.tree.leaves(params)
    pieces = Pieces.of(plan.layers, plan.chosen)
    weights, others = pieces.take(leaves)
    parts = split_loss(loss, params, pieces, traced)
    residuals, pull_rest, constants = jax.vjp(parts.prefix, others, has_aux=True)

    def run(weights, residuals, through_residuals):
        if through_residuals:
            inner = lambda w, r: parts.suffix(w, r, constants)
            value, pull, outputs = jax.vjp(inner, weights, residuals, has_aux=True)
            return value, outputs, *pull(seed(value, plan.scale))
        found = of_suffix(parts, weights, residuals, constants, plan.scale)
        return *found, None

    axis, scale = plan.axis_name, plan.scale
    whole = None
    wants_all = reads_all(plan, params)
    value, clean, ascent, residual_grads = run(weights, residuals, wants_all)
    if wants_all:
        both = mean((ascent, pull_rest(residual_grads)[0]), axis)
        ascent, rest = unscaled(both, scale)
        whole = pieces.join(ascent, rest)
    else:
        ascent = unscaled(mean(ascent, axis), scale)
    ascent = pieces.widen(ascent)

    def finish():
        there = climb(plan, memory, params, ascent, whole)
        weights, _ = pieces.take(jax.tree.leaves(there.params))
        stops = plan.combine.freezes
        perturbed_value, perturbed, descent, residual_grads = run(
            weights, residuals, not stops
        )
        if stops:
            rest = [jnp.zeros_like(x) for x in others]
        else:
            (rest,) = pull_rest(residual_grads)
        perturbed_value, descent, rest = mean((perturbed_value, descent, rest), axis)
        outputs = clean if plan.aux_from == "clean" else perturbed
        _, aux = jax.tree.unflatten(parts.out_tree, [value, *outputs])
        found = pieces.join(*unscaled((descent, rest), scale))
        return finished(
            there, value, aux, perturbed_value, value, whole or ascent, found
        )

    def plain():
        _, aux = jax.tree.unflatten(parts.out_tree, [value, *clean])
        return _clean(plan, memory, value, aux, known or (), params)

    value = mean(value, axis)
    known = _on_all(plan, ascent, whole)
    found = gated(plan, memory, whole, finish, plain)
    return fall_back(plan, found, plain if known else None, params)
