"""Initial weights, drawn by NumPy.

XLA takes about a second to compile a random draw of a new shape, so drawing with JAX
would take longer than the first epochs of a small network.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def he_normal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Return normal weights of variance 2 / fan-in (He et al., 2015).

    Args:
      key: A PRNG key; not traced.
      shape: Of the weights; the last axis is that of the outputs.
      dtype: Of the weights.
    """
    return _normal(key, shape, 2.0, dtype)


def small_normal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Return normal weights of variance 1 / (3 fan-in), for the last layer.

    The residual sums that it reads grow with each block. From weights of `he_normal` the
    first gradients are so large that a perturbation in proportion to them, the default
    of layer-wise SAM, ends training before it begins.
    """
    return _normal(key, shape, 1.0 / 3.0, dtype)


def _normal(key: Array, shape: Sequence[int], gain: float, dtype: Any) -> Array:
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    scale = math.sqrt(gain / math.prod(shape[:-1]))
    return jnp.asarray(scale * rng.standard_normal(tuple(shape)), dtype)
