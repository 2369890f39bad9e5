"""CSAM: examples that are well known at the perturbed point weigh less."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ... import _checks
from ..._axes import descent, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def csam(
    rho: Any, gamma: float = 1.0, differentiates: bool = True, **parts: Any
) -> Method:
    r"""Returns SAM whose descent has a calibrated loss, for cross-entropies.

    With the probability $p = e^{-\ell}$ of an example's class at $w + \epsilon$, its
    loss there is $\ell$ where $p \le 1/2$ and $(1 + p)^{-\gamma}\,\ell$ where it is
    more; the ascent has the plain one. $\gamma = 0$ is SAM. The loss must return the
    cross-entropies of the examples, without label smoothing, as `metrics["losses"]`.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.05 and 0.2 are published.
      gamma: $\gamma$ in [0, 2]; 0.5, 1 and 2 are published.
      differentiates: Whether the weight is differentiated, or a constant.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()`, `descend()`,
      `weighed(...)`; `TrainStep` alone can do it.

    Raises:
      ValueError: For a gamma out of range.

    References:
      Tan et al., ICLR 2026, arXiv:2505.23866; from one secondary source in two
      languages. Whether the weight is differentiated is not confirmed: the flag. The
      loss jumps at $p = 1/2$, by $1.5^{-\gamma}$.
    """
    if not _checks.is_number(gamma) or not 0 <= gamma <= 2:
        remedy = "1 is a published value; 0 is SAM."
        raise _checks.value_error("csam", "gamma", "in [0, 2]", repr(gamma), remedy)

    def calibrated(losses: jax.Array, batch: Any) -> jax.Array:
        del batch
        weight = (1 + jnp.exp(-losses)) ** -gamma
        if not differentiates:
            weight = jax.lax.stop_gradient(weight)
        return jnp.where(losses >= math.log(2), losses, weight * losses)

    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized(),
        descent=descent.weighed(calibrated) if gamma else None,
        rule=leaves,
    )
