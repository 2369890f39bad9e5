"""FLOPs of traced equations, forward and transposed, counted as XLA counts them.

A multiply-add is two FLOPs, an elementwise operation one for each element, a
transcendental function none (XLA keeps a separate count of those), data movement none.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from . import graph
from .graph import is_var
from .stacks import Scan, Sliced, Views
from .trace import inline, Traced


_MOVES = frozenset(
    "broadcast_in_dim reshape transpose squeeze expand_dims slice dynamic_slice "
    "dynamic_update_slice concatenate pad rev gather iota copy copy_p stop_gradient "
    "bitcast_convert_type split optimization_barrier sharding_constraint pvary pcast "
    "random_bits random_wrap random_unwrap random_seed random_fold_in random_split "
    "debug_callback name mesh_cast reshard".split()
)
_TRANSCENDENTAL = frozenset(
    "exp exp2 log log1p expm1 tanh logistic sin cos tan asin acos atan sinh cosh asinh "
    "acosh atanh sqrt rsqrt cbrt pow erf erfc erf_inv atan2 lgamma digamma".split()
)
_LINEAR = frozenset("sub neg convert_element_type real imag".split())
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin "
    "cumsum cumprod cummax cummin cumlogsumexp".split()
)
# Multiplications that the derivative of a function of one argument costs per element.
_DERIVATIVE = {"tanh": 3, "logistic": 3, "rsqrt": 2, "integer_pow": 2, "erf": 3}


def _size(atom: Any) -> int:
    return math.prod(graph.shape(atom))


class Work(NamedTuple):
    """FLOPs of one equation, or of one inside the body of another.

    What reaches what is a bit mask: one bit for each source given to `works`.

    Attributes:
      forward: FLOPs of running it, times the trips of the loops around it.
      recompute: FLOPs of running it again in a backward pass, under remat.
      sources: Sources that the equation, or the one it is inside, depends on.
      inputs: For each differentiable input the sources that it depends on and the FLOPs
        of its cotangent.
      live: Whether the value depends on it.
    """

    forward: float
    recompute: float
    sources: int
    inputs: tuple[tuple[int, float], ...]
    live: bool


class Unrolled(NamedTuple):
    """A scan whose iterations were counted one by one.

    Attributes:
      before: What reaches its first iteration, or all of them.
      turns: For each iteration the masks of the slices that it gets, each with a bit
        that no other slice has.
    """

    before: int
    turns: list[list[tuple[int, int]]]


def works(
    eqns: Sequence[core.JaxprEqn],
    sources: dict[core.Var, int],
    outputs: Sequence[Any],
    is_open: Callable[[core.JaxprEqn], bool],
    sliced: dict[core.Var, Sliced],
    bits: int,
) -> tuple[list[Work], list[Unrolled]]:
    """Returns the work of every equation, bodies included.

    Args:
      eqns: Equations in execution order.
      sources: Bit mask of each variable that comes from outside.
      outputs: Atoms whose gradient is wanted.
      is_open: Whether a remat is cut open by the split; else it runs as a whole.
      sliced: Those of the sources whose slices differ. A scan over one is cut by the
        split, and counted iteration by iteration.
      bits: How many bits the masks have; others are given to slices.

    Returns:
      The work, and the scans that were counted so.
    """
    views, unrolled = Views(eqns), []
    own_bits = (1 << i for i in itertools.count(bits))
    # By equation, for a body runs often. The equation is kept with it: the place in
    # memory of one that is gone may be that of another.
    flops: dict[int, tuple[core.JaxprEqn, float, list[float]]] = {}

    def cost(eqn):
        if id(eqn) not in flops:
            each = [_one_input(eqn, i) for i in range(len(eqn.invars))]
            flops[id(eqn)] = eqn, forward(eqn), each
        return flops[id(eqn)][1:]

    def unroll(scan, masks, env) -> list[Work]:
        """Counts the iterations of a scan one by one.

        From the one behind the cut on it runs as a whole: each of its equations where
        anything before it is reached.
        """
        body = inline(Traced(scan.eqn.params["jaxpr"], 0, None))
        each, found = scan.consts + scan.carries, []
        carry, earlier = masks[scan.consts : each], union(masks[:each])
        slice_mask = lambda a, i: views.mask_of_slice(a, 0, i, sliced, env)
        turns = []
        for index in scan.order:
            turns.append([(slice_mask(a, index), next(own_bits)) for a in scan.slices])
            slices = [mask and mask | own for mask, own in turns[-1]]
            given = [*masks[: scan.consts], *carry, *slices]
            inner = dict(zip(body.inputs, given, strict=True))
            run = walk(body.eqns, inner, body.outputs, 1.0, None, False)
            found += [w._replace(sources=w.sources | earlier) for w in run]
            carried = body.outputs[: scan.carries]
            carry = [inner.get(a, 0) if is_var(a) else 0 for a in carried]
            earlier |= union(slices)
        unrolled.append(Unrolled(union(masks[:each]), turns))
        return found

    def walk(eqns, env, outputs, times, whole, remat) -> list[Work]:
        """Fills `env` with the mask of each variable.

        `whole` is the mask of the enclosing equation where the split keeps that whole.
        """
        found: list[Work] = []
        live = graph.ancestors(eqns, outputs)
        reached = [v for v, mask in env.items() if mask]
        known = graph.differentiated(eqns, reached, outputs)
        for eqn in eqns:
            masks = [env.get(a, 0) if is_var(a) else 0 for a in eqn.invars]
            every = union(masks)
            env.update(dict.fromkeys(eqn.outvars, every))
            around = every if whole is None else whole
            has_cotangent = any(v in known for v in eqn.outvars)
            scan = Scan.of(eqn) if eqns is program else None
            if scan is not None and any(
                views.leaves(a, 0, sliced) for a in scan.slices
            ):
                found.extend(_with_cotangents(has_cotangent, unroll(scan, masks, env)))
                continue
            branches = []
            for body, trips in _bodies(eqn):
                is_remat = eqn.primitive.name in graph.REMAT
                inside = whole if is_remat and is_open(eqn) else around
                inner = _enter(eqn, body, masks)
                wanted = _live_outputs(eqn, body, live)
                trips, again = times * trips, remat or is_remat
                branches.append(walk(body.eqns, inner, wanted, trips, inside, again))
                _leave(eqn, body, inner, env)
            if eqn.primitive.name == "cond":
                branches = [max(branches, key=lambda b: sum(w.forward for w in b))]
            for branch in branches:
                found.extend(_with_cotangents(has_cotangent, branch))
            if branches:
                continue
            run, of_inputs = cost(eqn)
            run *= times
            inputs = tuple(
                (mask, times * each)
                for a, mask, each in zip(eqn.invars, masks, of_inputs, strict=True)
                if mask and graph.is_inexact(a) and a in known
            )
            is_live = any(v in live for v in eqn.outvars)
            work = Work(run, run if remat else 0.0, around, inputs, is_live)
            found.extend(_with_cotangents(has_cotangent, [work]))
        return found

    program = eqns
    return walk(program, dict(sources), outputs, 1.0, None, False), unrolled


def _with_cotangents(has_any: bool, found: list[Work]) -> list[Work]:
    return found if has_any else [work._replace(inputs=()) for work in found]


def union(masks: Iterable[int]) -> int:
    """Returns what any of some bit masks has."""
    return functools.reduce(operator.or_, masks, 0)


def _enter(
    eqn: core.JaxprEqn, body: core.Jaxpr, masks: Sequence[int]
) -> dict[core.Var, int]:
    """Returns the masks of a body's inputs, carries at their fixed point."""
    offset = len(masks) - len(body.invars)
    if offset < 0 or eqn.primitive.name == "while":
        return dict.fromkeys(body.invars, union(masks))
    inner = dict(zip(body.invars, masks[offset:], strict=True))
    scan = Scan.of(eqn)
    if scan is not None:
        for _ in range(scan.carries):
            before = dict(inner)
            out = _propagate(body, inner)
            pairs = zip(body.invars[scan.consts :], out[: scan.carries], strict=False)
            for v, mask in pairs:
                inner[v] |= mask
            if inner == before:
                break
    return inner


