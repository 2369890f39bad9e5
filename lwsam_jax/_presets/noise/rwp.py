"""RWP and m-RWP: Gaussian noise on each filter, in proportion to its norm."""

from __future__ import annotations

from typing import Any

from ... import _checks
from ..._axes import ascent, which
from ..._axes.proportional import proportional
from ..._axes.sub_batches import sub_batches
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def rwp(rho: Any, **parts: Any) -> Method:
    r"""Returns RWP: $\epsilon_f = \sigma\,\|w_f\|\,z_f$ for each filter, $d = \hat g$.

    $z \sim \mathcal N(0, I)$ anew in every step. A filter is a slice of the last axis,
    the outputs; a leaf of rank below 2 is one filter.

    Args:
      rho: $\sigma$, >= 0, a number or a schedule. The authors raise it by a cosine from
        0.001 to 10 or 15 times that:
        `optax.cosine_decay_schedule(0.001, total_steps, alpha=10)`.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `random()`,
      `proportional("filter")`, `descend()`. One plain gradient.

    References:
      Li et al., Efficient generalization improvement guided by random weight
      perturbation, arXiv:2211.11489; confirmed in the authors' code.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        ascent=ascent.random(),
        shape=proportional("filter"),
        rule=leaves,
    )


def m_rwp(rho: Any, weight: float = 0.5, **parts: Any) -> Method:
    r"""Returns m-RWP: $d = \lambda\,\nabla L(w + \epsilon; B_1) + (1 - \lambda)\,g(B_0)$.

    Two batches, and so two independent gradients: the first half of the step's batch is
    $B_0$, whose gradient is taken at $w$, the second is $B_1$, with the noise of `rwp`.
    Model state, metrics and `info.ascent_value` are those of $B_0$. A step costs one
    plain gradient of the batch it gets; the authors draw two batches of the usual size
    for it.

    Args:
      rho: $\sigma$, >= 0, a number or a schedule; 0.01 and 0.015 (CIFAR-100) are
        published. A Python 0 is the base optimizer on the whole batch.
      weight: $\lambda$, in [0, 1]; 0.5 is the authors'. 1 is `rwp` on the second half.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: that of `rwp`, with `sub_batches(1, clean=1 - weight)`, for `TrainStep`
      alone, which sees the batch.

    Raises:
      ValueError: For a weight out of range.

    References:
      Li et al., Revisiting random weight perturbation for efficiently improving
      generalization, TMLR 2024, arXiv:2404.00357; confirmed in the authors' code.
    """
    if not _checks.is_number(weight) or not 0 <= weight <= 1:
        remedy = "0.5 is the authors' value."
        raise _checks.value_error("m_rwp", "weight", "in [0, 1]", repr(weight), remedy)
    return rwp(rho, **{"split": sub_batches(1, clean=1 - weight), **parts})
