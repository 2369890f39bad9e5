"""Random weight perturbations in float64 NumPy, from published formulas.

What a library draws is given: `noise[t][j]` are the draws of N(0, 1) of step t, one set
for each part of its batch. Nothing here knows JAX or the library.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from family_reference import (
    added,
    Gradient,
    Move,
    norm_of,
    only,
    rows_of,
    Rule,
    scaled,
    to_norm,
    zeros,
)
from reference import Leaves


Noise = Sequence[Sequence[Leaves]]
# (w, draws of N(0, 1)) -> perturbation
Perturbation = Callable[[Leaves, Leaves], Leaves]


def on_the_sphere(rho: float) -> Perturbation:
    """RandSAM: rho z / |z| over all leaves."""
    return lambda w, z: to_norm(rho, z)


def filter_wise(sigma: float) -> Perturbation:
    """RWP, arXiv:2211.11489: sigma |w_f| z for each slice f of the last axis."""

    def epsilon(w, z):
        found = {}
        for name, leaf in w.items():
            if leaf.ndim < 2:
                size = np.sqrt(np.sum(leaf**2))
            else:
                size = np.sqrt(np.sum(leaf**2, axis=tuple(range(leaf.ndim - 1))))
            found[name] = sigma * size * z[name]
        return found

    return epsilon


def multiplicative(sigma: float, leaves: Collection[str]) -> Perturbation:
    """DAMP, arXiv:2406.16540: w (1 + sigma z) on some leaves."""
    return lambda w, z: only({n: sigma * z[n] * leaf for n, leaf in w.items()}, leaves)


def of_rows(rho: float, merged: Callable[[Leaves], Leaves]) -> Perturbation:
    """Flat-LoRA, arXiv:2409.14396: rho |W'_o| / sqrt(n) z for each output o.

    With the merged weights W', f64[n, outputs], of the leaves that have adapters.
    """

    def epsilon(w, z):
        found = zeros(w)
        for name, leaf in merged(w).items():
            for o in range(leaf.shape[1]):
                size = np.linalg.norm(leaf[:, o]) / np.sqrt(leaf.shape[0])
                found[name][:, o] = rho * size * z[name][:, o]
        return found

    return epsilon


def in_parts(gradient: Gradient, perturbation: Perturbation, noise: Noise) -> Rule:
    """The mean over equal contiguous parts, each at its own perturbed point."""

    def rule(number, w, last, batch):
        draws = noise[number]
        size = len(batch[0]) // len(draws)
        update = zeros(w)
        for j, z in enumerate(draws):
            epsilon = perturbation(w, z)
            part = rows_of(batch, slice(j * size, (j + 1) * size))
            ghat = gradient(added(w, 1.0, epsilon), part)
            update = added(update, 1 / len(draws), ghat)
        return Move(update, epsilon, {}, update, {})

    return rule


def two_batches(
    gradient: Gradient, perturbation: Perturbation, noise: Noise, weight: float
) -> Rule:
    """m-RWP, arXiv:2404.00357: lam g(w + e; B1) + (1 - lam) g(w; B0)."""

    def rule(number, w, last, batch):
        half = len(batch[0]) // 2
        g = gradient(w, rows_of(batch, slice(0, half)))
        epsilon = perturbation(w, noise[number][0])
        ghat = gradient(added(w, 1.0, epsilon), rows_of(batch, slice(half, None)))
        update = added(scaled(1 - weight, g), weight, ghat)
        return Move(update, epsilon, g, ghat, {})

    return rule


def damped(
    gradient: Gradient,
    sigma: float,
    noise: Noise,
    *,
    eta: float,
    beta: float,
    weight: float | None = None,
) -> Rule:
    """ARWP: e / sqrt(1 + eta F), F <- beta F + ghat^2 summed over the filter.

    With a weight m-ARWP, whose F knows the perturbed gradients alone. A leaf of rank 1
    has an F for each element.
    """

    def of(last: Any, w: Leaves) -> Leaves:
        return last.move.memory if last else zeros(w)

    def rule(number, w, last, batch):
        fisher = of(last, w)
        shrunk = {}
        for name, z in noise[number][0].items():
            f = fisher[name]
            f = np.sum(f, axis=0) if f.ndim > 1 else f
            shrunk[name] = z / np.sqrt(1 + eta * f)
        epsilon = filter_wise(sigma)(w, shrunk)
        half = 0 if weight is None else len(batch[0]) // 2
        ghat = gradient(added(w, 1.0, epsilon), rows_of(batch, slice(half, None)))
        update = ghat
        if weight is not None:
            g = gradient(w, rows_of(batch, slice(0, half)))
            update = added(scaled(1 - weight, g), weight, ghat)
        kept = {n: beta * fisher[n] + leaf**2 for n, leaf in ghat.items()}
        return Move(update, epsilon, {}, ghat, kept)

    return rule


def length(epsilon: Leaves) -> float:
    """|epsilon|."""
    return norm_of(epsilon.values())
