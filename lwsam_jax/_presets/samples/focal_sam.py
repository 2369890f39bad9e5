"""Focal-SAM: rare classes are perturbed more than frequent ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ... import _checks
from ..._axes import descent, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def focal_sam(
    rho: Any,
    counts: Sequence[float],
    labels: Callable[[Any], Any],
    gamma: float = 1.0,
    weight: float = 0.5,
    **parts: Any,
) -> Method:
    r"""Returns SAM of a part of each loss, the larger the rarer its class is.

    With $c_y = \lambda\,(1 - \pi_y)^\gamma$ for the frequency $\pi_y$ of a class, and
    means over the batch:
    $\epsilon = \rho\,g / \|g\|$ for $g = \nabla\,\overline{c\,\ell}(w)$, and
    $d = \nabla\,\overline{(1 - c)\,\ell}(w) + \nabla\,\overline{c\,\ell}(w + \epsilon)$.
    Two forward and three backward passes. $c = 1$ for all is SAM, 0 the base optimizer.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.2 and 0.3 are the authors', 0.05 for
        fine-tuning CLIP.
      counts: How many examples each class has, or its frequency.
      labels: Function of a batch to the classes of its examples, int32[B].
      gamma: $\gamma$, >= 0; 1, and 3.0 or 3.2 in the authors' scripts.
      weight: $\lambda$, >= 0; 0.5 and 0.8 are the authors'.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()`, `descend()`,
      `weighed(...)`; the loss must return `metrics["losses"]`, f32[B], and `TrainStep`
      alone can do it.

    Raises:
      ValueError: For numbers out of range.

    References:
      Li et al., ICML 2025, arXiv:2505.01660; confirmed in the authors' code.
    """
    _checks.non_negative("focal_sam", "gamma", gamma, "1 is the authors' default.")
    _checks.non_negative("focal_sam", "weight", weight, "0.5 is the authors' default.")
    share = np.asarray(descent.class_counts("focal_sam", counts))
    table = weight * (1 - share / share.sum()) ** gamma
    own = descent.by_class(table, labels)
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized(),
        descent=descent.weighed(
            own, ascent=own, rest=descent.by_class(1 - table, labels)
        ),
        rule=leaves,
    )
