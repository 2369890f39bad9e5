"""Equations as a graph: what depends on what, and how a part of it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend import core


REMAT = frozenset({"checkpoint", "remat", "remat2"})
CALLS = REMAT | {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"}


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


def differentiated(
    eqns: Sequence[core.JaxprEqn], sources: Iterable[Any], targets: Iterable[Any]
) -> set[core.Var]:
    """Returns the variables that have a cotangent in the gradient of the targets.

    Those on a way from a source to a target that no `stop_gradient` interrupts.
    """
    through = [eqn for eqn in eqns if eqn.primitive.name != "stop_gradient"]
    found = set(sources)
    for eqn in through:
        if any(is_var(atom) and atom in found for atom in eqn.invars):
            found.update(eqn.outvars)
    return found & ancestors(through, targets)


def free_variables(
    eqns: Sequence[core.JaxprEqn], outvars: Iterable[Any]
) -> list[core.Var]:
    """Returns the variables that are read but not defined, in order of first use."""
    defined = {v for eqn in eqns for v in eqn.outvars}
    read = [atom for eqn in eqns for atom in eqn.invars]
    free = (a for a in (*read, *outvars) if is_var(a) and a not in defined)
    return list(dict.fromkeys(free))


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
    """Returns a function that runs an open jaxpr; its outputs are arrays, all of them.

    Not by `jaxpr_as_fun`: that turns `jax_debug_nans` off while it runs, and in JAX 0.10
    what is compiled is not checked for NaN ever after.
    """
    return lambda *args: arrays(eval_jaxpr(jaxpr, (), *args))


def arrays(outputs: Iterable[Any]) -> list[jax.Array]:
    """Returns outputs as arrays; a literal comes as a scalar of a private type."""
    return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in outputs]
