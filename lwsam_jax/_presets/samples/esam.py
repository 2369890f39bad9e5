"""ESAM: random tensors are perturbed, and the sharper examples trained on."""

from __future__ import annotations

from typing import Any

import jax
import optax

from ... import _checks
from ..._axes import descent, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def esam(rho: Any, keep: float = 0.6, samples: float = 0.5, **parts: Any) -> Method:
    r"""Returns ESAM: some tensors are perturbed, the sharper examples trained on.

    $\epsilon = \frac{\rho}{\beta}\,\frac{m \odot g}{\|m \odot g\|}$, where $m$ keeps
    each tensor with probability $\beta$ (stochastic weight perturbation), anew in every
    step. The descent gradient is taken over the share of the examples whose loss
    $\epsilon$ raises most (sharpness-sensitive data selection; `lwsam.sharpest`, so
    that the loss returns `metrics["losses"]`, and `TrainStep` alone can do it).
    `keep=1, samples=1` is SAM.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.05 to 0.2 are the authors'.
      keep: $\beta$, in (0, 1].
      samples: Share of the examples of the descent, in (0, 1].
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: a random selector with the rule `leaves`, a chain of `normalized()`
      and $1 / \beta$, `descend()`, `sharpest(samples)`.

    Raises:
      ValueError: For numbers out of range.

    References:
      Du et al., ICLR 2022, arXiv:2110.03141; confirmed in the authors' code. The paper's
      text has $\beta$ and $1 - \beta$ exchanged; the code is right, its author says.
    """
    if not _checks.is_number(keep) or not 0 < keep <= 1:
        remedy = "0.6 is the authors' value."
        raise _checks.value_error("esam", "keep", "in (0, 1]", repr(keep), remedy)

    def some(norms: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, norms.shape) < keep

    return preset(
        parts,
        select=which.everything() if keep == 1 else some,
        rho=rho,
        shape=optax.chain(shape.normalized(), optax.scale(1 / keep)),
        descent=descent.sharpest(samples),
        rule=leaves,
    )
