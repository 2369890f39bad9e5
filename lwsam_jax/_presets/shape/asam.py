"""ASAM: an adaptive radius, in proportion to the weights."""

from __future__ import annotations

from typing import Any

from ..._axes import shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def asam(rho: Any, eta: float = 0.01, **parts: Any) -> Method:
    r"""Returns ASAM: $\epsilon = \rho\,T^2 g / \|T g\|$, $T = |w| + \eta$, $d = \hat g$.

    $T = 1$ for biases. With `shape=lwsam.adaptive(eta=0)` it is the popular variant that
    scales every leaf by $|w|$ alone.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.5 (CIFAR-10) and 1.0 (CIFAR-100) are
        published, ten times SAM's.
      eta: Added to $|w|$, >= 0.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `adaptive(eta)`, `descend()`.

    References:
      Kwon et al., ICML 2021, arXiv:2102.11600; confirmed in the authors' code.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.adaptive(eta, biases=False),
        rule=leaves,
    )
