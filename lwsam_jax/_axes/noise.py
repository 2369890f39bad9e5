"""Gaussian noise as the parameters, cheap enough to be drawn twice in every step.

`jax.random.normal` runs its rounds in a loop on the CPU, which for each leaf is a chain
of small programs that nothing fuses with. Here every number is elementwise arithmetic on
its own index, so that drawing fuses with what uses it, and a sharded leaf draws its part
without asking another device.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _tree


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_ROUNDS = 20
_PARITY = np.uint32(0x1BD11BDA)
_WORD = 2**32


def normal_like(params: Any, key: jax.Array) -> Any:
    r"""Returns independent standard normal numbers, shaped and typed as parameters.

    The number at flat index i of leaf l is a function of (key, l, i) alone: the same
    however the leaf is sharded, in every process and every version of JAX. Bits are those
    of Threefry-2x32 with 20 rounds; of each word 23 bits make a uniform number, and the
    normal one is $\sqrt 2\,\mathrm{erf}^{-1}$ of it. Complex leaves get half the variance
    in each part.

    Args:
      params: Tree of arrays; integers get zeros.
      key: PRNG key, of any implementation.

    References:
      Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    leaves, treedef = jax.tree.flatten(params)
    words = jax.random.bits(key, (2,), jnp.uint32)
    numbers = jnp.arange(len(leaves), dtype=jnp.uint32)
    keys = threefry(words, numbers, jnp.zeros_like(numbers))
    drawn = [_normal((keys[0][i], keys[1][i]), x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, drawn)


def threefry(key: Any, first: jax.Array, second: jax.Array) -> tuple[Any, Any]:
    """Returns two words of random bits for each counter, of Threefry-2x32.

    Args:
      key: Two words, uint32.
      first: Words of the counters, uint32.
      second: Their other words.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    a, b = first + schedule[0], second + schedule[1]
    for group in range(_ROUNDS // 4):
        for distance in _ROTATIONS[group % 2]:
            a = a + b
            b = ((b << distance) | (b >> (32 - distance))) ^ a
        a = a + schedule[(group + 1) % 3]
        b = b + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return a, b


def _normal(key: Any, x: Any) -> jax.Array:
    shape, dtype = jnp.shape(x), _tree.wide(jnp.zeros((), jnp.result_type(x))).dtype
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return jnp.zeros(shape, dtype)
    bits = threefry(key, *_counters(shape))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        real, imaginary = (_from_bits(word, jnp.finfo(dtype).dtype) for word in bits)
        return jax.lax.complex(real, imaginary) * np.asarray(math.sqrt(0.5), dtype)
    return _from_bits(bits[0], dtype)


def _counters(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns two words for each element, no pair of them twice."""
    inner = len(shape)
    while inner and math.prod(shape[inner - 1 :]) <= _WORD:
        inner -= 1
    return _flat(shape, range(inner, len(shape))), _flat(shape, range(inner))


def _flat(shape: tuple[int, ...], axes: range) -> jax.Array:
    """Returns the index along these axes, counted as if they were one."""
    found, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(axes):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        found, stride = found + index * np.uint32(stride), stride * shape[axis]
    return found


def _from_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    """Returns normal numbers of uniform words."""
    upper = (bits >> 9).astype(jnp.int32).astype(dtype)  # signed: a vector instruction
    uniform = (2 * upper + 1) * np.asarray(2.0**-23, dtype) - 1  # exact, in (-1, 1)
    return jax.lax.erf_inv(uniform) * np.asarray(math.sqrt(2), dtype)
