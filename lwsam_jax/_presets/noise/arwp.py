"""ARWP and m-ARWP: less noise where the gradients have been large."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ... import _checks, _tree
from ..._axes import ascent, which
from ..._axes.proportional import proportional
from ..._axes.sub_batches import sub_batches
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


@dataclasses.dataclass(frozen=True)
class _Damped(ascent.Stale):
    r"""Noise over $\sqrt{1 + \eta F}$, with a decaying sum F of squared gradients."""

    reads_params = False
    eta: float
    decay: float

    def init(self, params: Any, opt_state: Any) -> Any:
        del opt_state
        return jax.tree.map(lambda w: jnp.zeros_like(_sum_of_squares(w)), params)

    def direction(self, kept: Any, opt_state: Any, params: Any, key: jax.Array) -> Any:
        noise = ascent.random().direction((), opt_state, params, key)
        damp = lambda z, f: z * jax.lax.rsqrt(1 + self.eta * f)
        return jax.tree.map(damp, noise, kept)

    def update(self, kept: Any, grads: Any) -> Any:
        add = lambda f, g: self.decay * f + _sum_of_squares(g)
        return jax.tree.map(add, kept, grads)


def _sum_of_squares(x: jax.Array) -> jax.Array:
    """Over all axes but the last; of a leaf of rank 1 each element by itself."""
    square = jnp.abs(_tree.wide(jnp.asarray(x))) ** 2
    return jnp.sum(square, axis=tuple(range(square.ndim - 1)), keepdims=True)


def arwp(rho: Any, eta: float = 0.1, decay: float = 0.99, **parts: Any) -> Method:
    r"""Returns ARWP: $\epsilon_f = \sigma\,\|w_f\|\,z_f / \sqrt{1 + \eta F_f}$.

    $F_f \leftarrow \beta F_f + \|\hat g_f\|^2$ after each step, 0 at first: one number
    for each filter. In a leaf of rank 1 the noise is in proportion to the norm of the
    whole leaf, and $F$ is kept for each element, as in the authors' code.

    Args:
      rho: $\sigma$, >= 0, a number or a schedule; see `rwp`.
      eta: $\eta$, >= 0. 0 is `rwp`.
      decay: $\beta$, in [0, 1].
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: that of `rwp`, with an ascent that keeps F. One plain gradient.

    Raises:
      ValueError: For numbers out of range.

    References:
      Li et al., TMLR 2024, arXiv:2404.00357; confirmed in the authors' code, whose
      default for the mixed form is $\eta = 1$, $\beta = 0.9$ (`m_arwp`).
    """
    _checks.non_negative("arwp", "eta", eta, "0.1 is the paper's value.")
    if not _checks.is_number(decay) or not 0 <= decay <= 1:
        remedy = "0.99 is the paper's value."
        raise _checks.value_error("arwp", "decay", "in [0, 1]", repr(decay), remedy)
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        ascent=_Damped(float(eta), float(decay)),
        shape=proportional("filter"),
        rule=leaves,
    )


def m_arwp(
    rho: Any, weight: float = 0.5, eta: float = 1.0, decay: float = 0.9, **parts: Any
) -> Method:
    r"""Returns m-ARWP: `m_rwp` with the noise of `arwp`.

    $F$ is the sum over gradients at perturbed points, those of the second half of each
    batch.

    Args:
      rho: $\sigma$, >= 0, a number or a schedule; 0.01 is the default of the authors'
        code.
      weight: $\lambda$ of the perturbed gradient, in [0, 1].
      eta: $\eta$, >= 0. 0 is `m_rwp`.
      decay: $\beta$, in [0, 1].
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: that of `arwp`, with `sub_batches(1, clean=1 - weight)`.

    Raises:
      ValueError: For numbers out of range.

    References:
      Li et al., TMLR 2024, arXiv:2404.00357; confirmed in the authors' code.
    """
    if not _checks.is_number(weight) or not 0 <= weight <= 1:
        remedy = "0.5 is the authors' value."
        raise _checks.value_error("m_arwp", "weight", "in [0, 1]", repr(weight), remedy)
    split = sub_batches(1, clean=1 - weight)
    return arwp(rho, eta, decay, **{"split": split, **parts})
