"""Which sets are promoted to an executable of their own: when, and which save the most.

Selections vary, so a set made for the ones seen so far would hold few of those to come.
Two things help: a part of the weight of each selection goes to its neighbours, which
differ from it in one layer; and sets are found by dropping layers from a cover, so that
they contain many selections instead of one.

Every process of a run must come to the same choice, and so must a resumed one, in
whatever order the selections are remembered: what is summed up are integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np


# Reviews are this many steps apart up to that step; then there are two per doubling.
_SPACING = 4
_SETTLED = 192
# Of a selection's weight, the part that its neighbours share, and the rarest neighbour.
_NEIGHBOURS = 0.5
_RAREST = 0.01
# What a review looks at, the heaviest: selections with their neighbours, so many of these
# together, all, and covers; of the last two fewer in networks of more layers than this.
_SPREAD = 256
_PAIRS = 1 << 15
_SELECTIONS = 1024
_COVERS = 24
_LAYERS = 32

_UNIT = 1 << 18  # of weights and of prices: sums fit 64 bits for 10^7 steps


def is_review(step: int) -> bool:
    """Returns whether sets are promoted after this many steps.

    Every fourth step up to 192, when training moves fast and most executables are still
    to be compiled; then at 256, 384, 512, 768, ..., so that a compilation becomes rare.
    """
    spacing = _SPACING if step <= _SETTLED else 1 << (step.bit_length() - 2)
    return step >= _SPACING and step % spacing == 0


def sets_of(step: int) -> int:
    """Returns how many sets the review after this step may add.

    Two while most executables are still to be compiled, then one: each of them makes a
    step wait.
    """
    return 2 if step <= _SETTLED else 1


def expected(counts: Mapping[int, float], layers: int) -> dict[int, int]:
    """Returns how heavy each selection weighs; together as much as was counted.

    A neighbour has one layer exchanged for another one, in proportion to how often that
    is selected otherwise. Where selections hardly ever vary, neighbours weigh little.

    Args:
      counts: How often each selection came; bit i stands for layer i.
      layers: Number of layers.

    Returns:
      Weight of the heaviest selections, in integer units; the lightest are left out.
    """
    often = [
        math.fsum(n for bits, n in counts.items() if bits >> i & 1)
        for i in range(layers)
    ]
    steps = math.fsum(counts.values())
    weights: dict[int, int] = {}
    places = max(1, min(_SPREAD, len(counts)))

    def add(bits: int, weight: float) -> None:
        weights[bits] = weights.get(bits, 0) + round(weight * _UNIT)

    for place, bits in enumerate(heaviest(counts, len(counts))):
        n = counts[bits]
        inside = [i for i in range(layers) if bits >> i & 1]
        outside = [i for i in range(layers) if not bits >> i & 1]
        total = math.fsum(often[i] for i in outside)
        kept = [i for i in outside if often[i] > _RAREST * total]
        if len(inside) * len(kept) * places > _PAIRS:
            kept.sort(key=lambda i: (-often[i], i))
            del kept[_PAIRS // (len(inside) * places) :]
        if not (inside and kept) or place >= _SPREAD:
            add(bits, n)
            continue
        known = math.fsum(often[i] for i in kept)
        into = {i: often[i] / known for i in kept}
        share = _NEIGHBOURS * min(1.0, total / steps)
        add(bits, n * (1 - share))
        each = n * share / len(inside)
        for old in inside:
            for new, part in into.items():
                add(bits & ~(1 << old) | 1 << new, each * part)
    return {
        bits: weights[bits] for bits in heaviest(weights, _few(_SELECTIONS, layers))
    }


def _few(count: int, layers: int) -> int:
    """Returns a count that keeps the time of a review in bounds, at least 4."""
    return count if layers <= _LAYERS else max(4, count * _LAYERS // layers)


def heaviest(weights: Mapping[int, float], count: int) -> list[int]:
    """Returns the heaviest selections, in an order that is the same everywhere."""
    return sorted(weights, key=lambda bits: (-weights[bits], bits))[:count]


def best_set(
    weights: Mapping[int, int],
    now: Mapping[int, float],
    covers: Sequence[int],
    price: Callable[[int], float],
    taken: frozenset[int],
) -> tuple[float, int]:
    """Returns the set that saves the most, and how much; (0, 0) if none saves anything.

    From each cover the layer is dropped, one after the other, without which the rest
    saves the most on the selections that it still contains.

    Args:
      weights: What `expected` returned.
      now: Cost of each of these selections at present, in FLOPs over a plain gradient.
      covers: All covers, as bits of layers.
      price: Cost of a set.
      taken: Sets that are no candidates.

    Returns:
      Saving of all selections together, in plain gradients, and the bits of the set.
    """
    masks = list(weights)
    layers = max(covers).bit_length()
    selected = np.array([[m >> i & 1 for i in range(layers)] for m in masks], bool)
    selected = selected.reshape(len(masks), layers)
    weight = np.array([weights[m] for m in masks], np.int64)
    cost = np.array([round(now[m] * _UNIT) for m in masks], np.int64)
    best = (0, 0)
    for cover in _heaviest_covers(weights, covers)[: _few(_COVERS, layers)]:
        path = _drop_layers(cover, covers, selected, weight, cost, price)
        for saving, bits in path:
            if saving and bits not in taken and (saving, bits) > best:
                best = (saving, bits)
    return best[0] / _UNIT**2, best[1]


def _heaviest_covers(weights: Mapping[int, int], covers: Sequence[int]) -> list[int]:
    """Returns the covers that most selections start at."""
    owns = sorted(cover for cover in covers if cover)  # nested, the smallest first
    worth: dict[int, int] = {}
    for bits, weight in weights.items():
        if bits:
            own = next(cover for cover in owns if not bits & ~cover)
            worth[own] = worth.get(own, 0) + weight
    return sorted(worth, key=lambda cover: (-worth[cover], cover))


def _drop_layers(
    cover: int,
    covers: Sequence[int],
    selected: np.ndarray,
    weight: np.ndarray,
    cost: np.ndarray,
    price: Callable[[int], float],
) -> list[tuple[int, int]]:
    """Returns the sets on the way from a cover to its input-most layers: saving, bits."""
    below = max((c for c in covers if c < cover), default=0)
    edge = cover & ~below  # dropping these would be another cover's business
    inner = [i for i in range(selected.shape[1]) if below >> i & 1]
    whole = round(price(cover) * _UNIT)
    # A layer's weight gradient costs the same whatever else is in the set.
    part = {i: whole - round(price(cover & ~(1 << i)) * _UNIT) for i in inner}
    is_in = ~selected[:, [i for i in range(selected.shape[1]) if not cover >> i & 1]]
    held = is_in.all(axis=1)
    selected, weight, cost = selected[held], weight[held], cost[held]
    used = [i for i in inner if selected[:, i].any()]
    bits = edge | sum(1 << i for i in used)
    now = whole - sum(part[i] for i in inner if i not in used)
    found = [(int(np.sum(weight * np.maximum(cost - now, 0))), bits)]
    while used:
        # Without each layer in turn: a column for each, of what still fits.
        prices = np.array([now - part[i] for i in used], np.int64)
        fits = ~selected[:, used]
        savings = weight @ (np.maximum(cost[:, None] - prices, 0) * fits)
        place = int(np.argmax(savings))
        if not savings[place]:
            break
        layer, held = used.pop(place), fits[:, place]
        selected, weight, cost = selected[held], weight[held], cost[held]
        bits, now = bits & ~(1 << layer), now - part[layer]
        found.append((int(savings[place]), bits))
    return found
