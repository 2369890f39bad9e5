"""The base optimizer's step, what stands still in it, and what bypasses it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _tree
from .._axes.combine import Combine
from .._axes.shape import keep_unseen
from .._loops.plan import LayerwiseGrad, Plan


def base_step(
    optimizer: optax.GradientTransformationExtraArgs,
    combine: Combine,
    plan: Plan,
    out: LayerwiseGrad,
    params: Any,
    opt_state: Any,
    step: jax.Array,
) -> tuple[Any, Any, Any]:
    """Returns the parameters and the optimizer's state after a step, and its updates."""
    updates, after = optimizer.update(out.grads, opt_state, params, value=out.value)
    if combine.freezes and plan.chosen:
        moves = _moving(plan, out, len(jax.tree.leaves(params)))
        after = keep_unseen(after, opt_state, params, moves)
        leaves, treedef = jax.tree.flatten(updates)
        kept = [jnp.where(on, x, 0) for on, x in zip(moves, leaves, strict=True)]
        updates = jax.tree.unflatten(treedef, kept)
    params = optax.apply_updates(params, updates)
    if out.late is not None:
        rate = combine.learning_rate
        scale = -jnp.asarray(rate(step) if callable(rate) else rate)
        add = lambda w, x: _tree.add_scaled(w, scale, x)
        params = jax.tree.map(add, params, out.late)
    return params, after, updates


def _moving(plan: Plan, out: LayerwiseGrad, count: int) -> list[Any]:
    """Returns for each leaf bool[], whether the step moves it.

    A step that perturbed nothing in the end is plain, and moves all.
    """
    plain = ~jnp.any(out.mask)
    done = plan._replace(mask=out.mask)
    active = dict(zip(plan.selected, done.active, strict=True))
    return [active[i] | plain if i in active else plain for i in range(count)]
