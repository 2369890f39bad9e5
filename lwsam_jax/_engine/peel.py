"""A scan over stacked layers in three: before, at, and behind the first perturbed one.

What stands before depends on nothing perturbed and belongs to the prefix. The iteration
at the cut is written out, so that it is cut equation by equation as any other block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from . import graph
from .cover import Pieces, Range
from .graph import is_var
from .stacks import Scan, Views
from .trace import inline_call, Program


def peel(
    program: Program, pieces: Pieces
) -> tuple[list[core.JaxprEqn], list[Any], list[core.Var], list[core.Var]]:
    """Cuts the scans of a traced loss at the first perturbed index.

    What stands before the cut belongs to the prefix, but where something perturbed comes
    to the first iteration or is seen by all: then the ascent skips the gradients of its
    weights. A scan stays whole where what is perturbed in it is no view of a parameter.

    Args:
      program: The loss.
      pieces: What is perturbed.

    Returns:
      Its equations and outputs, the variables of the perturbed pieces, and those of the
      rest, in the order of `Pieces.take`.
    """
    chosen = [program.params[i] for i in pieces.selected]
    rest = [program.params[i] for i in pieces.others]
    if not pieces.ranges:
        return program.eqns, program.outputs, chosen, rest
    work = _Peeling(program)
    chosen = []
    for i in pieces.selected:
        own = work.divide(program.params[i], pieces.ranges.get(i))
        for v, is_chosen in own:
            (chosen if is_chosen else rest).append(v)
    work.reached.update(chosen)
    work.spread(0)
    for eqn in program.eqns:
        work.add(eqn)
    eqns, outputs = work.finish(program.outputs)
    return eqns, outputs, chosen, rest


class _Peeling:
    """The equations of a program as they are rewritten one after the other."""

    def __init__(self, program: Program) -> None:
        self.eqns: list[core.JaxprEqn] = []
        self.reached: set[core.Var] = set()
        self._consts = program.consts
        self._views = Views(program.eqns)
        self._parts: dict[core.Var, tuple[Range, list[core.Var]]] = {}
        self._taken: dict[tuple[Any, int, int, int], Any] = {}
        self._now: dict[core.Var, Any] = {}  # what stands for a variable of the program

    def divide(self, v: core.Var, part: Range | None) -> list[tuple[core.Var, bool]]:
        """Returns the variables of the parts of a parameter, and which is perturbed."""
        if part is None:
            return [(v, True)]
        parts = [core.Var(_resized(v.aval, part.axis, b - a)) for a, b in part.bounds]
        self._parts[v] = part, parts
        join = lambda *xs: jax.lax.concatenate(xs, part.axis)
        self._now[v] = self._emit(join, *parts)
        return list(zip(parts, map(part.is_chosen, part.bounds), strict=True))

    def add(self, eqn: core.JaxprEqn) -> None:
        """Appends an equation, or what it becomes."""
        scan = Scan.of(eqn)
        turn = math.inf if scan is None else self._turn(scan)
        start = len(self.eqns)
        if scan is None or math.isinf(turn):
            self.eqns.append(eqn.replace(invars=list(map(self._read, eqn.invars))))
        else:
            self._peel(scan, int(turn))
        self.spread(start)

    def spread(self, start: int) -> None:
        """Adds to what is reached what the equations from a place on make of it."""
        for eqn in self.eqns[start:]:
            if any(is_var(atom) and atom in self.reached for atom in eqn.invars):
                self.reached.update(eqn.outvars)

    def finish(self, outputs: Sequence[Any]) -> tuple[list[core.JaxprEqn], list[Any]]:
        """Returns the equations that are needed, and the outputs."""
        outputs = [self._read(atom) for atom in outputs]
        effects = [atom for eqn in self.eqns if eqn.effects for atom in eqn.invars]
        live = graph.ancestors(self.eqns, [*outputs, *effects])
        needed = lambda e: e.effects or any(v in live for v in e.outvars)
        return [eqn for eqn in self.eqns if needed(eqn)], outputs

    def _read(self, atom: Any) -> Any:
        return self._now.get(atom, atom) if is_var(atom) else atom

    def _is_reached(self, atom: Any) -> bool:
        atom = self._read(atom)
        return is_var(atom) and atom in self.reached

    def _turn(self, scan: Scan) -> float:
        """Returns the iteration at which a scan is peeled; inf: it stays whole."""
        turns = [self._first_turn(atom, 0, scan) for atom in scan.slices]
        turn = min(turns, default=math.inf)
        if turn > 0:
            return turn
        # Nothing stands before it. In the block itself there is, if it has other
        # matrices, and if nothing perturbed comes to it.
        each = scan.consts + scan.carries
        pairs = zip(turns, scan.slices, strict=True)
        waits = any(t > 0 and len(graph.shape(a)) > 2 for t, a in pairs)
        is_met = any(map(self._is_reached, scan.eqn.invars[:each]))
        return 0 if waits and not is_met else math.inf

    def _first_turn(self, atom: Any, axis: int, scan: Scan) -> float:
        """Returns the first iteration whose slice of an atom is perturbed."""
        if not self._is_reached(atom):
            return math.inf
        if atom in self._parts:
            part, _ = self._parts[atom]
            if axis != part.axis:
                return 0
            ends = scan.order.index(part.start), scan.order.index(part.stop - 1)
            return min(ends)
        operands = self._views.operands(atom, axis)
        if not operands or any(
            at is None and self._is_reached(inner) for _, inner, at in operands
        ):
            return 0
        return min(
            self._first_turn(inner, at, scan)
            for _, inner, at in operands
            if at is not None
        )

    def _peel(self, scan: Scan, turn: int) -> None:
        each = scan.consts + scan.carries
        consts = [self._read(a) for a in scan.eqn.invars[: scan.consts]]
        carry = [self._read(a) for a in scan.eqn.invars[scan.consts : each]]
        outputs: list[tuple[int, list[Any]]] = []  # the first index, and its outputs
        for turns in (range(turn), range(turn + 1, scan.length)):
            if turns:
                own = [scan.order[i] for i in (turns[0], turns[-1])]
                bounds = min(own), max(own) + 1
                carry, slices = self._run(scan, consts, carry, bounds)
                outputs.append((bounds[0], slices))
            if turns.start == 0:
                index = scan.order[turn]
                carry, slices = self._run_one(scan, consts, carry, index)
                outputs.append((index, slices))
        self._now.update(zip(scan.eqn.outvars[: scan.carries], carry, strict=True))
        outputs.sort(key=lambda pair: pair[0])
        join = lambda *xs: jax.lax.concatenate(xs, 0)
        for i, v in enumerate(scan.eqn.outvars[scan.carries :]):
            self._now[v] = self._emit(join, *(slices[i] for _, slices in outputs))

    def _run(
        self, scan: Scan, consts: list[Any], carry: list[Any], bounds: tuple[int, int]
    ) -> tuple[list[Any], list[Any]]:
        """Appends a scan over some indices; returns its carries and other outputs."""
        length = bounds[1] - bounds[0]
        slices = [self._take(atom, 0, *bounds) for atom in scan.slices]
        of = [v.aval for v in scan.eqn.outvars]
        outvars = [core.Var(aval) for aval in of[: scan.carries]]
        outvars += [core.Var(_resized(aval, 0, length)) for aval in of[scan.carries :]]
        self.eqns.append(
            scan.eqn.replace(
                invars=[*consts, *carry, *slices],
                outvars=outvars,
                params={**scan.eqn.params, "length": length},
            )
        )
        return list(outvars[: scan.carries]), list(outvars[scan.carries :])

    def _run_one(
        self, scan: Scan, consts: list[Any], carry: list[Any], index: int
    ) -> tuple[list[Any], list[Any]]:
        """Appends the body of a scan for one index."""
        first = lambda x: jax.lax.index_in_dim(x, 0, keepdims=False)
        slices = [
            self._emit(first, self._take(atom, 0, index, index + 1))
            for atom in scan.slices
        ]
        body = scan.eqn.params["jaxpr"]
        eqns, outputs = inline_call(body, [*consts, *carry, *slices], self._consts)
        self.eqns.extend(eqns)
        stack = lambda x: jax.lax.expand_dims(x, (0,))
        sliced = [self._emit(stack, atom) for atom in outputs[scan.carries :]]
        return outputs[: scan.carries], sliced

    def _take(self, atom: Any, axis: int, start: int, stop: int) -> Any:
        """Returns a part of an atom along an axis, if it can be without the others."""
        key = (atom, axis, start, stop) if is_var(atom) else None
        if key is None or key not in self._taken:
            taken = self._take_anew(atom, axis, start, stop)
            if key is None:
                return taken
            self._taken[key] = taken
        return self._taken[key]

    def _take_anew(self, atom: Any, axis: int, start: int, stop: int) -> Any:
        cut = lambda a, b: lambda x: jax.lax.slice_in_dim(x, a, b, axis=axis)
        is_divided = is_var(atom) and atom in self._parts
        if is_divided and self._parts[atom][0].axis == axis:
            part, variables = self._parts[atom]
            found = []
            for (a, b), v in zip(part.bounds, variables, strict=True):
                low, high = max(a, start), min(b, stop)
                if low < high:
                    found.append(self._emit(cut(low - a, high - a), v))
            join = lambda *xs: jax.lax.concatenate(xs, axis)
            return self._emit(join, *found)
        if is_divided or not self._views.leaves(atom, axis, self._parts):
            return self._emit(cut(start, stop), self._read(atom))
        eqn = self._views.equation(atom)
        invars = [self._read(a) for a in eqn.invars]
        for i, inner, at in self._views.operands(atom, axis):
            if at is not None:
                invars[i] = self._take(inner, at, start, stop)
        params = eqn.params
        if "shape" in params:
            shape = list(params["shape"])
            shape[axis] = stop - start
            params = {**params, "shape": tuple(shape)}
        out = core.Var(_resized(atom.aval, axis, stop - start))
        self.eqns.append(eqn.replace(invars=invars, outvars=[out], params=params))
        return out

    def _emit(self, function: Callable[..., Any], *atoms: Any) -> Any:
        """Appends the equations of a function; returns its output."""
        closed = jax.make_jaxpr(function)(*(atom.aval for atom in atoms))
        eqns, (output,) = inline_call(closed, atoms, self._consts)
        self.eqns.extend(eqns)
        return output


def _resized(aval: Any, axis: int, size: int) -> Any:
    """Returns the type of an array with another size of one axis."""
    shape = (*aval.shape[:axis], size, *aval.shape[axis + 1 :])
    return aval.update(shape=shape)
