"""ImbSAM: only the loss of rare classes is perturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ... import _checks
from ..._axes import descent, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def imbsam(
    rho: Any,
    counts: Sequence[float],
    labels: Callable[[Any], Any],
    fewer_than: float = 20,
    tail_weight: float = 1.0,
    **parts: Any,
) -> Method:
    r"""Returns SAM of the rare classes: $d = \nabla L_h(w) + \nabla L_t(w + \epsilon)$.

    $L_h$ is the sum over the batch of the losses of all other classes, over its size,
    $L_t$ that of the classes with fewer than `fewer_than` examples, times `tail_weight`;
    $\epsilon = \rho\,\nabla L_t / \|\nabla L_t\|$, 0 in a batch without any. Two forward
    and three backward passes. Where every class is rare it is SAM.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.05 is the authors'.
      counts: How many examples each class has.
      labels: Function of a batch to the classes of its examples, int32[B].
      fewer_than: Below how many a class is rare; 20 is the authors'.
      tail_weight: Weight of the rare classes' loss, > 0; steps that perturb nothing are
        plain, whatever it is.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()`, `descend()`,
      `weighed(...)`; the loss must return `metrics["losses"]`, f32[B], and `TrainStep`
      alone can do it.

    Raises:
      ValueError: For numbers out of range.

    References:
      Zhou et al., ICCV 2023, arXiv:2308.07815; confirmed in the authors' code. One
      version of it has a factor of 2 on $L_t$, another and the formula have none:
      `tail_weight`.
    """
    if not _checks.is_number(tail_weight) or not tail_weight > 0:
        remedy = "1 is the formula's; 2 is that of one version of the authors' code."
        raise _checks.value_error(
            "imbsam", "tail_weight", "> 0", repr(tail_weight), remedy
        )
    rare = descent.class_counts("imbsam", counts) < fewer_than
    own = descent.by_class(tail_weight * rare, labels)
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized(),
        descent=descent.weighed(own, ascent=own, rest=descent.by_class(~rare, labels)),
        rule=leaves,
    )
