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
from .plan import LayerwiseGrad, Memory, Plan


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


def norms_of(plan: Plan, descent: Any) -> jax.Array:
    """Returns f32[L], the norms of a descent gradient; 0 of what stands still."""
    norms = plan.layers.norms(descent)
    return jnp.where(plan.bits, norms, 0) if plan.combine.freezes else norms


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
    if plan.guards:  # averages would never get rid of it
        finite = _tree.all_finite(kept)
        pick = lambda new, old: jnp.where(finite, new, old)
        kept = jax.tree.map(pick, kept, memory.gate)
    out, after = jax.lax.cond(is_open, finish, plain)
    return out._replace(ascended=is_open), after._replace(gate=kept)


def stay(
    plan: Plan, moved: Any, params: Any, after: Memory, before: Memory
) -> tuple[Plan, Any, Memory]:
    """Returns what is left of a perturbation: nothing, where it is not finite.

    Then the parameters stay, what is remembered too, and the mask of the plan is empty,
    so that the step is the one without an ascent.

    Args:
      plan: What the step does; unguarded, all is returned as it came.
      moved: The perturbed parameters.
      params: The parameters.
      after: What the step remembers.
      before: What it remembered before.
    """
    if not plan.guards:
        return plan, moved, after
    leaves = jax.tree.leaves(moved)
    finite = _tree.all_finite(([leaves[i] for i in plan.selected], after))
    pick = lambda new, old: jnp.where(finite, new, old)
    moved = jax.tree.map(pick, moved, params)
    after = jax.tree.map(pick, after, before)
    return plan._replace(mask=plan.bits & finite), moved, after


def fall_back(
    plan: Plan,
    found: tuple[LayerwiseGrad, Memory],
    plain: Callable[[], tuple[LayerwiseGrad, Memory]] | None,
    params: Any,
) -> tuple[LayerwiseGrad, Memory]:
    """Returns a step, or the one on the clean gradient where it is not finite.

    Only where some part reads that of all leaves, or every layer is perturbed: what else
    an executable may know must not change what a step does.

    Args:
      plan: What the step does; unguarded, it is returned as it came.
      found: The step and what it remembers.
      plain: The step on the clean gradient; None: that of some leaf is not known.
      params: Parameter tree.
    """
    if not plan.guards or plain is None:
        return found
    out, after = found
    spare, before = plain()
    if out.ascended is not None:
        spare = spare._replace(ascended=jnp.zeros_like(out.ascended))
        before = before._replace(gate=after.gate)
    taken = out.finite
    if not reads_all(plan, params):
        taken = taken | ~jnp.all(plan.bits)
    pick = lambda a, b: jnp.where(taken, a, b)
    return jax.tree.map(pick, found, (spare, before))


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
        zero = lambda x: jnp.zeros_like(_tree.wide(x))
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
    if combine.freezes:
        final = [jnp.zeros_like(x) for x in leaves]
        for i, on, new in zip(places, active, found, strict=True):
            final[i] = _where(on, new, final[i])
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


def report_plain(plan: Plan, out: LayerwiseGrad) -> LayerwiseGrad:
    """Returns a step that perturbs nothing, with what there is to say of it.

    Both of its gradients are one, so that their cosine is 1.
    """
    dtype = out.norms.dtype
    return out._replace(
        mask=jnp.zeros((len(plan.layers),), bool),
        perturbation_norm=jnp.zeros((), dtype),
        cosine=jnp.ones((), dtype),
        finite=_tree.all_finite((out.value, out.grads)),
    )


def report_both(
    plan: Plan,
    out: LayerwiseGrad,
    perturbation_norm: jax.Array,
    ascent: Sequence[jax.Array] | None,
    descent: Sequence[jax.Array],
) -> LayerwiseGrad:
    """Returns a step with what there is to say of both of its passes.

    Args:
      plan: What it did.
      out: What came of it.
      perturbation_norm: Norm of the perturbation.
      ascent: Gradient of the selected leaves, or of all, wide; None: there was no pass.
      descent: Gradient of all leaves.
    """
    dtype = out.norms.dtype
    finite = _tree.all_finite((out.value, out.perturbed_value, out.grads, out.late))
    cosine = None
    if ascent is not None:
        if len(ascent) == len(descent):
            ascent = [ascent[i] for i in plan.selected]
        pairs = zip(plan.active, ascent, strict=True)
        above = [_where(on, x, jnp.zeros_like(x)) for on, x in pairs]
        pairs = zip(plan.active, plan.selected, strict=True)
        below = [_where(on, descent[i], jnp.zeros_like(descent[i])) for on, i in pairs]
        size = _tree.norm(above, dtype)
        # Not every shape shows an ascent gradient of inf in what it makes of it.
        finite = finite & jnp.isfinite(size)
        cosine = _tree.inner(above, below, dtype) * _tree.reciprocal(size)
        cosine = cosine * _tree.reciprocal(_tree.norm(below, dtype))
        cosine = jnp.where(jnp.any(plan.bits), jnp.clip(cosine, -1, 1), 1)
    return out._replace(
        mask=plan.bits,
        perturbation_norm=perturbation_norm.astype(dtype),
        cosine=cosine,
        finite=finite,
    )


def perturbation_norm(plan: Plan, moved: Any, params: Any) -> jax.Array:
    """Returns the norm of the perturbation, as it is once the parameters are rounded."""
    new, old = jax.tree.leaves(moved), jax.tree.leaves(params)
    steps = [_tree.wide(new[i]) - _tree.wide(old[i]) for i in plan.selected]
    return _tree.norm(steps, _tree.accumulation_dtype(*old))


def _where(on: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if on is None else jnp.where(on, new, old)
