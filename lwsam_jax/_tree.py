"""Arithmetic on leaves: norms, safe division, the step to the perturbed point.

All of it runs in at least float32 (float64 for float64 leaves) and rounds once, because
in bfloat16 most of `w + rho * g` is lost to rounding, and float16 norms overflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, PartitionSpec


def accumulation_dtype(*leaves: Any) -> jnp.dtype:
    """Returns float32, or float64 where a leaf has 64-bit (or complex128) precision.

    Leaves of other kinds (integers, PRNG keys, Python numbers) have no say, and NumPy's
    float64 counts as what JAX makes of it, float32 unless 64 bits are enabled.
    """
    return jnp.dtype(jnp.float64 if any(map(_is_double, leaves)) else jnp.float32)


def _is_inexact(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _is_double(leaf: Any) -> bool:
    return _is_inexact(leaf) and own(leaf) in (jnp.float64, jnp.complex128)


def own(x: Any) -> jnp.dtype:
    """Returns the dtype that JAX has for a leaf: float32 for NumPy's float64."""
    return jax.dtypes.canonicalize_dtype(x.dtype)


def wide(x: jax.Array) -> jax.Array:
    """Casts to the accumulation precision, keeping complex leaves complex.

    NumPy's arrays become JAX's: its own arithmetic warns where a square overflows.
    Leaves of other kinds (integers, PRNG keys, Python numbers) stay.
    """
    if not _is_inexact(x):
        return x
    dtype = accumulation_dtype(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        dtype = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return jnp.asarray(x).astype(dtype)


def square_norm(x: jax.Array, keep: int | None = None) -> jax.Array:
    """Returns the sum of |x|^2 over all elements, as a real scalar.

    With `keep` over all axes but that one, as a vector.
    """
    x = wide(x)
    square = jnp.real(x) ** 2 + jnp.imag(x) ** 2 if jnp.iscomplexobj(x) else x**2
    axes = None if keep is None else tuple(i for i in range(x.ndim) if i != keep)
    return jnp.sum(square, axis=axes)


def norm(
    leaves: Sequence[jax.Array],
    dtype: jnp.dtype | None = None,
    keep: Sequence[int | None] | None = None,
) -> jax.Array:
    """Returns the L2 norm over all leaves, as a scalar of the accumulation dtype.

    With an axis to keep for each leaf that of each index there, as a vector.
    """
    dtype = dtype or accumulation_dtype(*leaves)
    mesh = _mesh_of(leaves) if keep is None else None
    if mesh is not None:
        return root(_squares_over(mesh, leaves, dtype))
    total = jnp.zeros((), dtype)
    for leaf, axis in zip(leaves, keep or [None] * len(leaves), strict=True):
        total = total + square_norm(leaf, axis).astype(dtype)
    return root(total)


def _mesh_of(leaves: Sequence[jax.Array]) -> Any:
    """Returns the mesh over which the types of leaves are cut, None if they are not."""
    said = [getattr(jax.typeof(x), "sharding", None) for x in leaves]
    types = [
        t for t, x in zip(said, leaves, strict=True) if t and isinstance(x, Tracer)
    ]
    if len(types) < len(leaves) or not any(a for t in types for a in t.spec):
        return None
    mesh = types[0].mesh
    is_explicit = all(kind == AxisType.Explicit for kind in mesh.axis_types)
    return mesh if is_explicit and all(t.mesh == mesh for t in types) else None


def _squares_over(mesh: Any, leaves: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """Returns the sum of all |x|^2: each device adds up its own, one number travels."""
    specs = tuple(jax.typeof(x).sharding.spec for x in leaves)

    def local(*parts):
        total = jnp.zeros((), dtype)
        for part, spec in zip(parts, specs, strict=True):
            axes = [
                a for at in spec if at for a in ([at] if isinstance(at, str) else at)
            ]
            copies = mesh.size // math.prod(mesh.shape[a] for a in axes)
            total = total + square_norm(part).astype(dtype) / copies
        return jax.lax.psum(total, mesh.axis_names)

    run = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    return run(*leaves)


def root(x: jax.Array) -> jax.Array:
    """Returns sqrt(x); its derivative at 0 is 0, so that a step can be differentiated."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, jnp.ones_like(x))), x)


def inner(
    xs: Sequence[jax.Array], ys: Sequence[jax.Array], dtype: jnp.dtype
) -> jax.Array:
    """Returns the inner product over all leaves, the real part for complex ones."""
    total = jnp.zeros((), dtype)
    for x, y in zip(xs, ys, strict=True):
        product = jnp.real(wide(x) * jnp.conj(wide(y)))
        total = total + jnp.sum(product).astype(dtype)
    return total


def reciprocal(x: jax.Array) -> jax.Array:
    """Returns 1 / x where x > 0, and 0 elsewhere; never divides by zero."""
    positive = x > 0
    return jnp.where(positive, 1 / jnp.where(positive, x, jnp.ones_like(x)), 0)


def add_scaled(x: jax.Array, scale: jax.Array, direction: jax.Array) -> jax.Array:
    """Returns x + scale * direction, computed wide and rounded once to x's dtype."""
    base = wide(x)
    return (base + scale.astype(jnp.real(base).dtype) * wide(direction)).astype(own(x))


def sharded_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `x` with the sharding in the type of another: that of Explicit axes.

    Where axes are Auto the compiler finds it.
    """
    sharding = getattr(jax.typeof(like), "sharding", None)
    kinds = map(str, getattr(sharding.mesh, "axis_types", ())) if sharding else ()
    if not any("Explicit" in kind for kind in kinds):
        return x
    return jax.sharding.reshard(x, sharding)


def mix(x: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns (1 - weight) * x + weight * y, computed wide and rounded once."""
    x_wide, y_wide = wide(x), wide(y)
    weight = weight.astype(jnp.real(x_wide).dtype)
    return ((1 - weight) * x_wide + weight * y_wide).astype(own(y))


def all_finite(tree: Any) -> jax.Array:
    """Returns whether every inexact element of the tree is finite, as bool[]."""
    finite = jnp.ones((), bool)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            finite = finite & jnp.all(jnp.isfinite(leaf))
    return finite
