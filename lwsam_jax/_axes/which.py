"""WHICH layers a step perturbs: selectors, from the layers' gradient norms, in-graph.

A selector of one's own is a function `(norms f32[L], key) -> bool[L]`. There the norm of
a layer that may not be chosen, for a budget or because it is not finite, is -1: a mean
of the others is `jnp.mean(norms, where=norms >= 0)`.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks
from .._engine.layers import Layers


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
        check_count(self.k, layers)
        return dataclasses.replace(self, depth=layers.depth)

    def __call__(self, norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
        allowed = _allowed(norms)
        return best_of(self.score(norms, key), allowed, self.k, self.depth)


def best_of(
    scores: jax.Array, allowed: jax.Array, k: Any, depth: Sequence[int] | None
) -> jax.Array:
    """Returns bool[L], the k layers of the highest score among those that are allowed."""
    # The lowest number, not -inf: jax_debug_infs stops on that.
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    return (_ranks(scores, depth) < k) & allowed


def check_count(k: Any, layers: Layers) -> None:
    """Raises if there are fewer layers than a selector takes."""
    if _checks.is_number(k) and k > len(layers):
        remedy = f"Pass k <= {len(layers)}; the layers are {', '.join(layers.names)}."
        expected = f"<= the number of layers, {len(layers)}"
        raise _checks.value_error("lwsam", "k", expected, k, remedy)


def _allowed(norms: jax.Array) -> jax.Array:
    return jnp.isfinite(norms) & (norms >= 0)


def _high(norms, key):
    del key
    return norms


def _low(norms, key):
    del key
    return -norms


def _uniform(norms, key):
    if key is None:
        remedy = "Pass a jax.random.key; inside a transformation it comes from seed=."
        raise _checks.type_error("random_k", "key", "a PRNG key", None, remedy)
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
            raise _checks.value_error(
                "named", "regex", "found in a layer's name", self.pattern, remedy
            )
        return dataclasses.replace(self, chosen=chosen)

    def __call__(self, norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
        del key
        if self.chosen is None:
            remedy = "Call named(regex).bind(layers) first, with the Layers it is for."
            raise _checks.type_error(
                "named", "layers", "known", "an unbound selector", remedy
            )
        return jnp.asarray(self.chosen) & _allowed(norms)


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
        raise _checks.value_error(
            "named", "regex", "a regular expression", regex, remedy
        ) from None
    return _Named(regex)


def _everything(norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
    del key
    return _allowed(norms)


def _nothing(norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
    del key
    return jnp.zeros(norms.shape, bool)


def everything() -> Selector:
    """Selects every layer (whose norm is finite): generalized SAM, or SAM at alpha=1."""
    return _everything


def nothing() -> Selector:
    """Selects no layer: the base optimizer."""
    return _nothing


class Learner(abc.ABC):
    """A selector that keeps something from step to step.

    It is called with its own scores in place of the norms. One of one's own defines all
    four methods.
    """

    @abc.abstractmethod
    def init(self, count: int, dtype: Any) -> Any:
        """Returns what is kept before the first step, for so many layers."""

    @abc.abstractmethod
    def observe(self, kept: Any, norms: jax.Array, mask: jax.Array) -> Any:
        """Returns what is kept after a step.

        Args:
          kept: What `init` or the step before returned.
          norms: f32[L], gradient norms of the step.
          mask: bool[L], layers that it perturbed.
        """

    @abc.abstractmethod
    def scores(self, kept: Any) -> jax.Array:
        """Returns f32[L] >= 0, what is chosen by."""

    @abc.abstractmethod
    def __call__(self, norms: jax.Array, key: jax.Array) -> jax.Array:
        """Returns bool[L] from the scores; -1 stands for a layer that may not be."""


def bind(selector: Selector, layers: Layers) -> Selector:
    """Tells a selector which layers there are, if it wants to know."""
    return selector.bind(layers) if hasattr(selector, "bind") else selector


def always_chosen(selector: Selector, layers: Layers) -> tuple[bool, ...] | None:
    """Returns the layers that a selector chooses in every step, None if not known."""
    if selector is _everything:
        return (True,) * len(layers)
    if selector is _nothing:
        return (False,) * len(layers)
    return getattr(bind(selector, layers), "chosen", None)


def choose(
    selector: Selector,
    norms: jax.Array,
    key: jax.Array,
    layers: Layers,
    eligible: jax.Array | None = None,
) -> jax.Array:
    """Returns bool[L], what a selector chooses among the layers that it may.

    Args:
      selector: The selector.
      norms: f32[L], of the last step known.
      key: PRNG key of the choice.
      layers: The layers.
      eligible: bool[L], which of them may be chosen; None: all.

    Raises:
      ValueError: If the selector returns no mask.
    """
    allowed = jnp.isfinite(norms)
    if eligible is not None:
        allowed = allowed & eligible
    offered = jnp.where(allowed, norms, -1.0)
    mask = jnp.asarray(bind(selector, layers)(offered, key))
    if mask.shape != norms.shape or mask.dtype != jnp.bool_:
        remedy = "Return one bool for each layer, in pytree order."
        got = f"{mask.dtype}{list(mask.shape)}"
        expected = f"a function to bool[{len(layers)}]"
        raise _checks.value_error("lwsam", "select", expected, got, remedy)
    return mask & allowed


def selects_nothing(selector: Selector) -> bool:
    """Returns whether it is known now that a selector never chooses a layer."""
    k = getattr(selector, "k", None)
    return selector is _nothing or (_checks.is_number(k) and k == 0)
