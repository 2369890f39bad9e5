"""HOW, for noise: a share of the weights' own size, whatever length the direction has."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _tree
from .shape import LeafFactors, leaves_of, like, norm_of_slices, perturbed_part


@functools.cache
def proportional(
    per: str = "filter", *, of: str = "norm"
) -> optax.GradientTransformationExtraArgs:
    r"""Returns the shape $s(a)_f = \|w_f\|\,a_f$: the direction keeps its own length.

    That is what noise is given to: each of its elements is a draw of
    $\mathcal N(0, \rho^2 \|w_f\|^2)$. `relative` gives the noise a length of exactly
    $\rho \|w_f\|$ instead, which is $\sqrt n$ times shorter in a filter of n elements.

    Args:
      per: `"filter"`: f is a slice of a leaf's last axis, its outputs; leaves of rank
        below 2 as a whole. `"element"`: $s(a)_i = w_i a_i$, so that the weights are
        multiplied by $1 + \rho a$; `perturbed` then keeps a copy of them.
      of: `"norm"`, or `"rms"`: the root mean square of the slice in place of its norm.

    Raises:
      ValueError: For another `per` or `of`, or `"rms"` of single elements.
    """
    _checks.choice("proportional", "per", per, ("filter", "element"))
    _checks.choice("proportional", "of", of, ("norm", "rms"))
    if per == "filter":
        return LeafFactors(functools.partial(_of_filters, is_mean=of == "rms"))
    if of == "rms":
        remedy = "Leave it out: that of one element is the element."
        raise _checks.value_error("proportional", "of", "'norm'", repr(of), remedy)

    def update(updates, state, params=None, *, layers=None, mask=None, **extra):
        del extra
        leaves, treedef = jax.tree.flatten(updates)
        leaves = perturbed_part(leaves, layers, mask)
        pairs = zip(leaves_of(params, leaves), leaves, strict=True)
        return jax.tree.unflatten(treedef, [_tree.wide(w) * x for w, x in pairs]), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def _of_filters(
    leaves: list[Any], params: list[Any], layers: Any, is_mean: bool
) -> list[jax.Array]:
    stacks = [None] * len(leaves) if layers is None else layers.stacks
    rows = zip(leaves, params, stacks, strict=True)
    return [size_of_filters(w, x, is_mean, stack) for x, w, stack in rows]


def size_of_filters(
    w: jax.Array, x: jax.Array, is_mean: bool, stack: Any = None
) -> jax.Array:
    """Returns the norm, or the root mean square, of each filter, as a factor of x.

    Of a stack of layers the same for each index.
    """
    size = norm_of_slices(w, stack)
    count = jnp.size(w) // max(jnp.size(size), 1)
    return like(size / math.sqrt(max(count, 1)) if is_mean else size, x)
