"""Initial weights, drawn by NumPy.

XLA takes about a second to compile a random draw of a new shape, so drawing with JAX
would take longer than the first epochs of a small network. Under tracing, where only
shapes matter (`jax.eval_shape`), nothing is drawn.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


def he_normal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Return normal weights of variance 2 / fan-in (He et al., 2015).

    Args:
      key: A PRNG key.
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


def normal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Return normal weights of standard deviation 0.02, as transformers have them."""
    return _draw(key, shape, 0.02, dtype)


def _normal(key: Array, shape: Sequence[int], gain: float, dtype: Any) -> Array:
    return _draw(key, shape, math.sqrt(gain / math.prod(shape[:-1])), dtype)


def _draw(key: Array, shape: Sequence[int], scale: float, dtype: Any) -> Array:
    if isinstance(key, Tracer):
        return jnp.zeros(shape, dtype)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    return jnp.asarray(scale * rng.standard_normal(tuple(shape)), dtype)
