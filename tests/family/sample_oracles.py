"""Methods that weigh or cut the samples in float64 NumPy, from published formulas."""

from collections.abc import Callable, Sequence

import numpy as np

from family_reference import (
    added,
    Gradient,
    Losses,
    Move,
    rows_of,
    Rule,
    to_norm,
    zeros,
)
from reference import Leaves


# (losses of the examples, labels) -> d weighed loss / d loss of each example
Slopes = Callable[[np.ndarray, np.ndarray], np.ndarray]


def weighed_gradient(
    gradient: Gradient, losses: Losses, w: Leaves, batch: tuple, slopes: Slopes
) -> Leaves:
    """The gradient of a mean over functions of the examples' losses."""
    factors = slopes(losses(w, batch), batch[1])
    total = zeros(w)
    for i, factor in enumerate(factors):
        total = added(total, factor / len(factors), gradient(w, rows_of(batch, [i])))
    return total


def csam(
    gradient: Gradient, losses: Losses, *, rho: float, gamma: float, inside: bool = True
) -> Rule:
    """CSAM, Tan et al., arXiv:2505.23866; inside: the weight is differentiated."""

    def slopes(values, labels):
        del labels
        p = np.exp(-values)
        slope = (1 + p) ** -gamma
        if inside:
            slope = slope + values * gamma * p * (1 + p) ** (-gamma - 1)
        return np.where(p <= 0.5, 1.0, slope)

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        epsilon = to_norm(rho, g)
        point = added(w, 1.0, epsilon)
        ghat = weighed_gradient(gradient, losses, point, batch, slopes)
        return Move(ghat, epsilon, g, ghat, np.exp(-losses(point, batch)))

    return rule


def focal_sam(
    gradient: Gradient,
    losses: Losses,
    *,
    rho: float,
    c: Sequence[float],
    tail: float = 1,
) -> Rule:
    """Focal-SAM, Li et al., arXiv:2505.01660; ImbSAM, arXiv:2308.07815, with c 0 or 1.

    c is the weight of each class; tail a factor on its part alone.
    """
    c = np.asarray(c, float)
    part = lambda values, labels: tail * c[labels]
    other = lambda values, labels: 1 - c[labels]

    def rule(number, w, last, batch):
        g1 = weighed_gradient(gradient, losses, w, batch, other)
        g2 = weighed_gradient(gradient, losses, w, batch, part)
        epsilon = to_norm(rho, g2)
        point = added(w, 1.0, epsilon)
        g3 = weighed_gradient(gradient, losses, point, batch, part)
        return Move(added(g1, 1.0, g3), epsilon, g2, g3, {})

    return rule


def m_sam(gradient: Gradient, *, rho: float, groups: int) -> Rule:
    """SAM of each group of examples by itself, averaged (m-sharpness)."""

    def rule(number, w, last, batch):
        size = len(batch[0]) // groups
        total, first = zeros(w), None
        for start in range(0, size * groups, size):
            rows = rows_of(batch, slice(start, start + size))
            epsilon = to_norm(rho, gradient(w, rows))
            ghat = gradient(added(w, 1.0, epsilon), rows)
            total = added(total, 1 / groups, ghat)
            first = epsilon if first is None else first
        return Move(total, first, gradient(w, batch), total, {})

    return rule
