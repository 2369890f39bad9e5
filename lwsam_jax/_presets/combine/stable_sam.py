"""Stable SAM: the descent gradient at the length of the ascent gradient."""

from __future__ import annotations

from typing import Any

from ..._axes import combine, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def stable_sam(rho: Any, normalize: bool = True, **parts: Any) -> Method:
    r"""Returns $\epsilon = \rho\,g / \|g\|$, $d = (\|g\| / \|\hat g\|)\,\hat g$.

    The step is as long as that of the base optimizer would be: a gradient at the
    perturbed point is the longer one where training is unstable. No new hyperparameter.

    Args:
      rho: Radius, >= 0, a number or a schedule.
      normalize: Whether the perturbation is normalized; False: $\epsilon = \rho\,g$.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()` or `raw()`,
      `match_norm()`.

    References:
      Tan et al., JMLR, arXiv:2401.07250; from a formula collection and the abstract.
      Whether its experiments normalize the perturbation is not confirmed: the flag.
      Some call it SSAM, as Sparse SAM is called.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized() if normalize else shape.raw(),
        combine=combine.match_norm(),
        rule=leaves,
    )
