"""A traced function as one flat list of equations, and what depends on what in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.extend import core


AxisEnv = Sequence[tuple[Any, int]] | None


class Traced(NamedTuple):
    """A function traced to equations, with nested plain `jit`s inlined.

    Attributes:
      eqns: Equations in execution order; no two define the same variable.
      invars: One variable for each traced argument.
      consts: Values of the arrays that the function closed over.
      outvars: One atom for each output leaf.
      out_tree: Structure of the output.
    """

    eqns: list[core.JaxprEqn]
    invars: list[core.Var]
    consts: dict[core.Var, Any]
    outvars: list[Any]
    out_tree: Any
    debug_info: Any


def is_var(atom: Any) -> TypeGuard[core.Var]:
    """Whether an atom is a variable (else it is a literal)."""
    return not isinstance(atom, core.Literal)


def shape(atom: Any) -> tuple[int, ...]:
    """Returns the shape of an atom; () for what has none."""
    return getattr(atom.aval, "shape", ())


def is_inexact(atom: Any) -> bool:
    """Whether an atom is of a float or complex dtype."""
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


REMAT = frozenset({"checkpoint", "remat", "remat2"})
CALLS = REMAT | {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"}


def trace(
    fn: Callable[..., Any],
    leaves: Sequence[Any],
    inline_calls: bool = False,
    axis_env: AxisEnv = None,
) -> Traced:
    """Traces `fn(*leaves)` and inlines nested `jit`s.

    Args:
      fn: Function of arrays; returns any pytree of arrays.
      leaves: Arrays, tracers or `jax.ShapeDtypeStruct`s.
      inline_calls: Inline every kind of call, also those that mean something to JAX's
        transformations (remat, custom derivatives, shardings). For reading only.
      axis_env: Names and sizes of mapped axes that `fn` uses, if it is traced outside.
    """
    structure = []

    def flat(*args):
        outputs, out_tree = jax.tree.flatten(fn(*args))
        structure.append(out_tree)
        return outputs

    closed = jax.make_jaxpr(flat, axis_env=axis_env)(*leaves)
    consts = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    eqns: list[core.JaxprEqn] = []
    invars = list(closed.jaxpr.invars)
    outvars = _inline(closed.jaxpr, invars, consts, eqns, inline_calls)
    return Traced(eqns, invars, consts, outvars, structure[-1], closed.jaxpr.debug_info)


def trace_call(
    loss_fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    inline_calls: bool = False,
    axis_env: AxisEnv = None,
) -> tuple[Traced, list[core.Var]]:
    """Traces `loss_fn(params, *args)`; arguments that are no arrays stay as they are.

    Returns:
      The traced loss with the parameters alone as its `invars`, and the variables of
      the arrays in `args`.
    """
    leaves, treedef = jax.tree.flatten(params)
    rest, rest_tree = jax.tree.flatten(args)
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in rest]

    def flat(*traced):
        values = iter(traced[len(leaves) :])
        inner = [next(values) if a else x for x, a in zip(rest, is_array, strict=True)]
        own = jax.tree.unflatten(treedef, traced[: len(leaves)])
        return loss_fn(own, *jax.tree.unflatten(rest_tree, inner))

    arrays = [x for x, a in zip(rest, is_array, strict=True) if a]
    traced = trace(flat, [*leaves, *arrays], inline_calls, axis_env)
    invars, inputs = traced.invars[: len(leaves)], traced.invars[len(leaves) :]
    return traced._replace(invars=invars), inputs


def _inline(
    jaxpr: core.Jaxpr,
    args: Sequence[Any],
    consts: dict[core.Var, Any],
    eqns: list[core.JaxprEqn],
    inline_calls: bool = False,
) -> list[Any]:
    """Appends the equations of `jaxpr` applied to `args`; returns its outputs.

    Every call gets variables of its own: JAX caches inner jaxprs, so one that is called
    twice would define each variable twice.
    """
    env = dict(zip(jaxpr.invars, args, strict=True))
    env.update({v: v for v in jaxpr.constvars})

    def read(atom):
        return env[atom] if is_var(atom) else atom

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if _is_plain_jit(eqn) or (inline_calls and eqn.primitive.name in CALLS):
            inner = _body(eqn)
            fresh = [core.Var(v.aval) for v in inner.jaxpr.constvars]
            consts.update(zip(fresh, inner.consts, strict=True))
            body = _lift_constvars(inner.jaxpr)
            outputs = _inline(body, [*fresh, *inputs], consts, eqns, inline_calls)
        else:
            outputs = [core.Var(v.aval) for v in eqn.outvars]
            eqns.append(eqn.replace(invars=inputs, outvars=outputs))
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _body(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    """Returns the function that a call equation calls."""
    body = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
    return core.ClosedJaxpr(body, ()) if isinstance(body, core.Jaxpr) else body


def _lift_constvars(jaxpr: core.Jaxpr) -> core.Jaxpr:
    if not jaxpr.constvars:
        return jaxpr
    return make_jaxpr(
        [*jaxpr.constvars, *jaxpr.invars],
        jaxpr.outvars,
        jaxpr.eqns,
        jaxpr.debug_info,
    )


def _is_plain_jit(eqn: core.JaxprEqn) -> bool:
    """Whether the equation is a `jit` that only groups equations.

    One with shardings, donation, layouts or compiler options means something: it stays.
    """
    if eqn.primitive.name not in ("jit", "pjit"):
        return False
    shardings = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    layouts = (*eqn.params["in_layouts"], *eqn.params["out_layouts"])
    return (
        all(type(s).__name__ == "UnspecifiedValue" for s in shardings)
        and all(layout is None for layout in layouts)
        and not any(eqn.params["donated_invars"])
        and not eqn.params["compiler_options_kvs"]
    )


def inline_body(jaxpr: core.Jaxpr) -> tuple[list[core.JaxprEqn], list[Any]]:
    """Returns the equations and outputs of an open jaxpr, with plain jits inlined.

    Where an inner jit carries constants of its own, the equations are left as they are.
    """
    consts: dict[core.Var, Any] = {}
    eqns: list[core.JaxprEqn] = []
    outvars = _inline(jaxpr, jaxpr.invars, consts, eqns)
    return (list(jaxpr.eqns), list(jaxpr.outvars)) if consts else (eqns, outvars)


def make_jaxpr(
    invars: Sequence[core.Var],
    outvars: Sequence[Any],
    eqns: Sequence[core.JaxprEqn],
    debug_info: Any,
) -> core.Jaxpr:
    """Builds an open jaxpr without constants."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    debug_info = debug_info._replace(
        arg_names=("",) * len(invars), result_paths=("",) * len(outvars)
    )
    return core.Jaxpr((), invars, outvars, eqns, effects, debug_info)


