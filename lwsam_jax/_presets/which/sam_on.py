"""SAM-ON: only the normalization layers are perturbed."""

from __future__ import annotations

from typing import Any

from ..._axes import shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


_NORMALIZATION = r"(?i)norm|(^|[/_.])bn"


def sam_on(rho: Any, names: str = _NORMALIZATION, **parts: Any) -> Method:
    r"""Returns SAM with $\epsilon = \rho\,g / \|g\|$ over normalization parameters alone.

    Every parameter is updated with $\hat g$. A network without such layers raises at
    `init`.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.5 is the authors', and never that of
        SAM.
      names: Regular expression that finds the normalization layers by their names.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `named(names)` with the rule `leaves`, `normalized()`, `descend()`.

    References:
      Mueller et al., NeurIPS 2023, arXiv:2306.04226; confirmed in the authors' code.
    """
    return preset(
        parts,
        select=which.named(names),
        rho=rho,
        shape=shape.normalized(),
        rule=leaves,
    )
