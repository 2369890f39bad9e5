"""AdaZo-SAM: the ascent direction comes from values of the loss, not from a gradient."""

from __future__ import annotations

from typing import Any

from ..._axes import probe, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def adazo_sam(
    rho: Any, count: int = 1, mu: float = 1e-3, sign: int = 1, **parts: Any
) -> Method:
    r"""Returns SAM with $\epsilon = \rho\,\hat G / \|\hat G\|$ for an estimate of g.

    $\hat G = \frac1q \sum_j \frac{L(w + \mu P_j) - L(w - \mu P_j)}{2 \mu}\,P_j$ with
    Gaussian $P_j$, anew in every step: $2q$ forward passes in place of a gradient, so
    that with `count=1` a step costs less than SAM's. Then $\hat G$ is one random vector
    with the sign that climbs. The base optimizer is meant to be Adam.

    Args:
      rho: Radius, >= 0, a number or a schedule; no published one is confirmed.
      count: $q$, >= 1.
      mu: $\mu$, > 0.
      sign: 1 climbs; -1 is that of a formula collection, which would descend.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `differences(count, mu)`,
      `normalized()`, `descend()`.

    Raises:
      ValueError: For numbers out of range.

    References:
      Refael et al., TMLR 2026, arXiv:2502.19571; from a formula collection and a
      reproduction by others, which has the sign +. Sign and all defaults are not
      confirmed.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        ascent=probe.differences(count, mu, sign=sign),
        shape=shape.normalized(),
        rule=leaves,
    )
