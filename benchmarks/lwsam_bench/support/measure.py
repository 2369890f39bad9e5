"""Measuring: FLOPs of compiled programs, and time that can be compared."""

import math
import statistics
from typing import Any


def flops(compiled: Any) -> float:
    """Return the FLOPs of a compiled program, as XLA counts them.

    A multiply-add is two. XLA counts what it compiled: work that it removed or shared
    is not in the number. NaN where it does not count.
    """
    analysis = compiled.cost_analysis()
    # Some versions of JAX return one mapping for each computation.
    if isinstance(analysis, (list, tuple)):
        analysis = analysis[0]
    return float(analysis.get("flops", math.nan))


class Stopwatch:
    """Times of several methods that take turns, so that all see the same machine.

    In each round every method runs the same number of steps. Methods are compared round
    by round, and the median over the rounds is the result: what disturbs a few rounds
    does not change it.
    """

    def __init__(self) -> None:
        self._rounds: list[dict[str, float]] = []

    def add_round(self, seconds: dict[str, float]) -> None:
        """Add a round: seconds by method; leave out one that had to compile."""
        self._rounds.append(seconds)

    def ratio(self, name: str, base: str) -> float:
        """Return the median of a method's time over that of `base`; NaN if unknown."""
        ratios = [
            times[name] / times[base]
            for times in self._rounds
            if name in times and base in times
        ]
        return statistics.median(ratios) if ratios else float("nan")
