"""The way to the perturbed point, and passes that share nothing: ascent and descent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._engine.cover import Pieces
from .._engine.loss_scale import narrowed, seed, unscaled, value_and_grad
from .._engine.run import Split, split_loss
from .moves import (
    combined,
    move,
    norms_of,
    perturbation_norm,
    reads_all,
    report_both,
    stay,
)
from .plan import LayerwiseGrad, Memory, Plan
from .varying import mean, settled


Loss = Callable[[Any], tuple[jax.Array, Any]]


class Losses(NamedTuple):
    """Losses of the passes of one step, each to (its value, (aux, the mean loss)).

    Attributes:
      ascent: At the parameters, for the perturbation.
      descent: At the perturbed point.
      rest: At the parameters, for a gradient that is added; None: there is none.
      both: Ascent and rest in one, to ((value, value), ...), where both see all
        examples; else None.
      one_batch: Whether the ascent sees all examples.
    """

    ascent: Loss
    descent: Loss
    rest: Loss | None
    both: Callable[[Any], Any] | None
    one_batch: bool


def as_gradient(plan: Plan, params: Any, direction: Any) -> list[jax.Array]:
    """Returns the leaves of a direction, conjugated as `move` takes gradients."""
    along = plan.layers.flatten("ascent", "direction", direction)
    for x, w in zip(along, jax.tree.leaves(params), strict=True):
        if jnp.shape(x) != jnp.shape(w):
            remedy = "Return a direction with the shapes of the parameters."
            expected, got = f"of shape {jnp.shape(w)}", str(jnp.shape(x))
            raise _checks.value_error("ascent", "direction", expected, got, remedy)
    return [jnp.conj(x) for x in along]


class Climb(NamedTuple):
    """The step to the perturbed point, once it is done.

    Attributes:
      plan: What the step does from here on: its mask is empty if it had to stay.
      memory: What it remembers so far.
      params: The perturbed parameters.
      norm: Norm of the perturbation.
    """

    plan: Plan
    memory: Memory
    params: Any
    norm: jax.Array


def climb(plan: Plan, memory: Memory, params: Any, direction: Any, whole: Any) -> Climb:
    """Takes the step to the perturbed point; the arguments are those of `move`."""
    moved, after = move(plan, memory, params, direction, whole)
    plan, moved, after = stay(plan, moved, params, after, memory)
    norm = perturbation_norm(plan, moved, params)
    return Climb(plan, after, moved, settled(norm, plan.axis_name))


def of_suffix(
    parts: Split,
    weights: list[Any],
    residuals: list[Any],
    constants: list[Any],
    scale: Any,
) -> tuple[jax.Array, list[Any], list[Any]]:
    """Returns value, other outputs, and the gradient of the perturbed pieces."""
    inner = lambda w: parts.suffix(w, residuals, constants)
    value, pull, outputs = jax.vjp(inner, weights, has_aux=True)
    return value, outputs, pull(seed(value, scale))[0]


def ascend(plan: Plan, loss: Loss, params: Any) -> tuple[Any, Any, Any, Any]:
    """Returns value, aux, and the gradients of the selected, and of all leaves."""
    wants_all = reads_all(plan, params)
    if wants_all:
        (value, aux), grads = value_and_grad(loss, params, plan.scale)
        grads = jax.tree.leaves(grads)
    else:
        (value, aux), grads = _gradient_of_selected(plan, loss, params)
    value, grads = mean((value, grads), plan.axis_name)
    grads = unscaled(grads, plan.scale)
    if wants_all:
        return value, aux, [grads[i] for i in plan.selected], grads
    return value, aux, grads, None


def _gradient_of_selected(plan: Plan, loss: Loss, params: Any) -> Any:
    """Returns ((value, aux), gradients of the leaves that move), with the scale.

    Of a stack that is not perturbed as a whole it may be 0 for the other indices.
    """
    if hasattr(loss, "of_each"):
        one = lambda cut: _gradient_of_selected(plan, cut, params)
        return loss.of_each(one)
    leaves, treedef = jax.tree.flatten(params)
    pieces = Pieces.of(plan.layers, plan.chosen)
    if pieces.ranges:  # JAX by itself stops within no scan
        weights, others = pieces.take(leaves)
        parts = split_loss(loss, params, pieces)
        found = of_suffix(parts, weights, *parts.prefix(others), plan.scale)
        value, outputs, grads = found
        _, aux = jax.tree.unflatten(parts.out_tree, [value, *outputs])
        return (value, aux), pieces.widen(grads)

    def whole(some):
        now = list(leaves)
        for i, leaf in zip(plan.selected, some, strict=True):
            now[i] = leaf
        return jax.tree.unflatten(treedef, now)

    some = [leaves[i] for i in plan.selected]
    of_some = lambda some: loss(whole(some))
    return value_and_grad(of_some, some, plan.scale)


def descent_of(plan: Plan, loss: Loss, moved: Any) -> Any:
    """Returns ((value, aux), gradient); 0 for what stands still in the step."""
    if not plan.combine.freezes:
        return value_and_grad(loss, moved, plan.scale)
    out, some = _gradient_of_selected(plan, loss, moved)
    leaves, treedef = jax.tree.flatten(moved)
    given = dict(zip(plan.selected, some, strict=True))
    grads = [given.get(i, jnp.zeros_like(x)) for i, x in enumerate(leaves)]
    return out, jax.tree.unflatten(treedef, grads)


def descend(
    there: Climb, loss: Loss, ascent_value: Any, ascent: Any
) -> tuple[LayerwiseGrad, Memory]:
    """The descent by itself, where it shares nothing with the ascent."""
    plan = there.plan
    (value, aux), descent = descent_of(plan, loss, there.params)
    value, descent = mean((value, descent), plan.axis_name)
    descent = jax.tree.leaves(unscaled(descent, plan.scale))
    return finished(there, value, aux, value, ascent_value, ascent, descent)


def finished(
    there: Climb,
    value: jax.Array,
    aux: Any,
    perturbed_value: jax.Array,
    ascent_value: Any,
    ascent: Sequence[jax.Array] | None,
    descent: Sequence[jax.Array],
    rest: Sequence[jax.Array] | None = None,
) -> tuple[LayerwiseGrad, Memory]:
    """Returns a step, from the gradients of its passes; `rest` is added in the end."""
    plan = there.plan
    leaves, treedef = jax.tree.flatten(there.params)
    unflatten = lambda xs: jax.tree.unflatten(treedef, xs)
    below, above = narrowed(descent, leaves, plan.scale), ascent
    if above is not None:
        some = [leaves[i] for i in plan.selected]
        like = leaves if len(above) == len(leaves) else some
        above = narrowed(above, like, plan.scale)
    grads, late, memory = combined(plan, there.memory, above, unflatten(below))
    total = descent
    if rest is not None:
        more = unflatten(narrowed(rest, leaves, plan.scale))
        grads = jax.tree.map(jnp.add, grads, more)
        total = [x + g for x, g in zip(descent, rest, strict=True)]
    norms = norms_of(plan, unflatten(total))
    out = LayerwiseGrad(value, aux, grads, norms, perturbed_value, ascent_value, late)
    out = report_both(plan, out, there.norm, ascent, descent)
    return out, memory


def paired_gradients(
    plan: Plan, memory: Memory, first: Loss, second: Loss, params: Any, is_whole: bool
) -> tuple[LayerwiseGrad, Memory]:
    """Four gradients: each pass takes one, and another a step along it."""
    axis, scale = plan.axis_name, plan.scale

    def both(loss, point):
        out, grads = value_and_grad(loss, point, scale)
        grads = unscaled(mean(grads, axis), scale)
        _, more = value_and_grad(loss, _along(plan, point, grads), scale)
        more = unscaled(mean(more, axis), scale)
        return out, jax.tree.leaves(grads), jax.tree.leaves(more)

    (value, aux), g0, g1 = both(first, params)
    difference = [b - a for a, b in zip(g0, g1, strict=True)]
    there = climb(plan, memory, params, difference, difference)
    (at_point, own_aux), g2, g3 = both(second, there.params)
    value, at_point = mean((value, at_point), axis)
    leaves, treedef = jax.tree.flatten(params)
    found, state = plan.combine.update(
        (*g0, *g1), (*g2, *g3), there.memory.combine, plan.alpha
    )
    if there.plan.mask is not None:  # it may select nothing, and the point is not moved
        some = jnp.any(there.plan.bits)
        found = [jnp.where(some, x, g) for x, g in zip(found, g2, strict=True)]
    out = LayerwiseGrad(
        value=value if is_whole else at_point,
        aux=aux if is_whole else own_aux,
        grads=jax.tree.unflatten(treedef, narrowed(list(found), leaves, scale)),
        norms=plan.layers.norms(jax.tree.unflatten(treedef, g2)),
        perturbed_value=at_point,
        ascent_value=value,
    )
    out = report_both(there.plan, out, there.norm, g0, g2)
    return out, there.memory._replace(combine=state)


def _along(plan: Plan, point: Any, grads: Any) -> Any:
    """Returns a point moved by the pair's radius along its gradient."""
    leaves, treedef = jax.tree.flatten(point)
    along = jax.tree.leaves(grads)
    pairs = zip(plan.selected, plan.active, strict=True)
    inside = {
        i: along[i] if on is None else jnp.where(on, along[i], 0) for i, on in pairs
    }
    radius = jnp.asarray(plan.combine.pair or 0.0)
    scale = radius * _tree.reciprocal(_tree.norm(list(inside.values())))
    for i, x in inside.items():
        leaves[i] = _tree.add_scaled(leaves[i], scale, jnp.conj(x))
    return jax.tree.unflatten(treedef, leaves)


