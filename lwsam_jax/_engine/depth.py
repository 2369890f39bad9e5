"""How deep in a loss its parameters stand: where each first meets data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import graph
from .inline import inline
from .trace import AxisEnv, trace


def first_meetings(
    params: Any,
    loss_fn: Callable[..., Any],
    args: tuple[Any, ...],
    axis_env: AxisEnv = None,
) -> list[int]:
    """Returns for each parameter leaf the first equation where it meets data, or -1."""
    program = inline(trace(loss_fn, params, args, axis_env), every_call=True)
    # A scalar that the loss closed over is a coefficient, not data.
    batch = [v for v in program.consts if graph.shape(v)]
    data = graph.dependents(program.eqns, [*program.inputs, *batch])
    waiting = {v: frozenset({i}) for i, v in enumerate(program.params)}
    first = [-1] * len(program.params)
    for position, eqn in enumerate(program.eqns):
        read = [atom for atom in eqn.invars if graph.is_var(atom)]
        touched = frozenset().union(*(waiting.get(v, frozenset()) for v in read))
        touched = frozenset(i for i in touched if first[i] < 0)
        if touched and any(v in data for v in read):
            for i in touched:
                first[i] = position
        elif touched:
            waiting.update(dict.fromkeys(eqn.outvars, touched))
    return first
