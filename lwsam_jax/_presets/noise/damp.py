"""DAMP: multiplicative noise, another for each part of the batch."""

from __future__ import annotations

from typing import Any

from ..._axes import ascent, which
from ..._axes.proportional import proportional
from ..._axes.sub_batches import sub_batches
from ..._engine.rules import is_bias, leaves
from ..._method import Method
from ..preset import preset


def no_biases(path: tuple[Any, ...], leaf: Any) -> str | None:
    """Rule: every float leaf but the biases; kernels and scales."""
    return None if is_bias(path, leaf) else leaves(path, leaf)


def damp(rho: Any, count: int = 8, **parts: Any) -> Method:
    r"""Returns DAMP: $d = \frac{1}{m} \sum_j \nabla L(w \odot (1 + \sigma z_j); B_j)$.

    $z_j \sim \mathcal N(0, I)$ anew for each of the m parts of the batch, on kernels and
    scales; biases stay. The gradient is that at the perturbed point, without the factor
    $1 + \sigma z_j$ of the chain rule, as in the authors' code.

    Args:
      rho: $\sigma$, >= 0, a number or a schedule; 0.2 (ResNet-18, CIFAR-10) and 0.25
        (ViT-S/16, ImageNet) are published.
      count: m, over all devices; 8 is the authors'. With 1 `as_optax` and `perturbed`
        can do it, too: `damp(0.2, split=None)`.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` over all leaves but biases, `random()`,
      `proportional("element")`, `descend()`, `sub_batches(count)`, for `TrainStep`, which
      sees the batch. One plain gradient.

    References:
      Trinh et al., Improving robustness to corruptions with multiplicative weight
      perturbations, NeurIPS 2024, arXiv:2406.16540; confirmed in the authors' code, which
      keeps BatchNorm statistics of each part for itself: here they are averaged.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        ascent=ascent.random(),
        shape=proportional("element"),
        split=sub_batches(count),
        rule=no_biases,
    )
