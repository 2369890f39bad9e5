"""How deep in a loss its parameters stand: where each first meets data."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.extend import core

from . import graph
from .rules import natural_order, sort_name
from .stacks import Scan, Stack, Views
from .trace import inline, Program, Traced


class Place(NamedTuple):
    """Where a leaf of the parameters stands in a loss.

    Attributes:
      position: The first equation where it meets data, -1 for none.
      axis: The axis along which it is scanned, None for none, or for several.
      inside: The first equation where a slice meets data in the body of the scan.
      reverse: Whether the scan starts at the last index.
    """

    position: int = -1
    axis: int | None = None
    inside: int = -1
    reverse: bool = False

    def key(self, index: int, stack: Stack | None) -> tuple[int, int, int]:
        """Returns what an index of a stack, or a leaf that is none, is sorted by."""
        if stack is None:
            return self.position, -1, -1
        turn = stack.length - 1 - index if self.reverse else index
        return self.position, turn, self.inside


def places(traced: Traced) -> list[Place]:
    """Returns where each parameter leaf first meets data, and how it is scanned.

    A constant, such as the weights that a penalty pulls to, is data only for a leaf that
    meets no other.
    """
    program = inline(traced, every_call=True)
    # A scalar that the loss closed over is a coefficient, not data.
    batch = [v for v in program.consts if graph.shape(v)]
    inputs = [*program.inputs[: len(program.inputs) - traced.constants], *batch]
    met = lambda sources: _first_meetings(
        program.eqns, program.params, graph.dependents(program.eqns, sources)
    )
    first = met(inputs)
    if traced.constants:
        first = {**met([*program.inputs, *batch]), **first}
    found = [Place(first.get(v, -1)) for v in program.params]
    for leaf, scanned in _scanned(program).items():
        if len({axis for axis, _, _ in scanned}) == 1:
            axis, inside, reverse = scanned[0]
            found[leaf] = Place(found[leaf].position, axis, inside, reverse)
    return found


def ranks(
    names: Sequence[str],
    leaf_layer: Sequence[int],
    stacks: Sequence[Stack | None],
    met: Sequence[Place],
    stems: Sequence[str],
) -> tuple[int, ...]:
    """Returns the rank of each layer by where its leaves first meet data.

    Where that is not known, by its name; of a stack from index to index.
    """
    first: dict[int, tuple[int, int, int]] = {}
    order = list(names)
    for at, stack, place, stem in zip(leaf_layer, stacks, met, stems, strict=True):
        for i in range(stack.length if stack else at >= 0):
            if stack is not None:
                order[at + i] = sort_name(names[at + i], stem)
            if place.position >= 0:
                key = place.key(i, stack)
                first[at + i] = min(first.get(at + i, key), key)
    never = (-1, -1, -1)
    keys = [(first.get(i, never), natural_order(n), i) for i, n in enumerate(order)]
    by_depth = sorted(range(len(names)), key=keys.__getitem__)
    return tuple(int(rank) for rank in np.argsort(by_depth))


def _first_meetings(
    eqns: Sequence[core.JaxprEqn], sources: Sequence[core.Var], data: set[core.Var]
) -> dict[core.Var, int]:
    """Returns for the sources that meet data the first equation where they do."""
    waiting = {v: frozenset({v}) for v in sources}
    first: dict[core.Var, int] = {}
    for position, eqn in enumerate(eqns):
        read = [atom for atom in eqn.invars if graph.is_var(atom)]
        touched = frozenset().union(*(waiting.get(v, frozenset()) for v in read))
        touched = frozenset(v for v in touched if v not in first)
        if touched and any(v in data for v in read):
            first.update(dict.fromkeys(touched, position))
        elif touched:
            waiting.update(dict.fromkeys(eqn.outvars, touched))
    return first


_Scanned = tuple[int, int, bool]  # axis, place inside, and whether it is reversed


def _scanned(program: Program) -> dict[int, list[_Scanned]]:
    """Returns how each leaf is scanned that is; also within scans that all see it."""
    found: dict[int, list[_Scanned]] = {}

    def walk(eqns, sources):
        """`sources` returns for a variable from outside and an axis leaves and axes."""
        views = Views(eqns)

        def leaves_of(atom, axis):
            among = views.leaves(atom, axis, sources)
            return [pair for v, at in among.items() for pair in sources[v](at)]

        for scan in _scans(eqns):
            leaves = [leaves_of(atom, 0) for atom in scan.slices]
            body = inline(Traced(scan.eqn.params["jaxpr"], 0, None), every_call=True)
            if any(leaves):
                first = _inside(scan, body, [bool(own) for own in leaves])
                reverse = bool(scan.eqn.params["reverse"])
                for own, at in zip(leaves, first, strict=True):
                    for leaf, axis in own:
                        found.setdefault(leaf, []).append((axis, at, reverse))
            consts = zip(body.inputs, scan.eqn.invars[: scan.consts], strict=False)
            walk(body.eqns, {v: functools.partial(leaves_of, a) for v, a in consts})

    of_leaf = lambda i: lambda axis: [(i, axis)]
    walk(program.eqns, {v: of_leaf(i) for i, v in enumerate(program.params)})
    return found


def _scans(eqns: Iterable[core.JaxprEqn]) -> list[Scan]:
    return [scan for scan in map(Scan.of, eqns) if scan is not None]


def _inside(scan: Scan, body: Program, is_parameter: Sequence[bool]) -> list[int]:
    """Returns for each input that is sliced where in the body it first meets data."""
    carries = body.inputs[scan.consts : scan.consts + scan.carries]
    slices = body.inputs[scan.consts + scan.carries :]
    pairs = list(zip(slices, is_parameter, strict=True))
    data = [*carries, *(v for v, own in pairs if not own)]
    sources = [v for v, own in pairs if own]
    first = _first_meetings(body.eqns, sources, graph.dependents(body.eqns, data))
    return [first.get(v, -1) for v in slices]
