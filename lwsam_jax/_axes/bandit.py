"""A selector that learns from step to step which layers are worth a perturbation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks
from .._engine.layers import Layers
from .which import best_of, check_count, Learner


@dataclasses.dataclass(frozen=True)
class _Bandit(Learner):
    k: int
    rate: float
    explore: float
    depth: tuple[int, ...] | None = None

    def bind(self, layers: Layers) -> _Bandit:
        check_count(self.k, layers)
        return dataclasses.replace(self, depth=layers.depth)

    def init(self, count: int, dtype: Any) -> jax.Array:
        return jnp.zeros((count,), dtype)

    def scores(self, kept: jax.Array) -> jax.Array:
        share = self.explore / kept.shape[0]
        return (1 - self.explore) * jax.nn.softmax(kept) + share

    def observe(self, kept: jax.Array, norms: jax.Array, mask: jax.Array) -> jax.Array:
        usable = jnp.where(mask & jnp.isfinite(norms), norms, 0)
        largest = jnp.max(usable)
        reward = usable / jnp.where(largest > 0, largest, 1)
        # The chance to be among k is about k times that of one draw.
        chance = jnp.minimum(self.k * self.scores(kept), 1)
        kept = kept + self.rate * reward / chance
        return kept - jnp.max(kept)

    def __call__(self, norms: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if key is None:
            remedy = (
                "Pass a jax.random.key; inside a transformation it comes from seed=."
            )
            raise _checks.type_error("bandit", "key", "a PRNG key", None, remedy)
        allowed = norms >= 0
        drawn = jax.random.gumbel(key, norms.shape, norms.dtype)
        return best_of(
            jnp.log(jnp.where(allowed, norms, 1)) + drawn, allowed, self.k, self.depth
        )


def bandit(k: int, *, rate: float = 0.1, explore: float = 0.2) -> Learner:
    r"""Selects k layers at random, with chances that follow their gradient norms (EXP3).

    With weights $v_l$, 0 at first, the chance of a layer is
    $p_l = (1 - \gamma)\,e^{v_l} / \sum_j e^{v_j} + \gamma / L$, and k are drawn without
    replacement. After a step each of its layers has the reward
    $r_l = \|\hat g_l\| / \max_j \|\hat g_j\|$, and
    $v_l \leftarrow v_l + \eta\,r_l / \min(1, k\,p_l)$.

    Args:
      k: Number of layers, >= 1.
      rate: $\eta$, >= 0; 0 draws uniformly.
      explore: $\gamma$, in [0, 1]: the share of the draws that is uniform.

    Raises:
      ValueError: For numbers out of range, or (once the layers are known) k above L.

    References:
      Auer et al., SIAM J. Comput. 2002, for EXP3; its use for layers: SL-SAM,
      arXiv:2602.09395; see `sl_sam`.
    """
    _checks.count_of_layers("bandit", "k", k)
    if k < 1:
        remedy = "Pass how many layers a step takes."
        raise _checks.value_error("bandit", "k", ">= 1", k, remedy)
    _checks.non_negative("bandit", "rate", rate, "0.1 is a place to start from.")
    _checks.share("bandit", "explore", explore, "0.2 draws a fifth uniformly.")
    return _Bandit(k, float(rate), float(explore))
