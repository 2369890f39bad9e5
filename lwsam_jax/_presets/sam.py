"""SAM: sharpness-aware minimization."""

from __future__ import annotations

from typing import Any

from .._axes import shape, which
from .._engine.rules import leaves
from .._method import Method
from .preset import preset


def sam(rho: Any, **parts: Any) -> Method:
    r"""Returns SAM: $\epsilon = \rho\,g / \|g\|$ over all leaves, $d = \hat g$.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.05 and 0.1 are the authors'.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()`, `descend()`.

    References:
      Foret et al., ICLR 2021, arXiv:2010.01412; confirmed in the authors' code, which
      divides without a guard: here a zero gradient gives no perturbation.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized(),
        rule=leaves,
    )