def as_function(jaxpr: core.Jaxpr) -> Callable[..., list[jax.Array]]:
    """Returns a function that runs an open jaxpr; its outputs are arrays, all of them."""
    run = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))

    def function(*args):
        outputs = run(*args)  # a literal output comes as a scalar of a private type
        return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in outputs]

    return function


def dependents(
    eqns: Iterable[core.JaxprEqn],
    sources: Iterable[core.Var],
    differentiably: bool = False,
) -> set[core.Var]:
    """Returns every variable that depends on one of `sources`, these included.

    Args:
      eqns: In execution order.
      sources: Where to begin.
      differentiably: Leave out what no derivative reaches: behind a `stop_gradient`, or
        by way of integers alone.
    """
    found = set(sources)
    for eqn in eqns:
        if differentiably and eqn.primitive.name == "stop_gradient":
            continue
        if any(is_var(atom) and atom in found for atom in eqn.invars):
            found.update(v for v in eqn.outvars if is_inexact(v) or not differentiably)
    return found


def ancestors(eqns: Sequence[core.JaxprEqn], targets: Iterable[Any]) -> set[core.Var]:
    """Returns every variable that one of `targets` depends on, these included."""
    found = {atom for atom in targets if is_var(atom)}
    for eqn in reversed(eqns):
        if any(v in found for v in eqn.outvars):
            found.update(atom for atom in eqn.invars if is_var(atom))
    return found


def free_variables(
    eqns: Sequence[core.JaxprEqn], outvars: Iterable[Any]
) -> list[core.Var]:
    """Returns the variables that are read but not defined, in order of first use."""
    defined: set[core.Var] = set()
    free: dict[core.Var, None] = {}
    for eqn in eqns:
        for atom in eqn.invars:
            if is_var(atom) and atom not in defined:
                free.setdefault(atom)
        defined.update(eqn.outvars)
    for atom in outvars:
        if is_var(atom) and atom not in defined:
            free.setdefault(atom)
    return list(free)
