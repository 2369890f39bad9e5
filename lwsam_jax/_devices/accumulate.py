"""A loss on a large batch that is seen a cut at a time, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._axes.ascent import batch_size


class Cuts(NamedTuple):
    """How a batch is accumulated.

    Attributes:
      count: In how many cuts; 1: as a whole.
      weight: Weight of a cut, from its batch; None: the same for all.
    """

    count: int = 1
    weight: Callable[[Any], Any] | None = None


class Accumulated:
    r"""The weighted mean of a loss over n cuts of a batch: $\sum_i w_i L_i / \sum_i w_i$.

    Its gradient is summed while a `lax.scan` runs over the cuts, in float32 or wider, so
    that what a backward pass needs is held for one cut at a time. The model state goes
    from cut to cut; of the metrics floats are averaged as the loss is, integers summed.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, Any]]],
        model_state: Any,
        cut: Callable[[jax.Array], Any],
        cuts: Cuts,
        key: jax.Array,
    ) -> None:
        """Takes the loss of a cut, and the cuts as a function of their number.

        Args:
          loss: `(params, model_state, batch, key) -> (value, (model_state, metrics))`.
          model_state: What the first cut begins with.
          cut: Number of a cut, int32[], to its batch.
          cuts: How many there are, and their weights.
          key: PRNG key, folded with the number of the cut.
        """
        self._loss, self._model_state = loss, model_state
        self._cut, self._count, self._key = cut, cuts.count, key
        self._weight = cuts.weight or (lambda _: 1.0)

    def __call__(self, params: Any) -> tuple[jax.Array, Any]:
        """Returns (value, (model_state, metrics)) of all cuts."""
        return self.of_each(lambda loss: (loss(params), ()))[0]

    def of_each(self, evaluate: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Returns the mean over the cuts of what `evaluate` returns of their losses.

        Args:
          evaluate: The loss of a cut to ((value, aux), gradients).
        """
        dtypes: Any = None

        def of(number, model_state):
            nonlocal dtypes
            batch = self._cut(number)
            key = jax.random.fold_in(self._key, number)
            loss = lambda params: self._loss(params, model_state, batch, key)
            ((value, (after, metrics)), grads) = evaluate(loss)
            dtypes = jax.tree.map(lambda g: g.dtype, grads)
            weight = jnp.asarray(self._weight(batch), _tree.wide(value).dtype)
            sums = weight, weight * value, _weighted(metrics, weight)
            return after, (*sums, _weighted(grads, weight))

        def body(carry, number):
            model_state, sums = carry
            model_state, more = of(number, model_state)
            return (model_state, jax.tree.map(jnp.add, sums, more)), None

        _, shapes = jax.eval_shape(of, jnp.int32(0), self._model_state)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        numbers = jnp.arange(self._count)
        (model_state, sums), _ = jax.lax.scan(body, (self._model_state, zeros), numbers)
        weight, value, metrics, grads = sums
        scale = _tree.reciprocal(weight)
        mean = lambda tree: jax.tree.map(lambda x: _times(x, scale), tree)
        grads = jax.tree.map(lambda g, d: g.astype(d), mean(grads), dtypes)
        return (value * scale, (model_state, mean(metrics))), grads


def _weighted(tree: Any, weight: jax.Array) -> Any:
    """Scales floats, in float32 or wider; integers are counts, booleans too."""

    def one(x):
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return _times(_tree.wide(x), weight)
        return x.astype(jnp.int32) if x.dtype == jnp.bool_ else x

    return jax.tree.map(one, tree)


def _times(x: jax.Array, scale: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return x * scale.astype(x.real.dtype)


def as_cuts(who: str, accumulate: Any, weight: Any, method: Any) -> Cuts:
    """Returns how a batch is accumulated; raises on what cannot be right."""
    remedy = "Pass in how many cuts a batch is seen; 1 is as a whole."
    _checks.count(who, "accumulate", accumulate, remedy)
    if accumulate < 1:
        raise _checks.value_error(who, "accumulate", ">= 1", accumulate, remedy)
    if weight is not None:
        remedy = "Pass weight=lambda cut: jnp.sum(cut['mask']), the weight of its mean."
        _checks.is_callable(who, "weight", weight, remedy)
        if accumulate == 1:
            got, remedy = "given", "Leave it out, or pass accumulate=n."
            expected = "left out where nothing is accumulated"
            raise _checks.value_error(who, "weight", expected, got, remedy)
    for name in ("descent", "split"):
        if accumulate > 1 and getattr(method, name) is not None:
            remedy = "Leave one of them out."
            got = f"{accumulate} with a method that has a `{name}`"
            raise _checks.value_error(who, "accumulate", "1", got, remedy)
    return Cuts(accumulate, weight)


def cut_shapes(who: str, batch: Any, count: int) -> Any:
    """Returns the shapes of one of so many cuts; raises where a batch does not divide."""
    if count == 1:
        return batch
    examples = batch_size(who, batch)
    if examples % count:
        remedy = "Pad the batch, drop its remainder, or cut it in fewer."
        expected = f"divisible by the {count} cuts of `accumulate`"
        raise _checks.value_error(
            who, "batch", expected, f"{examples} examples", remedy
        )
    shape = lambda x: jax.ShapeDtypeStruct((examples // count, *x.shape[1:]), x.dtype)
    return jax.tree.map(lambda x: shape(x) if x.shape else x, batch)


def in_cuts(
    loss: Callable[..., Any],
    model_state: Any,
    batch: Any,
    constants: tuple[Any, ...],
    key: jax.Array,
    cuts: Cuts,
    on_shares: Callable[..., Any],
) -> Accumulated:
    """Returns the loss on a batch of which each cut has a part of each device's share."""
    one = lambda share, number: _cut(share, number, cuts.count)
    return Accumulated(
        lambda p, *rest: loss(p, *rest, *constants),
        model_state,
        lambda number: on_shares(one, batch, number),
        cuts,
        key,
    )


def _cut(batch: Any, number: jax.Array, count: int) -> Any:
    """Returns a cut of a device's share."""
    size = batch_size("TrainStep", batch) // count
    one = lambda x: jax.lax.dynamic_slice_in_dim(x, number * size, size)
    return jax.tree.map(lambda x: one(x) if jnp.ndim(x) else x, batch)
