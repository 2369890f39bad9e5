"""Passes that share nothing: an ascent, a descent, and three gradients of one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks
from .moves import combined, move, reads_all
from .plan import LayerwiseGrad, Memory, Plan
from .varying import mean


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


def ascend(plan: Plan, loss: Loss, params: Any) -> tuple[Any, Any, Any, Any]:
    """Returns value, aux, and the gradients of the selected, and of all leaves."""
    leaves, treedef = jax.tree.flatten(params)
    wants_all = reads_all(plan, params)
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


def descend(
    plan: Plan, memory: Memory, loss: Loss, moved: Any, ascent_value: Any, ascent: Any
) -> tuple[LayerwiseGrad, Memory]:
    """The descent by itself, where it shares nothing with the ascent."""
    (value, aux), descent = jax.value_and_grad(loss, has_aux=True)(moved)
    value, descent = mean((value, descent), plan.axis_name)
    norms = plan.layers.norms(descent)
    grads, late, memory = combined(plan, memory, ascent, descent)
    return LayerwiseGrad(value, aux, grads, norms, value, ascent_value, late), memory


def three_gradients(
    plan: Plan, memory: Memory, losses: Losses, params: Any, direction: Any
) -> tuple[LayerwiseGrad, Memory]:
    """The gradient of a method whose passes have losses of their own."""
    axis = plan.axis_name
    plain: Any = None
    aux, rest, given = None, None, None
    if direction is not None:
        along = as_gradient(plan, params, direction)
        moved, memory = move(plan, memory, params, along, along)
    else:
        if losses.both is not None:
            (aux, plain), everywhere, rest = _ascend_twice(losses.both, params)
            ascent = mean([everywhere[i] for i in plan.selected], axis)
            whole = mean(everywhere, axis) if reads_all(plan, params) else None
            rest = mean(rest, axis)
        else:
            _, (aux, plain), ascent, whole = ascend(plan, losses.ascent, params)
            if losses.rest is not None:
                rest = mean(jax.grad(losses.rest, has_aux=True)(params)[0], axis)
        moved, memory = move(plan, memory, params, ascent, whole)
        given, plain = whole or ascent, mean(plain, axis)
    (_, (own_aux, at_point)), descent = jax.value_and_grad(
        losses.descent, has_aux=True
    )(moved)
    at_point, descent = mean((at_point, descent), axis)
    grads, late, memory = combined(plan, memory, given, descent)
    if rest is not None:
        grads, descent = (
            jax.tree.map(lambda x, g: x + g, tree, rest) for tree in (grads, descent)
        )
    whole_known = direction is None and losses.one_batch
    out = LayerwiseGrad(
        value=plain if whole_known else at_point,
        aux=aux if whole_known else own_aux,
        grads=grads,
        norms=plan.layers.norms(descent),
        perturbed_value=at_point,
        ascent_value=plain,
        late=late,
    )
    return out, memory


def _ascend_twice(both: Callable[[Any], Any], params: Any) -> tuple[Any, Any, Any]:
    """Two gradients from one forward pass: aux, leaves of the first, and the second."""
    values, pull, aux = jax.vjp(both, params, has_aux=True)
    one = tuple(jnp.ones_like(x) for x in values)
    none = tuple(jnp.zeros_like(x) for x in values)
    (ascent,), (rest,) = pull((one[0], none[1])), pull((none[0], one[1]))
    return aux, jax.tree.leaves(ascent), rest
