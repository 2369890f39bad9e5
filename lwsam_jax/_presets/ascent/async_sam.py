"""Asynchronous SAM: the ascent gradient is that of the step before."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ... import _tree
from ..._axes import shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def delayed() -> optax.GradientTransformation:
    """Returns the transformation to what it got in the step before, at first 0."""

    def init(params):
        return jax.tree.map(lambda w: jnp.zeros_like(_tree.wide(w)), params)

    def update(updates, state, params=None):
        del params
        return state, updates

    return optax.GradientTransformation(init, update)


def async_sam(rho: Any, **parts: Any) -> Method:
    r"""Returns SAM with $\epsilon_t = \rho\,g_{t-1} / \|g_{t-1}\|$, $d_t = \hat g_t$.

    $g_{t-1}$ was taken at $w_{t-1}$ on the batch of its step. So the two gradients of a
    step do not depend on each other, and hardware may take them side by side: the FLOPs
    are those of SAM. One copy of the parameters is kept; step 0 is unperturbed.

    Args:
      rho: Radius, >= 0, a number or a schedule.
      **parts: Arguments of `Method` in place of the preset's; `ascent=micro_batch(...)`
        is the smaller batch of a slower device.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, a chain of a delay by one step
      and `normalized()`, `descend()`.

    References:
      Jo et al., 2025, arXiv:2503.11147; from secondary sources. How the size of the
      ascent's batch is chosen is not confirmed: here you choose it.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=optax.chain(delayed(), shape.normalized()),
        rule=leaves,
    )
