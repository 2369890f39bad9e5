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


def value_error(
    who: str, argument: str, expected: str, got: Any, remedy: str
) -> ValueError:
    """Returns the error of a value that is not among those that are right."""
    return ValueError(message(who, argument, expected, got, remedy))


def type_error(
    who: str, argument: str, expected: str, got: Any, remedy: str
) -> TypeError:
    """Returns the error of an argument of the wrong kind."""
    return TypeError(message(who, argument, expected, got, remedy))


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


def count(who: str, argument: str, n: Any, remedy: str) -> None:
    """Raises unless `n` may stand for a number of things; arrays pass unread."""
    if (
        n is None
        or isinstance(n, (bool, str, float))
        or (is_number(n) and not isinstance(n, numbers.Integral))
    ):
        raise TypeError(message(who, argument, "an integer", repr(n), remedy))
    if is_number(n) and n < 0:
        raise ValueError(message(who, argument, ">= 0", n, remedy))


def count_of_layers(who: str, argument: str, k: Any) -> None:
    """Checks a number of layers to perturb."""
    remedy = "Pass how many layers to perturb, e.g. k=4; 0 is the plain base optimizer."
    count(who, argument, k, remedy)


def budget(who: str, argument: str, x: Any) -> None:
    """Checks a bound on overhead: known before the first step, so no schedule."""
    remedy = "0.1 allows for 1.1 plain gradients; None sets no bound."
    if not is_number(x):
        raise TypeError(message(who, argument, "a number or None", repr(x), remedy))
    non_negative(who, argument, x, remedy)


def share(who: str, argument: str, x: Any, remedy: str) -> None:
    """Raises unless `x` is a number in [0, 1]."""
    if not is_number(x) or not 0 <= x <= 1:
        raise value_error(who, argument, "a number in [0, 1]", repr(x), remedy)


def choice(who: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        expected = "one of " + ", ".join(map(repr, choices))
        remedy = f"Pass {argument}={choices[0]!r} for the default."
        raise ValueError(message(who, argument, expected, repr(value), remedy))


def is_callable(who: str, argument: str, value: Any, remedy: str) -> None:
    """Raises unless `value` can be called, and is no part whose call was forgotten."""
    module, name = (getattr(value, at, "") or "" for at in ("__module__", "__name__"))
    if module.startswith("lwsam_jax._axes") and name.isidentifier() and name[0] != "_":
        got = f"the function `{name}` itself"
        raise TypeError(
            message(who, argument, "what it returns", got, f"Call it: {name}(...).")
        )
    if not callable(value):
        raise TypeError(message(who, argument, "callable", repr(value), remedy))
