"""MSAM: the ascent along the momentum, as an optimizer."""

from __future__ import annotations

from typing import Any

import optax

from ..._axes import shape as _shape, which
from ..._loops.perturbed import perturbed


def momentum_sam(
    base: optax.GradientTransformation,
    rho: Any,
    *,
    shape: Any = None,
    select: which.Selector | None = None,
    k: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns MSAM as published: $\tilde w = w - \rho\,v / \|v\|$ with the moment $v$.

    `perturbed` along the negative momentum with one norm over all float leaves. rho = 0
    in the warm-up, then constant, is the authors' schedule. Unlike their SGD code,
    weight decay acts on the unperturbed weights, and rho may change between steps.

    Args:
      base: Any Optax optimizer with a momentum, else a momentum is kept for it.
      rho: Radius, >= 0, a number or a schedule; 3 for SGD with momentum is published
        (2.2 to 3.0 on WRNs, 3.0 to 5.5 on ViTs; the class default 0.3 of the authors'
        code is ten times below).
      shape: `normalized()` (the default); `adaptive()` is the strongest published one.
      select: Which layers, all by default.
      k: In place of `select`: the k layers of the largest gradient norm.

    References:
      Becker et al., MSAM, NeurIPS 2025, arXiv:2401.12033; confirmed in paper and code.
    """
    shape = _shape.normalized() if shape is None else shape
    return perturbed(base, rho, shape=shape, select=select, k=k)
