"""WSAM: sharpness as a regularizer with a weight of its own."""

from __future__ import annotations

from typing import Any

from ... import _checks
from ..._axes import combine, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def wsam(
    rho: Any,
    gamma: float = 0.9,
    *,
    learning_rate: Any = None,
    coupled: bool = False,
    **parts: Any,
) -> Method:
    r"""Returns weighted SAM: $L + \alpha\,(L(w + \epsilon) - L)$.

    $\epsilon = \rho\,g / \|g\|$ and $\alpha = \gamma / (1 - \gamma)$.
    Decoupled, as its authors have it, the base optimizer gets $g$, and the sharpness
    bypasses its momentum and scales: after its step
    $w \leftarrow w - \eta\,\alpha\,(\hat g - g)$. Coupled, it gets
    $g + \alpha\,(\hat g - g)$. $\gamma = 1/2$ coupled is SAM, $\gamma = 0$ the base
    optimizer, and coupled it is `generalized_sam` with that $\alpha$.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.05 is the authors'.
      gamma: $\gamma$ in [0, 1); 0.9 is the authors', 0.8 to 0.95 what they recommend.
      learning_rate: $\eta$ of the base optimizer, a number or its schedule; needed by
        the decoupled form.
      coupled: Whether the sharpness goes through the base optimizer.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()`, and
      `decoupled(alpha, learning_rate)`, which `TrainStep` alone can do, or `mix(alpha)`.

    Raises:
      ValueError: For numbers out of range; the decoupled form without a learning rate.

    References:
      Yue et al., KDD 2023, arXiv:2305.15817; confirmed in the authors' code, which clips
      both gradients and forms the perturbation on each device by itself.
    """
    if not _checks.is_number(gamma) or not 0 <= gamma < 1:
        remedy = "0.9 is the authors' value; 0.5 coupled is SAM."
        raise _checks.value_error("wsam", "gamma", "in [0, 1)", repr(gamma), remedy)
    alpha = gamma / (1 - gamma)
    if coupled:
        if learning_rate is not None:
            remedy = "Leave it out: the base optimizer has it."
            got = "given, with coupled=True"
            raise _checks.value_error("wsam", "learning_rate", "None", got, remedy)
        how = combine.mix(alpha)
    else:
        how = combine.decoupled(alpha, learning_rate)
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized(),
        combine=how,
        rule=leaves,
    )
