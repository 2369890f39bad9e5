"""The names that the walk has for the built-in parts, and which to try together."""

import itertools
from typing import NamedTuple

import numpy as np


Values = tuple[tuple[str, str], ...]  # of some axes, by their names

# The values of each axis, the default first.
PARTS = {
    "which": (
        "everything",
        "top_k",
        "named",
        "random_k",
        "bandit",
        "nothing",
        "function",
    ),
    "ascent": (
        "whole_batch",
        "fraction",
        "size",
        "momentum",
        "previous",
        "random",
        "differences",
        "function",
    ),
    "shape": (
        "normalized",
        "raw",
        "normalized all",
        "adaptive",
        "relative layer",
        "relative filter",
        "proportional filter",
        "proportional rms",
        "proportional element",
        "chain",
        "sparse",
        "light",
    ),
    "combine": (
        "descend",
        "mix",
        "surrogate_gap",
        "match_norm",
        "decoupled",
        "descend_on_selected",
        "flatness",
        "reuse",
        "function",
    ),
    "when": ("always", "every", "last", "between", "predicate", "gate"),
    "descent": ("None", "sharpest", "weighed", "weighed thrice"),
}
STALE = ("momentum", "previous", "random", "differences")
RHO = {"raw": 0.3, "relative layer": 0.1, "relative filter": 0.1, "light": 0.05}


class Parts(NamedTuple):
    """A value for each axis."""

    which: str = "everything"
    ascent: str = "whole_batch"
    shape: str = "normalized"
    combine: str = "descend"
    when: str = "always"
    descent: str = "None"

    @property
    def rho(self) -> float:
        """The radius that this shape is walked with."""
        return RHO.get(self.shape, 0.4)

    @property
    def is_stale(self) -> bool:
        """Whether the ascent takes no pass."""
        return self.ascent in STALE


def refused(parts: Parts) -> str | None:
    """The argument that a combination has to be refused for, None if it is right."""
    if parts.is_stale and parts.combine not in ("descend", "descend_on_selected"):
        return "combine"  # there is no ascent gradient
    if parts.combine == "reuse" and parts.which != "everything":
        return "combine"  # its norms are over all layers
    if parts.combine == "flatness" and (
        parts.when == "gate" or parts.descent != "None"
    ):
        return "combine"  # it takes two gradients of each pass
    if parts.descent == "sharpest" and parts.ascent != "whole_batch":
        return "descent"  # nobody knows the clean losses
    if parts.descent == "weighed thrice" and parts.is_stale:
        return "descent"  # there is no ascent to weigh
    if parts.when == "gate" and parts.is_stale:
        return "ascent"  # there is no gradient to decide by
    if parts.when == "gate" and parts.descent != "None":
        return "descent"  # it would decide in between
    return None


def product() -> list[Parts]:
    """Every combination."""
    return [Parts(*values) for values in itertools.product(*PARTS.values())]


def held_by(parts: Parts, axes: int) -> list[Values]:
    """The values of each so many axes in a combination."""
    return list(itertools.combinations(parts._asdict().items(), axes))


def all_values(axes: int) -> set[Values]:
    """Those of all combinations."""
    return {
        tuple(zip(names, values, strict=True))
        for names in itertools.combinations(PARTS, axes)
        for values in itertools.product(*(PARTS[name] for name in names))
    }


def few(axes: int) -> tuple[list[Parts], list[Parts]]:
    """Combinations that hold the values of each so many axes.

    Those that are right hold all that one of them can hold. And one for each other, which
    has to be refused. Greedy, the same in each run: what holds most of the missing comes
    next.
    """
    right = [parts for parts in product() if refused(parts) is None]
    numbers: dict[Values, int] = {}
    held = np.array(
        [
            [numbers.setdefault(values, len(numbers)) for values in held_by(p, axes)]
            for p in right
        ]
    )
    missing, left, chosen = np.ones(len(numbers), bool), np.arange(len(right)), []
    while missing.any():
        gain = missing[held[left]].sum(axis=1)
        best = left[np.argmax(gain)]
        chosen.append(right[best])
        missing[held[best]] = False
        left = left[gain > 0]
    others = sorted(all_values(axes) - numbers.keys())
    return chosen, [Parts()._replace(**dict(values)) for values in others]
