"""Selectors: which layers a step perturbs, from their norms, in-graph."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _checks
from ._layers import Layers


Selector = Callable[[jax.Array, jax.Array], jax.Array]


def _ranks(scores: jax.Array, depth: Sequence[int] | None) -> jax.Array:
    """Returns each layer's rank by falling score; ties go to the deepest layer.

    Pairwise, since L is small and a sort with two keys costs more than L * L compares.
    """
    deeper = jnp.arange(scores.shape[0]) if depth is None else jnp.asarray(depth)
    ahead = (scores[None, :] > scores[:, None]) | (
        (scores[None, :] == scores[:, None]) & (deeper[None, :] > deeper[:, None])
    )
    return jnp.sum(ahead, axis=1)


@dataclasses.dataclass(frozen=True)
class _Best:
    """The k layers of highest score; the score is a function of (norms, key)."""

    k: Any
    score: Callable[[jax.Array, jax.Array | None], jax.Array]
    depth: tuple[int, ...] | None = None

    def bind(self, layers: Layers) -> _Best:
        if _checks.is_number(self.k) and self.k > len(layers):
            remedy = (
                f"Pass k <= {len(layers)}; the layers are {', '.join(layers.names)}."
            )
            raise ValueError(
                _checks.message(
                    "lwsam",
                    "k",
                    f"<= the number of layers, {len(layers)}",
                    self.k,
                    remedy,
                )
            )
        return dataclasses.replace(self, depth=layers.depth)

    def __call__(self, norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
        finite = jnp.isfinite(norms)
        scores = jnp.where(finite, self.score(norms, key), -jnp.inf)
        return (_ranks(scores, self.depth) < self.k) & finite


def _high(norms, key):
    del key
    return norms


def _low(norms, key):
    del key
    return -norms


def _uniform(norms, key):
    if key is None:
        remedy = "Pass a jax.random.key; inside a transformation it comes from seed=."
        raise TypeError(_checks.message("random_k", "key", "a PRNG key", None, remedy))
    return jax.random.uniform(key, norms.shape, norms.dtype)


def top_k(k: int) -> Selector:
    """Selects the k layers of the largest gradient norm (Algorithm 1, line 4).

    Args:
      k: Number of layers, >= 0; may be a traced integer.

    Returns:
      A selector `(norms f32[L], key) -> bool[L]`. Ties go to the deepest layers; a
      non-finite norm is never selected, so that fewer than k may be.

    Raises:
      TypeError: If k is not an integer.
      ValueError: If k is negative, or (once the layers are known) larger than L.

    Examples:
      >>> import jax.numpy as jnp
      >>> top_k(2)(jnp.array([3.0, 1.0, 2.0]), None).tolist()
      [True, False, True]
    """
    _checks.count_of_layers("top_k", "k", k)
    return _Best(k, _high)


def bottom_k(k: int) -> Selector:
    """Selects the k layers of the smallest gradient norm (Table 3, Low-Norm).

    Args, returns and raises are those of `top_k`.
    """
    _checks.count_of_layers("bottom_k", "k", k)
    return _Best(k, _low)


def random_k(k: int) -> Selector:
    """Selects k layers uniformly at random, without replacement (Table 3, Random).

    Args, returns and raises are those of `top_k`; the selector needs its key.
    """
    _checks.count_of_layers("random_k", "k", k)
    return _Best(k, _uniform)


@dataclasses.dataclass(frozen=True)
class _Named:
    pattern: str
    chosen: tuple[bool, ...] | None = None

    def bind(self, layers: Layers) -> _Named:
        chosen = tuple(bool(re.search(self.pattern, name)) for name in layers.names)
        if not any(chosen):
            remedy = f"The layers are: {', '.join(layers.names)}."
            raise ValueError(
                _checks.message(
                    "named", "regex", "found in a layer's name", self.pattern, remedy
                )
            )
        return dataclasses.replace(self, chosen=chosen)

    def __call__(self, norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
        del key
        if self.chosen is None:
            remedy = "Call named(regex).bind(layers) first, with the Layers it is for."
            raise TypeError(
                _checks.message(
                    "named", "layers", "known", "an unbound selector", remedy
                )
            )
        return jnp.asarray(self.chosen) & jnp.isfinite(norms)


def named(regex: str) -> Selector:
    """Selects the layers in whose name `re.search(regex, name)` finds something.

    Args:
      regex: A regular expression over the names of `Layers.names`.

    Returns:
      A selector `(norms, key) -> bool[L]`, bound to the layers by the transformation;
      a direct call needs `named(regex).bind(layers)`.

    Raises:
      ValueError: If it is no regular expression, or (once the layers are known) names
        none of them.
    """
    try:
        re.compile(regex)
    except (re.error, TypeError) as error:
        remedy = f"Python's re says: {error}."
        raise ValueError(
            _checks.message("named", "regex", "a regular expression", regex, remedy)
        ) from None
    return _Named(regex)


def _everything(norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
    del key
    return jnp.isfinite(norms)


def _nothing(norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
    del key
    return jnp.zeros(norms.shape, bool)


def everything() -> Selector:
    """Selects every layer (whose norm is finite): generalized SAM, or SAM at alpha=1."""
    return _everything


def nothing() -> Selector:
    """Selects no layer: the base optimizer."""
    return _nothing


def bind(selector: Selector, layers: Layers) -> Selector:
    """Tells a selector which layers there are, if it wants to know."""
    return selector.bind(layers) if hasattr(selector, "bind") else selector
