"""WHEN a step perturbs: a predicate of the step count; the other steps are plain.

A predicate of one's own is a function `int32[] -> bool[]`, traced with the step. A `Gate`
decides later, within the step, when the ascent gradient is known.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks


Predicate = Callable[[Any], Any]


def always() -> Predicate:
    """Returns the predicate that is true at every step."""
    return _always


def _always(step: jax.Array) -> jax.Array:
    return jnp.ones_like(step, bool)


def every(n: int) -> Predicate:
    """Returns the predicate that is true at steps 0, n, 2n, ...

    Args:
      n: Period in steps, >= 1.

    Raises:
      ValueError: If n is not a positive integer.
    """
    if not _checks.is_number(n) or n != int(n) or n < 1:
        remedy = "Pass the period in steps; 1 perturbs in every step."
        raise _checks.value_error("every", "n", "an integer >= 1", repr(n), remedy)
    return lambda step: step % int(n) == 0


def last(fraction: float, total_steps: int) -> Predicate:
    """Returns the predicate that is true in the tail of a run.

    Args:
      fraction: Share of the steps, in [0, 1]; their number is rounded up.
      total_steps: Steps of the whole run, >= 1.

    Raises:
      ValueError: For numbers out of range.

    References:
      Zhou et al., Sharpness-aware minimization efficiently selects flatter minima late
      in training, ICLR 2025, arXiv:2410.10373.
    """
    if not _checks.is_number(fraction) or not 0 <= fraction <= 1:
        remedy = "0.3 perturbs in the last 30 % of the steps."
        expected = "a number in [0, 1]"
        raise _checks.value_error("last", "fraction", expected, repr(fraction), remedy)
    remedy = "Pass the number of steps of the whole run."
    _checks.count("last", "total_steps", total_steps, remedy)
    start = total_steps - math.ceil(fraction * total_steps - 1e-9)
    return lambda step: step >= start


def between(start: int, stop: int) -> Predicate:
    """Returns the predicate that is true at steps start, start + 1, ..., stop - 1.

    Args:
      start: First step, >= 0.
      stop: The step after the last one, >= start.

    Raises:
      ValueError: If stop < start, or one of them is negative.
      TypeError: If one of them is no integer.
    """
    remedy = "Pass step counts, as in range(start, stop)."
    _checks.count("between", "start", start, remedy)
    _checks.count("between", "stop", stop, remedy)
    if stop < start:
        raise _checks.value_error("between", "stop", f">= start, {start}", stop, remedy)
    return lambda step: (step >= start) & (step < stop)


class Gate(abc.ABC):
    """A decision within the step: whether its ascent gradient is worth a descent.

    Where it is not, the ascent gradient itself is that of the step, which costs no more
    then than a plain one. One of one's own defines both methods.
    """

    @abc.abstractmethod
    def init(self, dtype: Any) -> Any:
        """Returns what is kept before the first step: arrays of a dtype."""

    @abc.abstractmethod
    def decide(self, kept: Any, square_norm: jax.Array, step: Any) -> tuple[Any, Any]:
        """Returns whether the step perturbs, bool[], and what is kept then.

        Args:
          kept: What `init` or the step before returned.
          square_norm: Of the ascent gradient of all leaves, over all devices.
          step: Number of the step.
        """

    def refuse(self, who: str, method: Any) -> None:
        """Raises where there is no ascent gradient, or no plain one to fall back to."""
        for name, found in (
            ("ascent", method.is_stale),
            ("descent", method.descent),
            ("split", method.split),
        ):
            if found:
                remedy = "Pass a predicate, such as lwsam.every(2), or other parts."
                expected = "None, for `when` decides once, in between"
                if name == "ascent":
                    expected = "one with a gradient of the step, for `when` reads it"
                raise _checks.value_error(who, name, expected, "another", remedy)


@dataclasses.dataclass(frozen=True)
class _Unusual(Gate):
    total_steps: int
    decay: float
    first: float
    last: float

    def init(self, dtype: Any) -> Any:
        return jnp.zeros((), dtype), jnp.zeros((), dtype)

    def decide(self, kept: Any, square_norm: jax.Array, step: Any) -> tuple[Any, Any]:
        mean, variance = kept
        fresh = 1 - self.decay
        mean = self.decay * mean + fresh * square_norm
        variance = self.decay * variance + fresh * (square_norm - mean) ** 2
        share = jnp.minimum(jnp.asarray(step, mean.dtype) / self.total_steps, 1)
        many = share * self.last + (1 - share) * self.first
        return square_norm >= mean + many * jnp.sqrt(variance), (mean, variance)


def unusual(
    total_steps: int, *, decay: float = 0.9, first: float = 1.0, last: float = -1.0
) -> Gate:
    r"""Returns the gate that opens where the gradient is large beside those before.

    It opens where $\|g\|^2 \ge \mu + c\,\sigma$, with the average $\mu$ of $\|g\|^2$ and
    that of $(\|g\|^2 - \mu)^2$, $\sigma^2$; both start at 0, and the present $g$ is in
    them. $c$ goes from `first` to `last` in a straight line over the run.

    Args:
      total_steps: Steps of the whole run, >= 1.
      decay: Of the averages, in [0, 1).
      first: $c$ at step 0.
      last: $c$ at the end.

    Raises:
      ValueError: For numbers out of range.

    References:
      AE-SAM, Jiang et al., ICLR 2023, arXiv:2304.14647; see `ae_sam`.
    """
    remedy = "Pass the number of steps of the whole run."
    _checks.count("unusual", "total_steps", total_steps, remedy)
    if total_steps < 1:
        raise _checks.value_error("unusual", "total_steps", ">= 1", 0, remedy)
    if not _checks.is_number(decay) or not 0 <= decay < 1:
        remedy = "0.9 is the paper's."
        raise _checks.value_error("unusual", "decay", "in [0, 1)", repr(decay), remedy)
    for name, x in (("first", first), ("last", last)):
        if not _checks.is_number(x) or not math.isfinite(x):
            remedy = "1 and -1 are the paper's."
            raise _checks.value_error("unusual", name, "finite", repr(x), remedy)
    return _Unusual(total_steps, float(decay), float(first), float(last))