def three_gradients(
    plan: Plan, memory: Memory, losses: Losses, params: Any, direction: Any
) -> tuple[LayerwiseGrad, Memory]:
    """The gradient of a method whose passes have losses of their own."""
    axis, scale = plan.axis_name, plan.scale
    plain: Any = None
    aux, rest, given = None, None, None
    if direction is not None:
        along = as_gradient(plan, params, direction)
        there = climb(plan, memory, params, along, along)
    else:
        if losses.both is not None:
            found = _ascend_twice(losses.both, params, scale)
            (aux, plain), everywhere, rest = found
            ascent = mean([everywhere[i] for i in plan.selected], axis)
            whole = mean(everywhere, axis) if reads_all(plan, params) else None
            ascent, whole = unscaled((ascent, whole), scale)
        else:
            _, (aux, plain), ascent, whole = ascend(plan, losses.ascent, params)
            if losses.rest is not None:
                _, rest = value_and_grad(losses.rest, params, scale)
        there = climb(plan, memory, params, ascent, whole)
        given, plain = whole or ascent, mean(plain, axis)
    if rest is not None:
        rest = jax.tree.leaves(unscaled(mean(rest, axis), scale))
    (_, (own_aux, at_point)), descent = descent_of(plan, losses.descent, there.params)
    at_point, descent = mean((at_point, descent), axis)
    descent = jax.tree.leaves(unscaled(descent, scale))
    is_known = direction is None and losses.one_batch
    return finished(
        there,
        plain if is_known else at_point,
        aux if is_known else own_aux,
        at_point,
        plain,
        given,
        descent,
        rest,
    )


def _ascend_twice(
    both: Callable[[Any], Any], params: Any, scale: Any
) -> tuple[Any, Any, Any]:
    """Two gradients from one forward pass: aux, leaves of the first, and the second."""
    values, pull, aux = jax.vjp(both, params, has_aux=True)
    one = tuple(seed(x, scale) for x in values)
    none = tuple(jnp.zeros_like(x) for x in values)
    (ascent,), (rest,) = pull((one[0], none[1])), pull((none[0], one[1]))
    return aux, jax.tree.leaves(ascent), rest
