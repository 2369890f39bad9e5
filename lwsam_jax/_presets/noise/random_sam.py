"""SAM along a random direction in place of the gradient."""

from __future__ import annotations

from typing import Any

from ..._axes import ascent, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def random_sam(rho: Any, **parts: Any) -> Method:
    r"""Returns $\epsilon = \rho\,z / \|z\|$ over all leaves, $z \sim \mathcal N(0, I)$.

    SAM without its ascent: what is left of it is smoothing. The control of any claim that
    the direction of the gradient matters.

    Args:
      rho: Radius, >= 0, a number or a schedule. In n dimensions a random direction meets
        the gradient at a cosine of about $1/\sqrt n$, so that the radius is larger than
        SAM's.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `random()`, `normalized()`,
      `descend()`. One plain gradient.

    References:
      RandSAM, a baseline of SAMPa, Xie et al., NeurIPS 2024, arXiv:2410.10683; seen in
      secondary texts alone.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        ascent=ascent.random(),
        shape=shape.normalized(),
        rule=leaves,
    )