def _propagate(body: core.Jaxpr, inputs: dict[core.Var, int]) -> list[int]:
    env = dict(inputs)
    for eqn in body.eqns:
        masks = [env.get(a, 0) for a in eqn.invars if is_var(a)]
        env.update(dict.fromkeys(eqn.outvars, union(masks)))
    return [env.get(a, 0) if is_var(a) else 0 for a in body.outvars]


def _live_outputs(eqn: core.JaxprEqn, body: core.Jaxpr, live: set[Any]) -> list[Any]:
    """Returns the outputs of a body that the value depends on."""
    if eqn.primitive.name in ("scan", "while") or len(body.outvars) != len(eqn.outvars):
        return list(body.outvars) if any(v in live for v in eqn.outvars) else []
    pairs = zip(body.outvars, eqn.outvars, strict=True)
    return [inner for inner, outer in pairs if outer in live]


def _leave(
    eqn: core.JaxprEqn, body: core.Jaxpr, inner: dict[Any, int], env: dict[Any, int]
) -> None:
    """Sharpens the masks of an equation's outputs where its body is a plain call."""
    if eqn.primitive.name in graph.CALLS and len(body.outvars) == len(eqn.outvars):
        for out, atom in zip(eqn.outvars, body.outvars, strict=True):
            env[out] = inner.get(atom, 0) if is_var(atom) else 0


