"""Methods of two gradients in float64 NumPy, from published formulas.

As those of `family_reference`: nothing here knows JAX or the library. They differ in how
the perturbation is formed, and in what the optimizer gets.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from family_reference import (
    added,
    Gradient,
    inner,
    Move,
    over,
    Rule,
    scaled,
    to_norm,
    without,
    zeros,
)
from reference import Leaves, norm_of


def size(leaves: Leaves) -> float:
    """The norm over everything."""
    return norm_of(leaves.values())


def centered(leaves: Leaves, mean_over: str) -> Leaves:
    """Leaves without their means: of each output over its inputs, or of a tensor."""
    found = {}
    for name, leaf in leaves.items():
        if mean_over == "tensor":
            found[name] = leaf - leaf.mean()
        elif leaf.ndim == 2:
            found[name] = leaf - leaf.sum(axis=0) / len(leaf)
        else:
            found[name] = leaf
    return found


def gcsam(
    gradient: Gradient, *, rho: float, over: str = "inputs", descent: bool = False
) -> Rule:
    """GCSAM, Hassan et al., arXiv:2501.11584: eps = rho C(g) / |C(g)|."""

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        epsilon = to_norm(rho, centered(g, over))
        ghat = gradient(added(w, 1.0, epsilon), batch)
        update = centered(ghat, over) if descent else ghat
        return Move(update, epsilon, g, ghat, {})

    return rule


def async_sam(gradient: Gradient, *, rho: float) -> Rule:
    """Asynchronous SAM, Jo et al., arXiv:2503.11147: along the g of the step before."""

    def rule(number, w, last, batch):
        epsilon = zeros(w) if last is None else to_norm(rho, last.move.ascent)
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, gradient(w, batch), ghat, {})

    return rule


def lightsam(
    gradient: Gradient,
    *,
    rho: float,
    variant: str,
    b1: float = 0.9,
    b2: float = 0.999,
    delta: float = 1e-8,
) -> Rule:
    """LightSAM I, II and III, Cheng et al., arXiv:2505.24399."""

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        start = {name: np.full_like(leaf, delta**2) for name, leaf in w.items()}
        r, u = (zeros(w), start) if last is None else last.move.memory
        if variant == "I":
            u = {name: leaf + size(g) ** 2 for name, leaf in u.items()}
            r = g
        elif variant == "II":
            u = {name: leaf + g[name] ** 2 for name, leaf in u.items()}
            r = g
        else:
            r = added(scaled(b1, r), 1 - b1, g)
            u = {name: b2 * leaf + (1 - b2) * g[name] ** 2 for name, leaf in u.items()}
        epsilon = {name: rho * r[name] / np.sqrt(u[name]) for name in w}
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, g, ghat, (r, u))

    return rule


def mup_all(gradient: Gradient, *, rho: float, powers: Mapping[str, float]) -> Rule:
    """muP^2 with one norm: eps_l = rho c_l g_l / |g|, given c_l for each leaf."""

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        unit = to_norm(rho, g)
        epsilon = {name: powers[name] * leaf for name, leaf in unit.items()}
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, g, ghat, {})

    return rule


def mup_each(gradient: Gradient, *, rho: float) -> Rule:
    """muP^2 with a norm for each leaf: rho sqrt(out / in) g_l / |g_l|."""

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        epsilon = {}
        for name, leaf in g.items():
            into = leaf.shape[0] if leaf.ndim == 2 else 1
            factor = np.sqrt(leaf.shape[-1] / into) * over(1.0, norm_of([leaf]))
            epsilon[name] = rho * factor * leaf
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, g, ghat, {})

    return rule


def sparse_sam(gradient: Gradient, *, rho: float, masks: Sequence[Leaves]) -> Rule:
    """Sparse SAM, Mi et al., arXiv:2210.05177: eps = m rho g / |g|, given the masks."""

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        unit = to_norm(rho, g)
        epsilon = {name: masks[number][name] * leaf for name, leaf in unit.items()}
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, g, ghat, {})

    return rule


def stable_sam(gradient: Gradient, *, rho: float, normalize: bool = True) -> Rule:
    """Stable SAM, Tan et al., arXiv:2401.07250: d = (|g| / |ghat|) ghat."""

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        epsilon = to_norm(rho, g) if normalize else scaled(rho, g)
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(to_norm(size(g), ghat), epsilon, g, ghat, {})

    return rule


def wsam(gradient: Gradient, *, rho: float, gamma: float, coupled: bool) -> Rule:
    """WSAM, Yue et al., arXiv:2305.15817: with alpha = gamma / (1 - gamma)."""

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        epsilon = to_norm(rho, g)
        ghat = gradient(added(w, 1.0, epsilon), batch)
        sharpness = scaled(gamma / (1 - gamma), added(ghat, -1.0, g))
        if coupled:
            return Move(added(g, 1.0, sharpness), epsilon, g, ghat, {})
        return Move(g, epsilon, g, ghat, {}, late=sharpness)

    return rule


def cosine(leaves: Leaves, others: Leaves) -> float:
    """Of the angle between them."""
    return inner(leaves, others) / (size(leaves) * size(others))


def ae_sam(
    gradient: Gradient,
    *,
    rho: float,
    total_steps: int,
    decay: float,
    first: float,
    last: float,
    weight: float | None = None,
) -> Rule:
    """AE-SAM, Jiang et al., arXiv:2304.14647; with a weight AE-LookSAM."""

    def rule(number, w, before, batch):
        g = gradient(w, batch)
        square = size(g) ** 2
        mean, variance, g_v = (
            (0.0, 0.0, zeros(w)) if before is None else before.move.memory
        )
        mean = decay * mean + (1 - decay) * square
        variance = decay * variance + (1 - decay) * (square - mean) ** 2
        many = number / total_steps * last + (1 - number / total_steps) * first
        if square < mean + many * np.sqrt(variance):
            update = g
            if weight is not None:
                update = added(g, weight, to_norm(size(g), g_v))
            return Move(update, zeros(w), g, g, (mean, variance, g_v))
        epsilon = to_norm(rho, g)
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, g, ghat, (mean, variance, without(ghat, g)))

    return rule


def gam(
    gradient: Gradient,
    *,
    rho: float,
    radius: float,
    beta0: float,
    beta1: float,
    gamma: float,
) -> Rule:
    """GAM, Zhang et al., arXiv:2303.03108, as in its accelerated code."""

    def rule(number, w, last, batch):
        g0 = gradient(w, batch)
        g1 = gradient(added(w, 1.0, to_norm(radius, g0)), batch)
        epsilon = to_norm(rho, added(g1, -1.0, g0))
        point = added(w, 1.0, epsilon)
        g2 = gradient(point, batch)
        g3 = gradient(added(point, 1.0, to_norm(radius, g2)), batch)
        p = added(g0, abs(1 - beta0), g2)
        q = added(scaled(beta1, g1), 1 - beta1, g3)
        return Move(added(q, -gamma, without(p, q)), epsilon, g0, g2, {})

    return rule
