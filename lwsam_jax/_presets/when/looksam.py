"""LookSAM: an ascent in every n-th step, reused in the others."""

from __future__ import annotations

from typing import Any

from ..._axes import combine, shape, when, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def looksam(rho: Any, period: int = 5, weight: float = 0.7, **parts: Any) -> Method:
    r"""Returns SAM in every `period`-th step, and $g + a\,(\|g\|/\|g_v\|)\,g_v$ between.

    $g_v$, the part of the last $\hat g$ that is orthogonal to its $g$, is kept: one copy
    of the parameters. The norms are over all leaves. `period=1` is SAM.

    Args:
      rho: Radius, >= 0, a number or a schedule.
      period: Steps from one ascent to the next, >= 1; 5 is the paper's.
      weight: $a$, >= 0.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()`,
      `reuse(weight)`, `every(period)`.

    References:
      Liu et al., CVPR 2022, arXiv:2203.02714. There is no code of the authors; the form
      with norms over all leaves is confirmed in code of others, the default weight
      there alone.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized(),
        combine=combine.reuse(weight),
        when=when.every(period),
        rule=leaves,
    )
