"""Which executable runs a step: covers, and a few sets that the history calls for.

One executable for each exact set would compile without end: on CIFAR-10 the set changes
in most steps. A cover from the input-most selected layer on is always right and there are
only L + 1 of them, but a set such as {first layer, last three} pays for all weight
gradients in between. So a few sets are added, at fixed steps, chosen to save the most on
selections like those seen so far; the mask picks within whatever runs, and results do not
depend on the choice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from . import _promotion
from ._layers import Layers
from ._selection import Cover


# A set must save this much of a plain gradient in the average step to be worth compiling,
_WORTH_A_SET = 0.0075
# and a cover this much in the step at hand.
_WORTH_A_COVER = 0.08
# A set that was chosen and has not run after so many steps is given up: selections have
# moved on, and it would be compiled at the worst time, late and for a few steps.
_UNUSED = 8
# What a selection counts for after each review, so that the sets follow the training,
_MEMORY = 0.7
# and how many are remembered at most; twice as many between two reviews.
_REMEMBERED = 512


class Executables:
    """The compiled steps of one `TrainStep`, made when first used.

    Attributes:
      compile_seconds: Wall time of first calls: tracing, compiling, dispatching.
      evictions: How many executables were dropped for others.
    """

    def __init__(
        self,
        layers: Layers,
        ratio: Callable[[Cover], float],
        build: Callable[[Cover], Callable[..., Any]],
        exact_sets: int,
        bound: float | None = None,
        at_most_own: bool = False,
    ) -> None:
        """Takes the cost of a cover and how to build its step; compiles nothing.

        Args:
          layers: The layers.
          ratio: FLOPs of the step of a cover over a plain gradient.
          build: Returns the jitted step of a cover.
          exact_sets: How many sets may stand beside the L + 1 covers.
          bound: Overhead that no step may exceed, or None.
          at_most_own: Whether no step may cost more than the cover of its selection.
        """
        self._layers, self._build, self._bound = layers, build, bound
        self._cap = exact_sets
        self._worth_a_cover = 0.0 if at_most_own else _WORTH_A_COVER
        self._ratio = ratio
        self._prices: dict[int, float] = {}
        self._steps: dict[int, Callable[..., Any]] = {}
        self._called: set[int] = set()  # of these, no longer to be compiled
        self._shelf: dict[int, Callable[..., Any]] = {}  # as these, not in use
        self._sets: dict[int, int] = {}  # chosen set -> step of its last use
        self._counts: dict[int, float] = {}
        self._seen = 0
        self._tails = [
            sum(1 << i for i, at in enumerate(layers.depth) if at >= d)
            for d in range(len(layers) + 1)
        ]
        self._order: list[int] = []
        self._sort()
        self.compile_seconds = 0.0
        self.evictions = 0

    @property
    def compiled(self) -> tuple[Cover, ...]:
        """The covers that have an executable, in order of first use."""
        return tuple(self._cover(bits) for bits in self._steps)

    def run(self, mask: np.ndarray, *args: Any) -> Any:
        """Runs the step for a mask, on the cheapest executable that contains it.

        A step that raises leaves everything as it was.
        """
        # Plain Python: NumPy's functions take longer to wake than this takes to run.
        bits = sum(1 << i for i, on in enumerate(mask.tolist()) if on)
        choice = self._cheapest(bits)
        if choice in self._called:
            result = self._steps[choice](*args)
        else:
            result = self._first_call(choice, *args)
        self._remember(bits, choice)
        return result

    def _first_call(self, choice: int, *args: Any) -> Any:
        start = time.perf_counter()
        shelved = self._shelf.get(choice)
        known = shelved or self._steps.get(choice)
        step = known or self._build(self._cover(choice))
        result = step(*args)
        if not shelved:
            self.compile_seconds += time.perf_counter() - start
        self._called.add(choice)
        if choice not in self._steps:
            self._steps[choice] = step
            self._sort()
        return result

    def _remember(self, bits: int, choice: int) -> None:
        self._seen += 1
        if choice in self._sets:
            self._sets[choice] = self._seen
        if not self._cap:
            return
        self._counts[bits] = self._counts.get(bits, 0) + 1
        if _promotion.is_review(self._seen):
            self._review()
        elif len(self._counts) > 2 * _REMEMBERED:
            self._forget(1.0)

    def _forget(self, memory: float) -> None:
        """Keeps the selections that count most, with a part of what they count."""
        kept = _promotion.heaviest(self._counts, _REMEMBERED)
        self._counts = {b: self._counts[b] * memory for b in kept}

    def _sort(self) -> None:
        """Puts what steps may run on into the order of preference.

        The cheapest comes first, a cover that is still to be compiled as if it cost
        more. Above the bound the cover of a selection is the only choice.
        """
        made = {*self._steps, *self._sets}
        bound = math.inf if self._bound is None else 1 + self._bound

        def rank(bits: int) -> tuple[Any, ...]:
            price, is_new = self._price(bits), bits not in made
            worth = self._worth_a_cover if is_new and price <= bound else 0.0
            return price > bound, price + worth, is_new, bits

        usable = {c for c in made if self._price(c) <= bound}
        self._order = sorted({*usable, *self._tails}, key=rank)

    def _cheapest(self, bits: int) -> int:
        """Returns what to run: a compiled executable, a chosen set or a cover."""
        return next(c for c in self._order if not bits & ~c) if bits else 0

    def _own_cover(self, bits: int) -> int:
        if not bits:
            return 0
        return next(tail for tail in reversed(self._tails) if not bits & ~tail)

    def _price(self, bits: int) -> float:
        if bits not in self._prices:
            self._prices[bits] = self._ratio(self._cover(bits))
        return self._prices[bits]

    def _cover(self, bits: int) -> Cover:
        names = self._layers.names
        return Cover(tuple(name for i, name in enumerate(names) if bits >> i & 1))

    def _review(self) -> None:
        """Gives up unused sets; adds those that would save the most, one by one."""
        for chosen, at in list(self._sets.items()):
            if chosen not in self._steps and self._seen - at > _UNUSED:
                del self._sets[chosen]
        weights = _promotion.expected(self._counts, len(self._layers))
        total = math.fsum(self._counts.values())
        now = {
            bits: min(
                self._price(c)
                for c in (self._own_cover(bits), *self._sets)
                if not bits & ~c
            )
            for bits in weights
        }
        for _ in range(_promotion.sets_of(self._seen)):
            saving, best = _promotion.best_set(
                weights, now, self._tails, self._price, frozenset(self._sets)
            )
            if saving / total < _WORTH_A_SET or not self._make_room():
                break
            self._sets[best] = self._seen
            for bits in now:
                if not bits & ~best:
                    now[bits] = min(now[bits], self._price(best))
        self._sort()
        self._forget(_MEMORY)

    def _make_room(self) -> bool:
        """Evicts the least recently used set if it sat idle; returns if there is room."""
        if len(self._sets) < self._cap:
            return True
        oldest = min(self._sets, key=self._sets.__getitem__)
        if 2 * self._sets[oldest] > self._seen:
            return False
        del self._sets[oldest]
        self._called.discard(oldest)
        if self._steps.pop(oldest, None) is not None:
            self.evictions += 1
        return True

    def history(self) -> dict[str, Any]:
        """Returns what the choices depend on besides the state, fit for JSON."""
        return {
            "seen": self._seen,
            "counts": sorted(
                [list(self._names(b)), n] for b, n in self._counts.items()
            ),
            "sets": [[list(self._names(b)), at] for b, at in self._sets.items()],
            "compiled": [list(self._names(b)) for b in self._steps],
        }

    def restore(self, history: dict[str, Any]) -> None:
        """Takes over a history: the next choices are those of the run it is of.

        What else has been compiled does not count, but need not be compiled again.

        Raises:
          ValueError, KeyError, TypeError: If it is no history of these layers.
        """
        seen = int(history["seen"])
        counts = {self._bits(names): float(n) for names, n in history["counts"]}
        used = {self._bits(names): int(at) for names, at in history["sets"]}
        latest = sorted(used, key=used.__getitem__, reverse=True)[: self._cap]
        sets = {bits: at for bits, at in used.items() if bits in latest}
        compiled = map(self._bits, history["compiled"])
        kept = [bits for bits in compiled if bits in sets or bits in self._tails]
        self._shelf |= {b: s for b, s in self._steps.items() if b in self._called}
        self._seen, self._counts, self._sets = seen, counts, sets
        self._steps = {
            bits: self._shelf.get(bits) or self._build(self._cover(bits))
            for bits in kept
        }
        self._called = set(kept) & set(self._shelf)
        self._sort()

    def _names(self, bits: int) -> tuple[str, ...]:
        return self._cover(bits).names

    def _bits(self, names: Iterable[str]) -> int:
        return sum(1 << self._layers.names.index(name) for name in names)