def forward(eqn: core.JaxprEqn) -> float:
    """Returns the FLOPs of running an equation without a body once."""
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot(eqn)
    if name == "conv_general_dilated":
        return _conv(eqn)
    if name in _MOVES or name in _TRANSCENDENTAL:
        return 0.0
    if name in _REDUCTIONS:
        return float(_size(eqn.invars[0]))
    if name.startswith(("reduce_window", "select_and")):
        return float(_size(eqn.outvars[0]) * math.prod(eqn.params["window_dimensions"]))
    if name.startswith("scatter"):
        return float(_size(eqn.invars[-1]))
    return float(sum(_size(v) for v in eqn.outvars))


def _one_input(eqn: core.JaxprEqn, index: int) -> float:
    """Returns the FLOPs of one input's cotangent."""
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot(eqn)
    if name == "conv_general_dilated":
        return _conv(eqn)
    if name == "broadcast_in_dim":
        grew = _size(eqn.outvars[0]) > _size(eqn.invars[0])
        return float(_size(eqn.outvars[0]) if grew else 0)
    if name in ("gather", "dynamic_slice"):
        return float(_size(eqn.outvars[0]))
    if name in _MOVES or name in ("add", "add_any", "reduce_sum", "psum"):
        return 0.0
    if name in _LINEAR:
        return float(_size(eqn.invars[index]) if name in ("sub", "neg") else 0)
    if name in _REDUCTIONS:
        return 2.0 * _size(eqn.invars[0])
    if name.startswith("reduce_window"):
        return forward(eqn)
    return float(_DERIVATIVE.get(name, 1) * _size(eqn.outvars[0]))


def _bodies(eqn: core.JaxprEqn) -> list[tuple[core.Jaxpr, float]]:
    """Returns the jaxprs inside an equation, each with how often it runs.

    The trip count of a while loop is not known: it counts as one, as XLA counts it.
    """
    times = float(eqn.params["length"]) if eqn.primitive.name == "scan" else 1.0
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            body = getattr(item, "jaxpr", item)
            if isinstance(body, core.Jaxpr):
                found.append((body, times))
    return found


def _dot(eqn: core.JaxprEqn) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = graph.shape(eqn.invars[0])
    return 2.0 * _size(eqn.outvars[0]) * math.prod(shape[d] for d in contract)


def _conv(eqn: core.JaxprEqn) -> float:
    """Counts the taps that fall on data; padding and the holes of dilation are free."""
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs = map(graph.shape, eqn.invars[:2])
    out = graph.shape(eqn.outvars[0])
    taps = 1
    for i, d in enumerate(numbers.lhs_spec[2:]):
        taps *= _taps(
            size=lhs[d],
            kernel=rhs[numbers.rhs_spec[2 + i]],
            outputs=out[numbers.out_spec[2 + i]],
            stride=eqn.params["window_strides"][i],
            pad=eqn.params["padding"][i][0],
            base=eqn.params["lhs_dilation"][i],
            window=eqn.params["rhs_dilation"][i],
        )
    batch = lhs[numbers.lhs_spec[0]] // eqn.params["batch_group_count"]
    features_out, features_in = rhs[numbers.rhs_spec[0]], rhs[numbers.rhs_spec[1]]
    return 2.0 * batch * features_out * features_in * taps


def _taps(
    *,
    size: int,
    kernel: int,
    outputs: int,
    stride: int,
    pad: int,
    base: int,
    window: int,
) -> int:
    """Returns the pairs (output, kernel element) that meet an element of the input."""
    count = 0
    extent = (size - 1) * base + 1
    for element in range(kernel):
        start = element * window - pad
        for position in range(start, start + outputs * stride, stride):
            count += 0 <= position < extent and position % base == 0
    return count
