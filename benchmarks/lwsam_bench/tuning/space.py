"""Where hyperparameters are looked for: ranges, quasi-random points, wider ranges."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np


EDGE = 0.1  # the outer tenth of a range: an optimum there may lie beyond
WIDER = 1 / 3  # how much longer a range becomes, on the logarithmic scale
MOST_WIDENINGS = 2

# All methods use the first coordinates of the same points: the same learning rates,
# weight decays and numbers of steps.
_DIMENSIONS = 8

WHOLE = (0.0, 1.0)  # of a range


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval on a logarithmic scale.

    Attributes:
      low: Its lower end, > 0.
      high: Its upper end.
      whole: Whether values are whole numbers.
      widens: Whether it may become wider.
      widenings: How often it did.
      part: The part of it that the next points are drawn from, as two numbers in
        [0, 1]: what a widening added, or all of it.
    """

    low: float
    high: float
    whole: bool = False
    widens: bool = True
    widenings: int = 0
    part: tuple[float, float] = WHOLE

    def at(self, share: float) -> float:
        """Return the value at a share of the way from `low` to `high`."""
        start, stop = self.part
        share = start + share * (stop - start)
        value = self.low * (self.high / self.low) ** share
        return round(value) if self.whole else float(f"{value:.4g}")

    def place(self, value: float) -> float:
        """Return the share of the way at which a value lies."""
        return math.log(value / self.low) / math.log(self.high / self.low)

    def after(self, best: float) -> "Range":
        """Return the range for the next round, given the best value so far.

        It is longer by a third where that lies in its outer tenth, and the next points
        are from what was added.
        """
        whole = dataclasses.replace(self, part=WHOLE)
        place = self.place(best)
        may = self.widens and self.widenings < MOST_WIDENINGS
        if not may or EDGE <= place <= 1 - EDGE:
            return whole
        factor = (self.high / self.low) ** WIDER
        old = 1 / (1 + WIDER)  # the share of the old range in the new one
        if place < EDGE:
            ends = {"low": self.low / factor, "part": (0.0, 1 - old)}
        else:
            ends = {"high": self.high * factor, "part": (old, 1.0)}
        return dataclasses.replace(whole, widenings=self.widenings + 1, **ends)


Space = Mapping[str, Range]


def points(count: int, draws: int) -> np.ndarray:
    """Return quasi-random points f64[count, 8] in the unit cube.

    Args:
      count: How many; fewer are the first of more.
      draws: Number of the set of draws: its scrambling.
    """
    from scipy.stats import qmc  # it takes a while to import

    sampler = qmc.Sobol(_DIMENSIONS, scramble=True, rng=np.random.default_rng(draws))
    with warnings.catch_warnings():
        # A whole power of two would be balanced; more of them are asked for later.
        warnings.simplefilter("ignore", UserWarning)
        return sampler.random(count)


def drawn(space: Space, point: np.ndarray, number: int) -> dict[str, Any]:
    """Return the values of a space at a point of the unit cube.

    Args:
      space: The ranges.
      point: The point; as many of its coordinates as there are ranges.
      number: Of the trial. Where several ranges became wider, it looks in the added part
        of one of them, and the next trial in that of the next.
    """
    added = [name for name, within in space.items() if within.part != WHOLE]
    turn = added[number % len(added)] if added else None
    config = {}
    for (name, within), share in zip(space.items(), point, strict=False):
        here = within if name == turn else dataclasses.replace(within, part=WHOLE)
        config[name] = here.at(float(share))
    return config


def rounds(trials: int) -> tuple[int, ...]:
    """Return how many trials each round has: half of them, then two quarters.

    Between rounds ranges may become wider, so the number of trials stays that of all
    methods.
    """
    later = trials // 4
    return trials - MOST_WIDENINGS * later, *[later] * MOST_WIDENINGS
