"""Friendly SAM: the ascent without what all batches have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import _checks, _tree
from ..._axes import shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


class _Average(NamedTuple):
    mean: Any
    is_known: Any  # bool[] for each leaf: a leaf may be seen later than others


def without_average(
    sigma: float, decay: float
) -> optax.GradientTransformationExtraArgs:
    r"""Returns the transformation $q = g - \sigma m$, with the average $m$ so far.

    Then $m \leftarrow \lambda m + (1 - \lambda) g$, from the raw $g$ and not from $q$; at
    first $q = m = g$.
    """

    def init(params):
        return _Average(
            jax.tree.map(lambda w: jnp.zeros_like(_tree.wide(w)), params),
            jax.tree.map(lambda w: jnp.zeros((), bool), params),
        )

    def update(updates, state, params=None, **extra):
        del params, extra
        known = state.is_known
        rest = jax.tree.map(
            lambda g, m, on: g - jnp.where(on, sigma * m, 0), updates, state.mean, known
        )
        mean = jax.tree.map(
            lambda g, m, on: jnp.where(on, decay * m + (1 - decay) * g, g),
            updates,
            state.mean,
            known,
        )
        return rest, _Average(mean, jax.tree.map(jnp.ones_like, known))

    return optax.GradientTransformationExtraArgs(init, update)


def friendly_sam(
    rho: Any, sigma: float = 1.0, decay: float = 0.9, **parts: Any
) -> Method:
    r"""Returns SAM with $\epsilon = \rho\,q / \|q\|$, $q = g - \sigma\,m$.

    $m$ is an average: $m \leftarrow \lambda m + (1 - \lambda) g$ after $q$ is formed,
    from the raw gradient; one copy of the parameters. $\sigma = 0$ is SAM.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.1 and 0.2 are the authors'.
      sigma: Share of the average that is removed, >= 0.
      decay: $\lambda$ of the average, in [0, 1]; 0.6 to 0.95 are the authors'.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, a chain of the removal and
      `normalized()`, `descend()`.

    Raises:
      ValueError: For numbers out of range.

    References:
      Li et al., CVPR 2024, arXiv:2403.12350; the order is that of the authors' code (the
      paper updates $m$ first, which is the same family with another $\sigma$).
    """
    _checks.non_negative("friendly_sam", "sigma", sigma, "1.0 is the authors' value.")
    if not _checks.is_number(decay) or not 0 <= decay <= 1:
        remedy = "0.9 is the authors' value."
        raise _checks.value_error(
            "friendly_sam", "decay", "in [0, 1]", repr(decay), remedy
        )
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=optax.chain(without_average(sigma, decay), shape.normalized()),
        rule=leaves,
    )
