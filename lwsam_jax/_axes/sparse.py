"""Shapes that leave out single elements: masks of Sparse SAM."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _tree


_WHO = "sparse"


class ElementMask(NamedTuple):
    """State of `sparse`.

    Attributes:
      mask: bool, structured as the parameters: the elements that may be perturbed.
      step: int32[], steps done.
    """

    mask: Any
    step: jax.Array


def sparse(
    sparsity: float = 0.5,
    mask: str = "dynamic",
    *,
    period: int = 100,
    total_steps: int | None = None,
    drop: float = 0.5,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Returns the transformation $a \mapsto m \odot a$ with a mask of elements.

    Of N elements `round((1 - sparsity) * N)` stay. `"dynamic"`: they are random at
    first. At steps `period`, `2 * period`, ... the share
    $q\,(1 + \cos(\pi t / T)) / 2$ of them that has the smallest $|a|$ is dropped, and as
    many of those outside are drawn at random. `"fisher"`: none at first, until
    `set_mask` sets those that `fisher_mask` finds. A leaf whose direction is 0 keeps its
    mask. A mask saves no FLOPs.

    Args:
      sparsity: Share of the elements that are left out, in [0, 1).
      mask: `"dynamic"` or `"fisher"`.
      period: Steps from one update to the next, >= 1.
      total_steps: $T$, the steps of the run; None: the share is $q$ all along.
      drop: $q$, in [0, 1].
      seed: Of what is drawn.

    Raises:
      ValueError: For numbers out of range.

    References:
      Mi et al., NeurIPS 2022, arXiv:2210.05177; see `sparse_sam`.
    """
    _check_sparsity(_WHO, sparsity)
    _checks.choice(_WHO, "mask", mask, ("dynamic", "fisher"))
    remedy = "0.5 exchanges half of the elements at first."
    _checks.share(_WHO, "drop", drop, remedy)
    for name, n in (("period", period), ("total_steps", total_steps)):
        if n is not None:
            _checks.count(_WHO, name, n, "Pass a number of steps.")
            if n < 1:
                raise _checks.value_error(_WHO, name, ">= 1", n, "Pass steps.")

    def init(params):
        sizes = [x.size for x in jax.tree.leaves(params)]
        if mask == "fisher":
            first = jnp.zeros(sum(sizes), bool)
        else:
            drawn = jax.random.uniform(jax.random.key(seed), (sum(sizes),))
            first = _largest(drawn, _kept(sparsity, sum(sizes)))
        return ElementMask(_unflat(first, params), jnp.zeros((), jnp.int32))

    def exchanged(updates, old, step):
        size = jnp.concatenate([jnp.abs(_tree.wide(x)).ravel() for x in updates])
        is_seen = jnp.concatenate(
            [jnp.broadcast_to(jnp.any(x != 0), (x.size,)) for x in updates]
        )
        active = jnp.concatenate([x.ravel() for x in old])
        share = drop
        if total_steps is not None:
            share = drop * (1 + jnp.cos(math.pi * step / total_steps)) / 2
        movable = active & is_seen
        # The slack is for a share whose product is a whole number but for rounding.
        count = jnp.floor(share * jnp.sum(movable) + 1e-4).astype(jnp.int32)
        stay = _largest(jnp.where(movable, size, -1), jnp.sum(movable) - count)
        stay = (stay & movable) | (active & ~is_seen)
        key = jax.random.fold_in(jax.random.key(seed), step)
        drawn = jax.random.uniform(key, size.shape)
        return stay | _largest(jnp.where(is_seen & ~stay, drawn, -1), count)

    def update(updates, state, params=None):
        del params
        found, old = jax.tree.leaves(updates), jax.tree.leaves(state.mask)
        new = state.mask
        if mask == "dynamic" and sparsity > 0:
            now = (state.step > 0) & (state.step % period == 0)
            new = jax.lax.cond(
                now,
                lambda: _unflat(exchanged(found, old, state.step), state.mask),
                lambda: state.mask,
            )
        inside = jax.tree.map(lambda on, x: jnp.where(on, x, 0), new, updates)
        return inside, ElementMask(new, state.step + 1)

    return optax.GradientTransformation(init, update)


def fisher_mask(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    examples: Any,
    sparsity: float = 0.5,
) -> Any:
    r"""Returns the mask of the elements of largest empirical Fisher information.

    $\sum_i (\nabla L(w; x_i))^2$ over single examples, one gradient for each.

    Args:
      loss_fn: `loss_fn(params, batch)`, a scalar; it gets batches of one example.
      params: Parameter tree.
      examples: Arrays whose first axis is the examples; 1,024 are the authors'.
      sparsity: Share of the elements that are left out, in [0, 1).

    Returns:
      bool, structured as the parameters; `round((1 - sparsity) * N)` of N are set.

    Raises:
      ValueError: For a sparsity out of range.
    """
    _check_sparsity("fisher_mask", sparsity)

    def add(total, example):
        grads = jax.grad(loss_fn)(params, jax.tree.map(lambda x: x[None], example))
        square = lambda t, g: t + jnp.abs(_tree.wide(g)) ** 2
        return jax.tree.map(square, total, grads), None

    zero = jax.tree.map(lambda w: jnp.zeros_like(jnp.real(_tree.wide(w))), params)
    total, _ = jax.lax.scan(add, zero, examples)
    flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(total)])
    return _unflat(_largest(flat, _kept(sparsity, flat.size)), params)


def set_mask(state: Any, mask: Any) -> Any:
    """Returns a state with another mask of elements.

    Args:
      state: Any pytree that holds exactly one `ElementMask`: a `TrainState`, the state
        of an optimizer.
      mask: bool, structured as the parameters, such as `fisher_mask` returns it; copied,
        for a step may donate its state.

    Raises:
      ValueError: If the state has none or several.
    """
    is_ours = lambda x: isinstance(x, ElementMask)
    count = sum(map(is_ours, jax.tree.leaves(state, is_leaf=is_ours)))
    if count != 1:
        remedy = "Pass the state of one method with a mask, such as sparse_sam."
        got = f"one with {count}"
        raise _checks.value_error(
            "set_mask", "state", "one with an ElementMask", got, remedy
        )
    mask = jax.tree.map(lambda x: jnp.array(x, bool), mask)
    put = lambda x: x._replace(mask=mask) if is_ours(x) else x
    return jax.tree.map(put, state, is_leaf=is_ours)


def _check_sparsity(who: str, sparsity: Any) -> None:
    if not _checks.is_number(sparsity) or not 0 <= sparsity < 1:
        remedy = "0.5 leaves out half of the elements."
        raise _checks.value_error(who, "sparsity", "in [0, 1)", repr(sparsity), remedy)


def _kept(sparsity: float, count: int) -> int:
    return round((1 - sparsity) * count)


def _largest(scores: jax.Array, count: Any) -> jax.Array:
    """Returns bool of the count largest scores; of equal ones the first."""
    order = jnp.argsort(-scores, stable=True)
    ranks = (
        jnp.zeros(scores.shape, jnp.int32)
        .at[order]
        .set(jnp.arange(scores.size, dtype=jnp.int32))
    )
    return ranks < count


def _unflat(flat: jax.Array, like: Any) -> Any:
    leaves, treedef = jax.tree.flatten(like)
    found, start = [], 0
    for x in leaves:
        found.append(flat[start : start + x.size].reshape(x.shape))
        start += x.size
    return jax.tree.unflatten(treedef, found)
