"""FLOPs of traced equations, forward and transposed, counted as XLA counts them.

A multiply-add is two FLOPs, an elementwise operation one for each element, a
transcendental function none (XLA keeps a separate count of those), data movement none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from . import _jaxpr


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
_LINEAR = frozenset("add sub neg add_any convert_element_type real imag psum".split())
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin "
    "cumsum cumprod cummax cummin cumlogsumexp".split()
)
# Multiplications that the derivative of a function of one argument costs per element.
_DERIVATIVE = {"tanh": 3, "logistic": 3, "rsqrt": 2, "integer_pow": 2, "erf": 3}


def _size(atom: Any) -> int:
    return math.prod(getattr(atom.aval, "shape", ()))


def forward(eqn: core.JaxprEqn) -> float:
    """Returns the FLOPs of running an equation once."""
    name = eqn.primitive.name
    bodies = _bodies(eqn)
    if bodies:
        each = [times * sum(map(forward, body.eqns)) for body, times in bodies]
        return max(each) if name == "cond" else sum(each)
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


def backward(
    eqns: Sequence[core.JaxprEqn], wrt: set[core.Var], outputs: Sequence[Any]
) -> float:
    """Returns the FLOPs of the backward pass from `outputs` to the variables `wrt`."""
    return sum(backward_by_equation(eqns, wrt, outputs))


def backward_by_equation(
    eqns: Sequence[core.JaxprEqn], wrt: set[core.Var], outputs: Sequence[Any]
) -> list[float]:
    """Returns the FLOPs of each equation's part in a backward pass."""
    active = _jaxpr.dependents(eqns, wrt) & _jaxpr.ancestors(eqns, outputs)
    return [
        transposed(eqn, [_jaxpr.is_var(a) and a in active for a in eqn.invars])
        if any(v in active for v in eqn.outvars)
        else 0.0
        for eqn in eqns
    ]


def transposed(eqn: core.JaxprEqn, active: Sequence[bool]) -> float:
    """Returns the FLOPs of carrying an equation's cotangent to its active inputs."""
    if not any(active):
        return 0.0
    name = eqn.primitive.name
    bodies = _bodies(eqn)
    if bodies:
        each = [
            times * _transposed_body(eqn, body, active) for body, times in bodies
        ]
        return max(each) if name == "cond" else sum(each)
    return float(sum(_one_input(eqn, i) for i, on in enumerate(active) if on))


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
    times = float(eqn.params.get("length", 1)) if eqn.primitive.name == "scan" else 1.0
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            body = getattr(item, "jaxpr", item)
            if isinstance(body, core.Jaxpr):
                found.append((body, times))
    return found


def _transposed_body(
    eqn: core.JaxprEqn, body: core.Jaxpr, active: Sequence[bool]
) -> float:
    offset = len(eqn.invars) - len(body.invars)  # the index of a cond comes first
    inner_active = list(active[offset:]) if offset >= 0 else [True] * len(body.invars)
    if eqn.primitive.name == "scan":
        _close_over_carry(eqn, body, inner_active)
    wrt = {v for v, on in zip(body.invars, inner_active, strict=True) if on}
    total = backward(body.eqns, wrt, body.outvars)
    if eqn.primitive.name in _jaxpr.REMAT:
        total += sum(map(forward, body.eqns))
    return total


def _close_over_carry(
    eqn: core.JaxprEqn, body: core.Jaxpr, active: list[bool]
) -> None:
    """Marks carries that become active because an earlier iteration makes them so."""
    first, count = eqn.params["num_consts"], eqn.params["num_carry"]
    changed = True
    while changed:
        wrt = {v for v, on in zip(body.invars, active, strict=True) if on}
        reached = _jaxpr.dependents(body.eqns, wrt)
        changed = False
        for i, out in enumerate(body.outvars[:count]):
            if _jaxpr.is_var(out) and out in reached and not active[first + i]:
                active[first + i] = changed = True


def _dot(eqn: core.JaxprEqn) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * _size(eqn.outvars[0]) * math.prod(shape[d] for d in contract)


def _conv(eqn: core.JaxprEqn) -> float:
    """Counts the taps that fall on data; padding and the holes of dilation are free."""
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs = (atom.aval.shape for atom in eqn.invars[:2])
    out = eqn.outvars[0].aval.shape
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
    *, size: int, kernel: int, outputs: int, stride: int, pad: int, base: int, window: int
) -> int:
    """Returns the pairs (output, kernel element) that meet an element of the input."""
    count = 0
    extent = (size - 1) * base + 1
    for element in range(kernel):
        start = element * window - pad
        for position in range(start, start + outputs * stride, stride):
            count += 0 <= position < extent and position % base == 0
    return count
