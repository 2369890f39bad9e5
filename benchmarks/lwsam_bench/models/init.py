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
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    scale = math.sqrt(2.0 / math.prod(shape[:-1]))
    return jnp.asarray(scale * rng.standard_normal(tuple(shape)), dtype)
