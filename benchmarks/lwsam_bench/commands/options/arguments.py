"""What arguments of the command line may be: parsers that say what they expect."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from lwsam_bench.models import names


DATA_DIR = (
    "folder of tensorflow-datasets (default: TFDS_DATA_DIR, then ~/tensorflow_datasets)"
)


def _number(text: str, kind: Callable, holds: Callable, expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def count(text: str) -> int:
    """Parse an integer >= 1."""
    return _number(text, int, lambda x: x >= 1, "an integer >= 1")


def seed(text: str) -> int:
    """Parse the seed of a PRNG key."""
    return _number(text, int, lambda x: 0 <= x < 2**31, "an integer from 0 to 2^31 - 1")


def non_negative(text: str) -> float:
    """Parse a finite number >= 0."""
    return _number(
        text, float, lambda x: math.isfinite(x) and x >= 0, "a finite number >= 0"
    )


def positive(text: str) -> float:
    """Parse a finite number > 0."""
    return _number(
        text, float, lambda x: math.isfinite(x) and x > 0, "a finite number > 0"
    )


def fraction(text: str) -> float:
    """Parse a number from 0 to below 1."""
    return _number(text, float, lambda x: 0 <= x < 1, "a number from 0 to below 1")


def share(text: str) -> float:
    """Parse a number from above 0 to 1."""
    return _number(text, float, lambda x: 0 < x <= 1, "a number above 0, up to 1")


def model(text: str) -> str:
    """Parse the name of a network."""
    try:
        names.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def split(text: str) -> tuple[str, ...]:
    """Return what stands between commas."""
    return tuple(filter(None, text.split(",")))


def some_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of names with commas between them, all of which are known."""

    def parse(text: str) -> tuple[str, ...]:
        found = split(text)
        if not found or not set(found) <= set(known):
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(known)}, got {text!r}"
            )
        return found

    return parse
