"""Budgets: which layers can be afforded, and what is left over. In-graph."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._engine.layers import Layers
from .._method import Method
from .executables import Menu


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

    A choice is charged the price of the executable that the menu has for it: so it is a
    function of the state alone.
    """

    def __init__(self, method: Method, layers: Layers, menu: Menu) -> None:
        """Takes what there is to buy."""
        self._method, self._layers = method, layers
        self._prices = menu.layer_prices.astype(np.float32)
        self._within = np.isfinite(self._prices)

    def first(self) -> Budget:
        """Returns the budget before the first choice."""
        share = self._method.mean_overhead
        unspent = jnp.float32(0.0 if share is None else share)
        return Budget(unspent, jnp.zeros((), jnp.float32))

    def choose(
        self, norms: jax.Array, step_count: jax.Array, unspent: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the mask of a step, and the savings once it is paid for."""
        method, within = self._method, jnp.asarray(self._within)
        eligible = None if self._within.all() else within
        free = method.choose(norms, step_count, self._layers, eligible)
        share = method.mean_overhead
        if share is None:
            return free, unspent
        prices = jnp.asarray(np.where(self._within, self._prices, 0.0))
        price = lambda mask: jnp.max(jnp.where(mask, prices, 0.0))
        frugal = method.choose(
            norms, step_count, self._layers, within & (prices <= share)
        )
        mask = jnp.where(price(free) <= unspent, free, frugal)
        cap = max(float(self._prices[self._within].max(initial=0.0)), share)
        return mask, jnp.minimum(unspent - price(mask) + share, cap)


def running_mean(mean: jax.Array, x: jax.Array, step_count: jax.Array) -> jax.Array:
    """Returns the mean after one more value; `step_count` values went before."""
    return mean + (x - mean) / (step_count + 1).astype(mean.dtype)
