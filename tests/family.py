"""Relatives of the method in float64 NumPy, from their published formulas.

Generalised SAM (Zhao et al., ICML 2022, arXiv:2202.03599) and LookSAM (Liu et al., CVPR
2022, arXiv:2203.02714), on one flat vector. Nothing here knows JAX, the library, or the
oracle of the layer-wise method.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


# (w, batch) -> gradient
Gradient = Callable[[np.ndarray, Any], np.ndarray]


def generalized_sam(
    gradient: Gradient,
    w: np.ndarray,
    batches: Iterable,
    *,
    r: float,
    alpha: float,
    normalized: bool,
    learning_rate: float,
) -> list[np.ndarray]:
    """w after each step of d = (1 - alpha) g + alpha g(w + r g / |g|), or w + r g."""
    path = []
    for batch in batches:
        g = gradient(w, batch)
        epsilon = r * g / np.linalg.norm(g) if normalized else r * g
        d = (1.0 - alpha) * g + alpha * gradient(w + epsilon, batch)
        w = w - learning_rate * d
        path.append(w)
    return path


def look_sam(
    gradient: Gradient,
    w: np.ndarray,
    batches: Iterable,
    *,
    rho: float,
    k: int,
    alpha: float,
    learning_rate: float,
) -> list[np.ndarray]:
    """w after each step: SAM in every k-th, the stored part of it in the others."""
    path, g_v = [], np.zeros_like(w)
    for step, batch in enumerate(batches):
        g = gradient(w, batch)
        if step % k == 0:
            d = gradient(w + rho * g / np.linalg.norm(g), batch)
            g_v = d - (d @ g) / (g @ g) * g
        else:
            d = g + alpha * np.linalg.norm(g) / np.linalg.norm(g_v) * g_v
        w = w - learning_rate * d
        path.append(w)
    return path
