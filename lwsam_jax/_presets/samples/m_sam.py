"""m-sharpness: each part of the batch has a perturbation of its own."""

from __future__ import annotations

from typing import Any

from ..._axes import shape, sub_batches, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def m_sam(rho: Any, count: int = 8, **parts: Any) -> Method:
    r"""Returns SAM of each part of the batch, averaged.

    $d = \frac1m \sum_j \nabla L(w + \epsilon_j; B_j)$ with
    $\epsilon_j = \rho\,g_j / \|g_j\|$ and $g_j = \nabla L(w; B_j)$, over `count` equal
    parts $B_j$ of the global batch. The parts run one after the other, at SAM's price
    and with the memory of one. On as many devices as there are parts it is what is
    usual elsewhere: a perturbation for each device. `count=1` is SAM.

    Args:
      rho: Radius, >= 0, a number or a schedule; SAM's.
      count: Number of parts, >= 1; smaller parts than the batch are published to
        generalize better: 128 examples over 8 devices are parts of 16.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()`, `descend()`,
      `sub_batches(count)`; `TrainStep` alone can do it.

    Raises:
      ValueError: For a count out of range; in a step, for a batch that cannot be cut so.

    References:
      Foret et al., ICLR 2021, arXiv:2010.01412, section 4.1; their code takes one
      perturbation on each device by default.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized(),
        split=sub_batches.sub_batches(count) if count != 1 else None,
        rule=leaves,
    )
