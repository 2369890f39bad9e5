"""Which executable runs a step: covers, and a few sets that the history calls for.

One executable for each exact set would compile without end: on CIFAR-10 the set changes
in most steps. A cover from the input-most selected layer on is always right and there are
only L + 1 of them, but a set such as {first layer, last three} pays for all weight
gradients in between. So a few sets are added, at fixed steps, chosen to save the most on
the selections seen so far; the mask picks within whatever runs, and results do not depend
on the choice.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ._layers import Layers
from ._selection import Cover


# Steps at which sets are added: early, then ever more rarely.
_FIRST_REVIEW = 32
# A set must save this much of a plain gradient in the average step to be worth compiling,
_WORTH_A_SET = 0.005
# and a cover this much in the step at hand.
_WORTH_A_COVER = 0.05
_PER_REVIEW = 4
_MASKS_CONSIDERED = 32


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
        bound: float | None,
    ) -> None:
        """Takes the cost of a cover and how to build its step; compiles nothing.

        Args:
          layers: The layers.
          ratio: FLOPs of the step of a cover over a plain gradient.
          build: Returns the jitted step of a cover.
          exact_sets: How many sets may stand beside the L + 1 covers.
          bound: Overhead that no step may exceed, or None.
        """
        self._layers, self._build, self._bound = layers, build, bound
        self._cap = exact_sets
        self._ratio = ratio
        self._prices: dict[int, float] = {}
        self._steps: dict[int, Callable[..., Any]] = {}
        self._sets: dict[int, int] = {}  # chosen set -> step of its last use
        self._counts: collections.Counter[int] = collections.Counter()
        self._seen = 0
        self._chosen: dict[int, int] = {}
        self._tails = [
            sum(1 << i for i, at in enumerate(layers.depth) if at >= d)
            for d in range(len(layers) + 1)
        ]
        self.compile_seconds = 0.0
        self.evictions = 0

    @property
    def compiled(self) -> tuple[Cover, ...]:
        """The covers that have an executable, in order of first use."""
        return tuple(self._cover(bits) for bits in self._steps)

    def run(self, mask: np.ndarray, *args: Any) -> Any:
        """Runs the step for a mask, on the cheapest executable that contains it."""
        bits = sum(1 << i for i in np.flatnonzero(mask).tolist())
        choice = self._choose(bits)
        if choice in self._steps:
            return self._steps[choice](*args)
        start = time.perf_counter()
        self._steps[choice] = self._build(self._cover(choice))
        self._chosen.clear()
        result = self._steps[choice](*args)
        self.compile_seconds += time.perf_counter() - start
        return result

    def _choose(self, bits: int) -> int:
        self._counts[bits] += 1
        self._seen += 1
        if self._cap and _is_review(self._seen):
            self._review()
        if bits not in self._chosen:
            self._chosen[bits] = self._cheapest(bits)
        choice = self._chosen[bits]
        if choice in self._sets:
            self._sets[choice] = self._seen
        return choice

    def _cheapest(self, bits: int) -> int:
        """Returns a compiled executable or a chosen set, else the selection's cover."""
        own = self._own_cover(bits)
        if not bits:
            return own
        usable = [
            c
            for c in {*self._steps, *self._sets}
            if not bits & ~c
            and (self._bound is None or self._price(c) - 1 <= self._bound)
        ]
        best = min(usable, key=lambda c: (self._price(c), c), default=own)
        saved = self._price(best) - self._price(own)
        return own if own not in self._steps and saved > _WORTH_A_COVER else best

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
        """Adds the sets that would have saved the most, one after the other."""
        common = [bits for bits, _ in self._counts.most_common(_MASKS_CONSIDERED)]
        # Unions of two also hold selections that have not been seen yet.
        candidates = {
            bits | more for bits in common if bits for more in (*common, *self._tails)
        }
        candidates -= {*self._tails, *self._sets}
        total = sum(self._counts.values())
        current = {
            bits: min(
                self._price(c)
                for c in (self._own_cover(bits), *self._sets)
                if not bits & ~c
            )
            for bits in self._counts
        }
        for _ in range(_PER_REVIEW):
            saving, best = max(
                ((self._saving(c, current), c) for c in candidates), default=(0.0, 0)
            )
            if saving / total < _WORTH_A_SET or not self._make_room():
                break
            self._sets[best] = self._seen
            candidates.discard(best)
            for bits in current:
                if not bits & ~best:
                    current[bits] = min(current[bits], self._price(best))
        # Half a memory, so that the sets follow where training goes.
        self._counts = collections.Counter({b: n / 2 for b, n in self._counts.items()})
        self._chosen.clear()

    def _saving(self, candidate: int, current: dict[int, float]) -> float:
        price = self._price(candidate)
        return sum(
            self._counts[bits] * max(0.0, now - price)
            for bits, now in current.items()
            if not bits & ~candidate
        )

    def _make_room(self) -> bool:
        """Evicts the least recently used set if it sat idle; returns if there is room."""
        if len(self._sets) < self._cap:
            return True
        oldest = min(self._sets, key=self._sets.__getitem__)
        if 2 * self._sets[oldest] > self._seen:
            return False
        del self._sets[oldest]
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
        """Takes over a history: the next choices are those of the run it is of."""
        self._seen = int(history["seen"])
        self._counts = collections.Counter(
            {self._bits(names): n for names, n in history["counts"]}
        )
        self._sets = {self._bits(names): int(at) for names, at in history["sets"]}
        for names in history["compiled"]:
            bits = self._bits(names)
            self._steps.setdefault(bits, self._build(self._cover(bits)))
        self._chosen.clear()

    def _names(self, bits: int) -> tuple[str, ...]:
        return self._cover(bits).names

    def _bits(self, names: Iterable[str]) -> int:
        return sum(1 << self._layers.names.index(name) for name in names)


def _is_review(step: int) -> bool:
    """Whether sets are added before this step: 32, 64, 128, ... by powers of two."""
    return step >= _FIRST_REVIEW and step & (step - 1) == 0
