"""How the perturbation is formed from the ascent gradient, and how both gradients mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _tree


def radius_scale(
    normalize: str,
    rho: Any,
    ascent: Sequence[jax.Array],
    active: Sequence[jax.Array | None],
    full: Sequence[jax.Array] = (),
) -> jax.Array:
    r"""Returns the factor $s$ of the perturbation $\epsilon = s\,g$.

    `"none"`: $s = \rho$ (Eq. 3 and 6). `"selected"`: $s = \rho / \|g_{w'}\|$ over the
    perturbed leaves. `"full"`: $s = \rho / \|g\|$ over all leaves (Eq. 2). A zero norm
    gives $s = 0$.

    Args:
      normalize: One of the three.
      rho: Radius, scalar.
      ascent: Gradient leaves that may be perturbed.
      active: For each of them bool[] or None: whether it is.
      full: All gradient leaves; read only for `"full"`.
    """
    dtype = _tree.accumulation_dtype(*ascent, *full)
    scale = jnp.asarray(rho).astype(dtype)
    if normalize == "none":
        return scale
    if normalize == "full":
        return scale * _tree.reciprocal(_tree.norm(full, dtype))
    counted = [
        g if on is None else jnp.where(on, g, jnp.zeros_like(g))
        for g, on in zip(ascent, active, strict=True)
    ]
    return scale * _tree.reciprocal(_tree.norm(counted, dtype))


def perturb(
    params: Sequence[jax.Array],
    ascent: Sequence[jax.Array],
    scale: jax.Array,
    active: Sequence[jax.Array | None],
) -> list[jax.Array]:
    """Returns w + scale * g for each leaf, and w itself where the leaf is not active.

    JAX's gradient of a real function of complex z is the conjugate of the direction of
    steepest ascent; for real leaves the conjugation does nothing.
    """
    moved = [
        _tree.add_scaled(w, scale, jnp.conj(g))
        for w, g in zip(params, ascent, strict=True)
    ]
    return [
        m if on is None else jnp.where(on, m, w)
        for w, m, on in zip(params, moved, active, strict=True)
    ]


def combine(
    ascent: Sequence[jax.Array],
    descent: Sequence[jax.Array],
    alpha: Any,
    active: Sequence[jax.Array | None],
) -> list[jax.Array]:
    """Returns (1 - alpha) * ascent + alpha * descent where active (Eq. 6), else descent.

    A Python alpha of 1 returns the descent gradient unmixed.
    """
    if isinstance(alpha, (int, float)) and alpha == 1:
        return list(descent)
    weight = jnp.asarray(alpha)
    mixed = [_tree.mix(g, d, weight) for g, d in zip(ascent, descent, strict=True)]
    return [
        m if on is None else jnp.where(on, m, d)
        for d, m, on in zip(descent, mixed, active, strict=True)
    ]


def orthogonal_part(
    ascent: Sequence[jax.Array], descent: Sequence[jax.Array]
) -> list[jax.Array]:
    r"""Returns $\hat g - \langle\hat g, g\rangle\,g / \|g\|^2$, over all leaves at once.

    What LookSAM (Liu et al., CVPR 2022, arXiv:2203.02714) keeps of a perturbed gradient
    for the steps to come. A zero ascent gradient gives the descent gradient.
    """
    dtype = _tree.accumulation_dtype(*ascent, *descent)
    share = _tree.inner(descent, ascent, dtype) * _tree.reciprocal(
        _tree.inner(ascent, ascent, dtype)
    )
    return [
        _tree.add_scaled(d, -share, g) for g, d in zip(ascent, descent, strict=True)
    ]


def add_stored(
    grads: Sequence[jax.Array], direction: Sequence[jax.Array], weight: Any
) -> list[jax.Array]:
    r"""Returns $g + a\,(\|g\| / \|g_v\|)\,g_v$ for a stored $g_v$ and a weight $a$.

    The step of LookSAM between two ascents. A zero $g_v$ gives $g$.
    """
    dtype = _tree.accumulation_dtype(*grads, *direction)
    scale = jnp.asarray(weight).astype(dtype) * _tree.norm(grads, dtype)
    scale = scale * _tree.reciprocal(_tree.norm(direction, dtype))
    return [
        _tree.add_scaled(g, scale, v) for g, v in zip(grads, direction, strict=True)
    ]
