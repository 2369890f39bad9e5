"""GSAM: surrogate gap minimization."""

from __future__ import annotations

from typing import Any

from ..._axes import combine, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def gsam(rho: Any, alpha: Any, **parts: Any) -> Method:
    r"""Returns GSAM: $\epsilon = \rho\,g / \|g\|$, $d = \hat g - \alpha\,g_\perp$.

    $g_\perp = g - \langle g, \hat g\rangle\,\hat g / \|\hat g\|^2$ over all leaves.
    $\alpha = 0$ is SAM. The authors tie the radius to the learning rate: pass
    `rho=lambda t: rho_min + (rho_max - rho_min) * (lr(t) - lr_min) / (lr_max - lr_min)`.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.1 to 0.6 (ViT) is published.
      alpha: Weight, >= 0, a number or a schedule; 0.4 and 0.6 are published.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()`,
      `surrogate_gap(alpha)`.

    References:
      Zhuang et al., ICLR 2022, arXiv:2203.08065; confirmed in the authors' code, which
      takes both per device and divides by $\|\hat g\|^2$ without a guard.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized(),
        combine=combine.surrogate_gap(alpha),
        rule=leaves,
    )
