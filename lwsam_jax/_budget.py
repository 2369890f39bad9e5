"""Budgets: which layers can be afforded, and what is left over. In-graph."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._layers import Layers
from ._method import LayerwiseSAM
from ._selection import Cover


class Budget(NamedTuple):
    """What steps were charged and what they cost, in plain gradients.

    Attributes:
      unspent: f32[], savings that the next choice may spend; 0 without `mean_overhead`.
      mean_overhead: f32[], mean FLOPs overhead of the executables that ran.
    """

    unspent: jax.Array
    mean_overhead: jax.Array


class Purse:
    """Chooses masks within the budget of a method.

    A choice is charged the price of its cover, whatever executable runs it: so it is a
    function of the state alone, and never too low.
    """

    def __init__(
        self, method: LayerwiseSAM, layers: Layers, prices: tuple[float, ...]
    ) -> None:
        """Takes the overhead of the cover that starts at each layer."""
        self._method, self._layers = method, layers
        self._prices = np.asarray(prices, np.float32)
        self._within = np.ones(len(layers), bool)
        if method.max_overhead is not None:
            self._within = np.asarray(prices) <= method.max_overhead

    @property
    def affords_nothing(self) -> bool:
        """Whether no layer is within `max_overhead`."""
        return not self._within.any()

    def first(self) -> Budget:
        """Returns the budget before the first choice."""
        share = self._method.mean_overhead
        unspent = jnp.float32(0.0 if share is None else share)
        return Budget(unspent, jnp.zeros((), jnp.float32))

    def choose(
        self, norms: jax.Array, step_count: jax.Array, unspent: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the mask of a step, and the savings once it is paid for."""
        within = jnp.asarray(self._within)
        free = self._method.choose(norms, step_count, self._layers, within)
        share = self._method.mean_overhead
        if share is None:
            return free, unspent
        prices = jnp.asarray(self._prices)
        price = lambda mask: jnp.max(jnp.where(mask, prices, 0.0))
        frugal = self._method.choose(
            norms, step_count, self._layers, within & (prices <= share)
        )
        mask = jnp.where(price(free) <= unspent, free, frugal)
        cap = max(float(self._prices.max()), share)
        return mask, jnp.minimum(unspent - price(mask) + share, cap)

    def covers(self, count: int) -> list[Cover]:
        """Returns the plain cover and up to `count` others, by rising price.

        The dearest holds all layers that may be chosen; the others divide its price as
        evenly as they can.
        """
        admitted = [
            d for d, ok in zip(self._layers.depth, self._within, strict=True) if ok
        ]
        price = dict(zip(self._layers.depth, self._prices.tolist(), strict=True))
        cuts = sorted(admitted, key=lambda d: (price[d], -d))
        if len(cuts) > max(count, 1):
            aims = [price[cuts[-1]] * part / count for part in range(1, count)]
            below = lambda aim: max(
                (i for i, d in enumerate(cuts) if price[d] <= aim), default=0
            )
            kept = {*map(below, aims), len(cuts) - 1}
            cuts = [cuts[i] for i in sorted(kept)]
        return [Cover(()), *(Cover(self._layers.from_depth(d)) for d in cuts)]


def running_mean(mean: jax.Array, x: jax.Array, step_count: jax.Array) -> jax.Array:
    """Returns the mean after one more value; `step_count` values went before."""
    return mean + (x - mean) / (step_count + 1).astype(mean.dtype)
