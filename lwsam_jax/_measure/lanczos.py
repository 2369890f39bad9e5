"""The largest eigenvalues of a symmetric operator that is known by its products."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def largest(
    product: Callable[[jax.Array], jax.Array],
    mask: jax.Array,
    count: int,
    iterations: int,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    r"""Returns the largest eigenvalues of a symmetric matrix, and how good they are.

    Lanczos with full reorthogonalization, twice in each iteration. Where the Krylov space
    is exhausted (an eigenvalue that occurs several times) it goes on from another random
    vector, so that multiplicities are seen.

    Args:
      product: $v \mapsto A v$, for v of the mask's shape.
      mask: f[n], 1 where A acts and 0 elsewhere: the block of A that is looked at.
      count: How many eigenvalues.
      iterations: Products with A, `count` or more; as many vectors f[n] are kept.
      key: PRNG key of the first vector.

    Returns:
      The eigenvalues f[count], largest first, 0 for those that the block has not; the
      norms of their residuals $\|A y - \lambda y\|$ with the unit vector y that was
      found: the eigenvalue is right up to that.
    """
    dtype, size = mask.dtype, mask.shape[0]
    dimension = jnp.sum(mask).astype(jnp.int32)

    def against(basis, v):
        for _ in range(2):
            v = v - basis.T @ (basis @ v)
        return v * mask

    def unit(v):
        length = jnp.linalg.norm(v)
        return v / jnp.where(length > 0, length, 1), length

    def fresh(basis, i):
        noise = jax.random.normal(jax.random.fold_in(key, i), (size,), dtype)
        return unit(against(basis, noise * mask))[0]

    def one(i, carry):
        basis, diagonal, off, scale = carry
        v = basis[i]
        moved = product(v) * mask
        alpha = jnp.vdot(v, moved)
        following, beta = unit(against(basis, moved))
        scale = jnp.maximum(scale, jnp.maximum(jnp.abs(alpha), beta))
        ends = beta <= 10 * jnp.finfo(dtype).eps * scale
        goes_on = i + 1 < dimension
        following = jax.lax.cond(
            ends & goes_on, lambda: fresh(basis, i + 1), lambda: following
        )
        following = jnp.where(goes_on, following, 0)
        # One row more than is used: the last vector is thrown away.
        basis = basis.at[i + 1].set(following)
        diagonal = diagonal.at[i].set(alpha)
        off = off.at[i].set(jnp.where(ends | ~goes_on, 0, beta))
        return basis, diagonal, off, scale

    basis = jnp.zeros((iterations + 1, size), dtype).at[0].set(fresh(mask[None] * 0, 0))
    numbers = jnp.zeros((iterations,), dtype)
    _, diagonal, off, scale = jax.lax.fori_loop(
        0, iterations, one, (basis, numbers, numbers, jnp.zeros((), dtype))
    )
    # What the block has not must not come first: it stands below everything.
    there = jnp.arange(iterations) < dimension
    diagonal = jnp.where(there, diagonal, -3 * scale - 1)
    small = jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1)
    values, vectors = jnp.linalg.eigh(small)
    residuals = jnp.abs(off[-1] * vectors[-1])
    known = jnp.arange(count) < dimension
    order = slice(None, -count - 1, -1)
    return jnp.where(known, values[order], 0), jnp.where(known, residuals[order], 0)
