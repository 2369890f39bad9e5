"""Which executables a step may run on: a short menu, made once, from prices alone.

One executable for each exact set would compile without end: on CIFAR-10 the set changes
in most steps. A cover, every layer from a depth on, contains whatever starts there; the
menu holds a few of them, spread over the price, and without a budget the two ends of the
network. The mask picks within whatever runs, so results do not depend on the menu.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import _checks
from .._engine.cover import Cover
from .._engine.layers import Layers


# Sets whose prices differ by less than this share are one.
_SAME_PRICE = 0.02


class Menu:
    """The sets of layers that steps are compiled for, by rising price.

    They are nested, but for the two ends of the network where there is no budget.

    Attributes:
      covers: The sets; the first is empty, the plain step.
      prices: Overhead of each over a plain gradient.
      layer_prices: f64[L], that of the cheapest set with each layer; inf: in none.
    """

    def __init__(
        self,
        layers: Layers,
        ratio: Callable[[Cover], float],
        most: int,
        *,
        chosen: Sequence[bool] | None = None,
        bound: float | None = None,
        share: float | None = None,
    ) -> None:
        """Prices the covers and keeps a few.

        Args:
          layers: The layers.
          ratio: FLOPs of the step of a cover over a plain gradient.
          most: How many sets there may be, the plain step included.
          chosen: The layers that every step selects, where that is known.
          bound: Overhead that no set may exceed, or None.
          share: Overhead for which a set should be there that pays no more, or None.
        """
        self._layers, self._is_bounded = layers, bound is not None
        usable = [True] * len(layers) if chosen is None else list(chosen)
        names = lambda depth: tuple(
            n
            for n, d, ok in zip(layers.names, layers.depth, usable, strict=True)
            if ok and d >= depth
        )
        nested = dict.fromkeys(names(d) for d in range(len(layers)))
        priced = {ns: ratio(Cover(ns)) - 1.0 for ns in nested if ns}
        whole = names(0)
        affordable = whole and (bound is None or priced[whole] <= bound)
        if chosen is not None and affordable and share is None:
            kept = [whole]
        elif (chosen, bound, share) == (None, None, None) and most > 3:
            ends = _both_ends(layers)
            price = ratio(Cover(ends)) - 1.0
            kept = _thin(priced, most - 2, bound, share)
            if 1 + price < (1 + priced[whole]) * (1 - _SAME_PRICE):
                priced[ends] = price
                kept = sorted([*kept, ends], key=priced.__getitem__)
        else:
            kept = _thin(priced, max(most - 1, 1), bound, share)
        self.covers = (Cover(()), *map(Cover, kept))
        self.prices = (0.0, *(priced[ns] for ns in kept))
        self._sets = [set(cover.names) for cover in self.covers]
        self._bits = [self.bits(cover.names) for cover in self.covers]
        self.cheapest = min(priced, key=priced.__getitem__, default=())
        self.cheapest_price = priced.get(self.cheapest, 0.0)
        self.layer_prices = np.array(
            [self.price({name}) for name in layers.names], np.float64
        )

    def bits(self, names: Sequence[str]) -> int:
        """Returns names as bits, layer i as bit i."""
        return sum(1 << self._layers.names.index(name) for name in names)

    def price(self, names: set[str]) -> float:
        """Returns the overhead of the cheapest set with these layers, inf if none has."""
        pairs = zip(self._sets, self.prices, strict=True)
        return next((price for own, price in pairs if names <= own), float("inf"))

    def fitting(self, bits: int) -> Cover:
        """Returns the cheapest set with these layers.

        Another method's state may have others: then it is the cover of all layers, or
        within a bound the dearest set there is.
        """
        for own, cover in zip(self._bits, self.covers, strict=True):
            if not bits & ~own:
                return cover
        return self.covers[-1] if self._is_bounded else Cover(self._layers.names)

    def few(self, count: int) -> list[Cover]:
        """Returns the plain step and up to `count` others, the dearest among them."""
        priced = dict(
            zip((c.names for c in self.covers[1:]), self.prices[1:], strict=True)
        )
        return [Cover(()), *map(Cover, _thin(priced, max(count, 1), None, None))]


def _both_ends(layers: Layers) -> tuple[str, ...]:
    """Returns the layer next to the input and the last two fifths of all.

    Gradient norms are largest at the two ends: on CIFAR-10 the first convolution of a
    ResNet-20 is in most selections of the paper's rule, and what else they hold is mostly
    next to the output. The cover of these is SAM; this set is a tenth cheaper.
    """
    start = len(layers) - 2 * len(layers) // 5
    pairs = zip(layers.names, layers.depth, strict=True)
    return tuple(name for name, depth in pairs if depth == 0 or depth >= start)


def _thin(
    priced: dict[tuple[str, ...], float],
    most: int,
    bound: float | None,
    share: float | None,
) -> list[tuple[str, ...]]:
    """Returns nested sets by rising price, none like the next, spread evenly over it."""
    by_price = sorted(priced, key=lambda names: (priced[names], len(names)))
    if bound is not None:
        by_price = [names for names in by_price if priced[names] <= bound]
    # The largest that the share pays for must stay: only it is run in frugal steps.
    frugal = [n for n in by_price if share is not None and priced[n] <= share][-1:]
    kept: list[tuple[str, ...]] = []
    for names in reversed(by_price):
        differs = not kept or 1 + priced[kept[-1]] > (1 + priced[names]) * (
            1 + _SAME_PRICE
        )
        if differs or names in frugal:
            kept.append(names)
    kept.reverse()
    if len(kept) > most:
        first, last = priced[kept[0]], priced[kept[-1]]
        aims = [first + (last - first) * i / max(most - 1, 1) for i in range(most)]
        below = lambda aim: max(
            i for i, n in enumerate(kept) if priced[n] <= aim + 1e-9
        )
        places = {*map(below, aims), len(kept) - 1} if most > 1 else {len(kept) - 1}
        places |= {kept.index(names) for names in frugal}
        while len(places) > most:  # make room for the frugal one
            spare = [i for i in sorted(places) if kept[i] not in frugal]
            places.remove((spare[1:-1] or spare[:-1] or sorted(places))[0])
        kept = [kept[i] for i in sorted(places)]
    return kept


class Executables:
    """The compiled steps of one `TrainStep`, made when first used.

    Attributes:
      compile_seconds: Wall time of first calls: tracing, compiling, dispatching.
    """

    def __init__(
        self, menu: Menu, build: Callable[[Cover], Callable[..., Any]]
    ) -> None:
        """Takes what there may be and how to build it; compiles nothing."""
        self._menu, self._build = menu, build
        self._steps: dict[Cover, Callable[..., Any]] = {}
        self.compile_seconds = 0.0

    @property
    def compiled(self) -> tuple[Cover, ...]:
        """The covers that have an executable, in order of first use."""
        return tuple(self._steps)

    def run(self, mask: np.ndarray, *args: Any) -> Any:
        """Runs the step for a mask, on the cheapest executable that contains it."""
        # Plain Python: NumPy's functions take longer to wake than this takes to run.
        bits = sum(1 << i for i, on in enumerate(mask.tolist()) if on)
        cover = self._menu.fitting(bits)
        if cover in self._steps:
            return self._steps[cover](*args)
        start = time.perf_counter()
        step = self._build(cover)
        result = step(*args)
        self.compile_seconds += time.perf_counter() - start
        self._steps[cover] = step  # only now: a step that raises leaves no trace
        return result


def check_most(who: str, most: Any) -> None:
    """Raises unless a number of executables leaves room for a plain and another step."""
    remedy = "Pass how many executables there may be; the plain step is one of them."
    _checks.count(who, "max_executables", most, remedy)
    if most < 2:
        raise _checks.value_error(who, "max_executables", ">= 2", most, remedy)
