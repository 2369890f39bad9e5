"""WHEN a step perturbs: a predicate of the step count; the other steps are plain.

A predicate of one's own is a function `int32[] -> bool[]`, traced with the step.
"""

from __future__ import annotations

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
