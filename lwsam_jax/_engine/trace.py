"""A loss traced once: from a function of trees to a jaxpr, and to a flat list.

Nested `jit`s only group equations, so they are inlined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from .graph import CALLS, is_var


AxisEnv = Sequence[tuple[Any, int]] | None


class Traced(NamedTuple):
    """A function of parameters and other arguments as JAX traced it.

    Attributes:
      closed: The jaxpr; the leaves of the parameters are its first inputs, the arrays
        among the other arguments follow.
      params: How many leaves the parameters have.
      out_tree: Structure of the output.
      constants: How many of the last inputs are the same in every step, no data.
    """

    closed: core.ClosedJaxpr
    params: int
    out_tree: Any
    constants: int = 0


def trace(
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...] = (),
    axis_env: AxisEnv = None,
    constants: tuple[Any, ...] = (),
) -> Traced:
    """Traces `fn(params, *args, *constants)`; what are no arrays stay as they are.

    Args:
      fn: Returns any pytree of arrays.
      params: Tree of arrays, tracers or `jax.ShapeDtypeStruct`s.
      args: Trees of the same, or of anything else.
      axis_env: Names and sizes of mapped axes that `fn` uses, if it is traced outside.
      constants: Trees of arguments that are no data.
    """
    leaves, treedef = jax.tree.flatten(params)
    rest, rest_tree = jax.tree.flatten((*args, *constants))
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in rest]
    structure = []

    def flat(*traced):
        values = iter(traced[len(leaves) :])
        inner = [next(values) if a else x for x, a in zip(rest, is_array, strict=True)]
        own = jax.tree.unflatten(treedef, traced[: len(leaves)])
        output = fn(own, *jax.tree.unflatten(rest_tree, inner))
        outputs, out_tree = jax.tree.flatten(output)
        structure.append(out_tree)
        return outputs

    arrays = [x for x, a in zip(rest, is_array, strict=True) if a]
    closed = jax.make_jaxpr(flat, axis_env=axis_env)(*leaves, *arrays)
    last = sum(is_array[len(jax.tree.leaves(args)) :])
    return Traced(closed, len(leaves), structure[-1], last)


class Program(NamedTuple):
    """The equations of a function of parameters and other arguments.

    Attributes:
      eqns: Equations in execution order; no two define the same variable.
      params: One variable for each leaf of the parameters.
      inputs: One variable for each array among the other arguments.
      consts: Values of the arrays that the function closed over.
      outputs: One atom for each leaf of the output.
      debug_info: What JAX's messages say about the function.
    """

    eqns: list[core.JaxprEqn]
    params: list[core.Var]
    inputs: list[core.Var]
    consts: dict[core.Var, Any]
    outputs: list[Any]
    debug_info: Any


def inline(traced: Traced, every_call: bool = False) -> Program:
    """Inlines the nested `jit`s of a traced function.

    Args:
      traced: The function.
      every_call: Inline every kind of call, also those that mean something to JAX's
        transformations (remat, custom derivatives, shardings). For reading only.
    """
    jaxpr = traced.closed.jaxpr
    consts = dict(zip(jaxpr.constvars, traced.closed.consts, strict=True))
    eqns: list[core.JaxprEqn] = []
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    outputs = _inline(jaxpr, inputs, consts, eqns, every_call)
    params, rest = jaxpr.invars[: traced.params], jaxpr.invars[traced.params :]
    return Program(eqns, params, rest, consts, outputs, jaxpr.debug_info)


def inline_body(jaxpr: core.Jaxpr) -> tuple[list[core.JaxprEqn], list[Any]]:
    """Returns the equations and outputs of an open jaxpr, with plain jits inlined.

    Where an inner jit carries constants of its own, the equations are left as they are.
    """
    consts: dict[core.Var, Any] = {}
    eqns: list[core.JaxprEqn] = []
    outputs = _inline(jaxpr, jaxpr.invars, consts, eqns, False)
    return (list(jaxpr.eqns), list(jaxpr.outvars)) if consts else (eqns, outputs)


def inline_call(
    closed: core.ClosedJaxpr, atoms: Sequence[Any], consts: dict[core.Var, Any]
) -> tuple[list[core.JaxprEqn], list[Any]]:
    """Returns the equations and outputs of a function applied to atoms.

    Arrays that it closed over become variables, which are added to `consts`.
    """
    fresh = [core.Var(v.aval) for v in closed.jaxpr.constvars]
    consts.update(zip(fresh, closed.consts, strict=True))
    eqns: list[core.JaxprEqn] = []
    outputs = _inline(closed.jaxpr, [*fresh, *atoms], consts, eqns, False)
    return eqns, outputs


def _inline(
    jaxpr: core.Jaxpr,
    inputs: Sequence[Any],
    consts: dict[core.Var, Any],
    eqns: list[core.JaxprEqn],
    every_call: bool,
) -> list[Any]:
    """Appends the equations of `jaxpr` applied to `inputs`; returns its outputs.

    Every call gets variables of its own: JAX caches inner jaxprs, so one that is called
    twice would define each variable twice.
    """
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))
    read = lambda atom: env[atom] if is_var(atom) else atom
    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        if _is_plain_jit(eqn) or (every_call and eqn.primitive.name in CALLS):
            body = _body(eqn)
            fresh = [core.Var(v.aval) for v in body.jaxpr.constvars]
            consts.update(zip(fresh, body.consts, strict=True))
            outputs = _inline(body.jaxpr, [*fresh, *given], consts, eqns, every_call)
        else:
            outputs = [core.Var(v.aval) for v in eqn.outvars]
            eqns.append(eqn.replace(invars=given, outvars=outputs))
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _body(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    """Returns the function that a call equation calls."""
    body = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
    return core.ClosedJaxpr(body, ()) if isinstance(body, core.Jaxpr) else body


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
