"""Loss scaling for float16, whose gradients vanish below 6e-8 and overflow above 65504.

The cotangent of the loss is the scale in place of 1, so that all gradients on the way
are larger by it; those that come out are divided by it in float32. Nothing of the loss
itself changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree


_WHO = "DynamicLossScale"


class LossScaleState(NamedTuple):
    """The scale of the next step; arrays, for a checkpoint.

    Attributes:
      scale: f32[], what the gradients on the way are multiplied by.
      good_steps: int32[], steps since it last changed.
    """

    scale: jax.Array
    good_steps: jax.Array


@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """A loss scale that follows what overflows: the largest that does not, nearly always.

    A step in which anything is not finite divides the scale by `factor`; after `period`
    finite steps in a row it is multiplied by it. `TrainStep(loss_scale=...)` does all
    of it; in a loop of one's own:

    >>> import jax.numpy as jnp, lwsam_jax as lwsam
    >>> scaler = lwsam.DynamicLossScale()
    >>> loss = lambda p: jnp.sum((p["w"].astype(jnp.float16) ** 2).astype(jnp.float32))
    >>> gradient = lwsam.value_and_grad(loss, ("w",), method=lwsam.sam(0.05))
    >>> state = scaler.init()
    >>> out = gradient({"w": jnp.ones((2, 2))}, loss_scale=state.scale)
    >>> state = scaler.update(state, out.finite)  # and take the step only if it is

    Attributes:
      initial: The first scale.
      factor: What it is divided or multiplied by, > 1; powers of 2 round nothing.
      period: Finite steps in a row after which it grows.
      minimum: It never falls below.

    Raises:
      ValueError: For numbers out of range.
      TypeError: For what is no number.

    References:
      Micikevicius et al., Mixed precision training, ICLR 2018, arXiv:1710.03740; the
      defaults are those of `jmp.DynamicLossScale`.
    """

    initial: float = 2.0**15
    factor: float = 2.0
    period: int = 2000
    minimum: float = 1.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        remedy = "Pass a number > 0, such as 2.0**15."
        for name in ("initial", "minimum"):
            check(_WHO, name, getattr(self, name), remedy)
        check(_WHO, "factor", self.factor, "2 is usual.", above=1.0)
        _checks.count(
            _WHO, "period", self.period, "Pass a number of steps, such as 2000."
        )
        if self.period < 1:
            remedy = "Pass a number of steps, such as 2000."
            raise _checks.value_error(_WHO, "period", ">= 1", self.period, remedy)

    def init(self) -> LossScaleState:
        """Returns the state before the first step."""
        scale = jnp.asarray(self.initial, jnp.float32)
        return LossScaleState(scale, jnp.zeros((), jnp.int32))

    def update(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        """Returns the state after a step.

        Args:
          state: The state that the step had.
          finite: bool[], whether the values and gradients of both passes are finite.
        """
        good = jnp.where(finite, state.good_steps + 1, 0)
        grows = good >= self.period
        # A scale of inf would never come back.
        most = float(jnp.finfo(jnp.float32).max) / self.factor
        more = jnp.minimum(state.scale, most) * self.factor
        larger = jnp.where(state.scale <= most, more, state.scale)
        smaller = jnp.maximum(state.scale / self.factor, self.minimum)
        scale = jnp.where(finite, jnp.where(grows, larger, state.scale), smaller)
        return LossScaleState(scale, jnp.where(grows, 0, good).astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class _Constant:
    """A scale that stays."""

    scale: float

    def init(self) -> LossScaleState:
        return LossScaleState(jnp.float32(self.scale), jnp.zeros((), jnp.int32))

    def update(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        good = jnp.where(finite, state.good_steps + 1, 0).astype(jnp.int32)
        return state._replace(good_steps=good)


def as_loss_scale(who: str, loss_scale: Any) -> Any:
    """Returns what has `init` and `update`, of what a user may pass; None is None."""
    if loss_scale is None or isinstance(loss_scale, DynamicLossScale):
        return loss_scale
    if _checks.is_number(loss_scale):
        check(who, "loss_scale", loss_scale, "Pass a number > 0, such as 1024.")
        return _Constant(float(loss_scale))
    remedy = "Pass lwsam.DynamicLossScale(), a number, or None."
    expected = "a loss scale"
    raise _checks.type_error(who, "loss_scale", expected, repr(loss_scale), remedy)


def check(who: str, name: str, value: Any, remedy: str, above: float = 0.0) -> None:
    """Raises unless a value is a finite number above a bound."""
    if not _checks.is_number(value):
        raise _checks.type_error(who, name, "a number", repr(value), remedy)
    if not above < float(value) < float("inf"):
        expected = f"finite and > {above:g}"
        raise _checks.value_error(who, name, expected, value, remedy)


def value_and_grad(loss: Callable[[Any], Any], at: Any, scale: Any) -> Any:
    """Returns ((value, aux), gradient), the gradient larger by the scale.

    Args:
      loss: To (value, aux); one that is the mean of others has `of_each`.
      at: Where.
      scale: f32[], or None for 1.
    """
    if hasattr(loss, "of_each"):
        return loss.of_each(lambda one: value_and_grad(one, at, scale))
    if scale is None:
        return jax.value_and_grad(loss, has_aux=True)(at)
    value, pull, aux = jax.vjp(loss, at, has_aux=True)
    return (value, aux), pull(seed(value, scale))[0]


def seed(value: jax.Array, scale: Any) -> jax.Array:
    """Returns the cotangent of a loss."""
    one = jnp.ones_like(value)
    return one if scale is None else one * scale.astype(value.dtype)


def unscaled(tree: Any, scale: Any) -> Any:
    """Returns gradients without the scale, wide; as they came where there is none."""
    if scale is None:
        return tree

    def divide(x):
        x = _tree.wide(x)
        return x / scale.astype(jnp.real(x).dtype)

    return jax.tree.map(divide, tree)


def narrowed(tree: Any, like: Any, scale: Any) -> Any:
    """Returns unscaled gradients of the dtypes of their parameters."""
    if scale is None:
        return tree
    return jax.tree.map(lambda x, w: x.astype(w.dtype), tree, like)
