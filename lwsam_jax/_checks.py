"""Argument checks; each message names who, which argument, what came, the remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any


NORMALIZE = ("none", "selected", "full")
AUX_FROM = ("clean", "perturbed")


def message(who: str, argument: str, expected: str, got: Any, remedy: str) -> str:
    """Returns the one shape that all of our error messages have.

    `got` is shown as it is if it is text, so pass `repr` of a value that may be a string.
    """
    text = got if isinstance(got, str) else repr(got)
    return f"{who}: expected `{argument}` to be {expected}, got {text}. {remedy}"


def is_number(x: Any) -> bool:
    """Whether `x` is a Python (or NumPy) number whose value is known now."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def non_negative(who: str, argument: str, x: Any, remedy: str) -> None:
    """Raises unless `x` is finite and >= 0; arrays and schedules pass unread."""
    if isinstance(x, (str, bool)) or x is None:
        raise TypeError(
            message(who, argument, "a number or a schedule", repr(x), remedy)
        )
    if is_number(x) and not (math.isfinite(x) and x >= 0):
        raise ValueError(message(who, argument, "finite and >= 0", x, remedy))


def rho(who: str, x: Any) -> None:
    """Checks a perturbation radius."""
    non_negative(
        who, "rho", x, "Pass the radius as a float, or a schedule of the step count."
    )


def alpha(who: str, x: Any) -> None:
    """Checks a mixing weight."""
    non_negative(
        who,
        "alpha",
        x,
        "0.8 is the paper's value, 1.0 is SAM, above 1 extrapolates (WSAM).",
    )


def count_of_layers(who: str, argument: str, k: Any) -> None:
    """Raises unless `k` may stand for a number of layers; arrays pass unread."""
    if (
        k is None
        or isinstance(k, (bool, str, float))
        or (is_number(k) and not isinstance(k, numbers.Integral))
    ):
        remedy = "Pass how many layers to perturb, e.g. k=4."
        raise TypeError(message(who, argument, "an integer", repr(k), remedy))
    if is_number(k) and k < 0:
        remedy = "Pass how many layers to perturb; 0 is the plain base optimizer."
        raise ValueError(message(who, argument, ">= 0", k, remedy))


def choice(who: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        expected = "one of " + ", ".join(map(repr, choices))
        remedy = f"Pass {argument}={choices[0]!r} for the default."
        raise ValueError(message(who, argument, expected, repr(value), remedy))


def is_callable(who: str, argument: str, value: Any, remedy: str) -> None:
    """Raises unless `value` can be called."""
    if not callable(value):
        raise TypeError(message(who, argument, "callable", repr(value), remedy))
