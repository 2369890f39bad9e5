"""SL-SAM: each step perturbs and updates some layers, drawn by a bandit."""

from __future__ import annotations

from typing import Any

from ..._axes import bandit, combine, shape
from ..._engine.rules import modules
from ..._method import Method
from ..preset import preset


def sl_sam(
    rho: Any, k: int, rate: float = 0.1, explore: float = 0.2, **parts: Any
) -> Method:
    r"""Returns SAM on k layers, $\epsilon = \rho\,g / \|g\|$; all others stand still.

    The layers are drawn with chances that follow their gradient norms in the steps in
    which they took part: `lwsam.bandit(k, rate, explore)`. Both backward passes stop at
    the input-most of them, and the base optimizer leaves all other parameters, and their
    moments, alone.

    Args:
      rho: Radius, >= 0, a number or a schedule; no published one is confirmed.
      k: Number of layers, >= 1. The paper has 47 % of the parameters active (vision), 22
        and 21 % (language models).
      rate: Of the bandit.
      explore: Share of the draws that is uniform.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `bandit(k)` with the rule `modules`, so that biases go with their
      kernels, `normalized()`, `descend_on_selected()`; `TrainStep` alone can do it. A
      parameter that belongs to no layer is never updated.

    Raises:
      ValueError: For numbers out of range.

    References:
      Cheng et al., 2026, arXiv:2602.09395; from its abstract. The update of the chances,
      the form of the perturbation and all defaults are not confirmed: here it is EXP3,
      whose reward is a layer's gradient norm over the largest.
    """
    return preset(
        parts,
        select=bandit.bandit(k, rate=rate, explore=explore),
        rho=rho,
        shape=shape.normalized(),
        combine=combine.descend_on_selected(),
        rule=modules,
    )
