"""GAM: gradient norm aware minimization, four gradients a step."""

from __future__ import annotations

from typing import Any

from ..._axes import combine, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def gam(
    rho: Any,
    radius: float = 0.02,
    beta0: float = 0.5,
    beta1: float = 0.6,
    gamma: float = 0.03,
    **parts: Any,
) -> Method:
    r"""Returns GAM, which seeks points where the gradient's norm stays small around.

    With $g_0$ at $w$, $g_1$ at $w + r\,g_0 / \|g_0\|$ and $h = g_1 - g_0$, which is along
    the gradient of $\|\nabla L\|$: $\hat w = w + \rho\,h / \|h\|$, and $g_2$ at $\hat w$,
    $g_3$ at $\hat w + r\,g_2 / \|g_2\|$. The base optimizer gets
    $d = q - \gamma\,(p - \langle p, q\rangle\,q / \|q\|^2)$ of
    $p = g_0 + |1 - \beta_0|\,g_2$ and $q = \beta_1 g_1 + (1 - \beta_1)\,g_3$. Four
    gradients a step. $\beta_1 = 1$, $\gamma = 0$ is SAM of the radius $r$. Where
    $\rho$ is a schedule's 0, $r$ remains.

    Args:
      rho: Radius along $h$, >= 0, a number or a schedule; 0.2 is the authors'.
      radius: $r$, >= 0; 0.02 to 0.04 are the authors'.
      beta0: $\beta_0$; the authors have 0.1 (CIFAR-10), 0.3 and 0.5 (CIFAR-100).
      beta1: $\beta_1$; 0.1 (CIFAR-10), 0.5 and 0.6 (CIFAR-100).
      gamma: $\gamma$, >= 0; 0.03 and 0.05 are the authors'.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()`,
      `flatness(radius, beta0, beta1, gamma)`. In a chain it needs `value_fn`.

    Raises:
      ValueError: For numbers out of range, a stale ascent.

    References:
      Zhang et al., CVPR 2023, arXiv:2303.03108; confirmed in the authors' code, the
      accelerated form by finite differences, which takes the ascents on each device by
      itself.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized(),
        combine=combine.flatness(radius, beta0, beta1, gamma),
        rule=leaves,
    )
