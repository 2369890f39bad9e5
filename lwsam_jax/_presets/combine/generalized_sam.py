"""Generalized SAM: a penalty on the gradient norm."""

from __future__ import annotations

from typing import Any

from ..._axes import combine, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def generalized_sam(rho: Any, alpha: Any, **parts: Any) -> Method:
    r"""Returns $\epsilon = \rho\,g / \|g\|$, $d = (1 - \alpha) g + \alpha \hat g$.

    The norm is over all leaves. That is the gradient of $L + \lambda \|\nabla L\|$ by
    finite differences, with $\alpha = \lambda / \rho$. $\alpha = 1$ is SAM, $\alpha =
    0$ the base optimizer, above 1 it is coupled WSAM. The paper's unnormalized form is
    `LayerwiseSAM` with every layer.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.1 is published.
      alpha: Weight, >= 0, a number or a schedule; 0.8 is published.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()`, `mix(alpha)`.

    References:
      Zhao et al., ICML 2022, arXiv:2202.03599; confirmed in the authors' code, which by
      default mixes $g / \|g\|$ instead of $g$: here it is the paper's form.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized(),
        combine=combine.mix(alpha),
        rule=leaves,
    )
