"""The two parts of a loss as functions: the one entry of the loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core

from .. import _checks
from . import graph
from .cover import Pieces
from .cut import Cut, cut
from .peel import peel
from .trace import inline, Program, trace, Traced


class Split(NamedTuple):
    """A loss in two parts, over flat lists of leaves.

    Attributes:
      prefix: `prefix(rest) -> (residuals, constants)`; `rest` are the parameters that
        are not perturbed, as `Pieces.take` returns them, `residuals` the values through
        which they reach the loss, and `constants` whatever else the suffix reads.
      suffix: `suffix(chosen, residuals, constants) -> (value, other outputs)`.
      out_tree: Structure of the loss's whole output; its first leaf is the value.
    """

    prefix: Callable[[Sequence[Any]], tuple[list[Any], list[Any]]]
    suffix: Callable[
        [Sequence[Any], Sequence[Any], Sequence[Any]], tuple[Any, list[Any]]
    ]
    out_tree: Any


def split_loss(
    loss: Callable[[Any], Any],
    params: Any,
    pieces: Pieces,
    traced: Traced | None = None,
) -> Split:
    """Splits a loss at the parameters that are perturbed.

    Args:
      loss: `loss(params)`, a scalar or a tree whose first leaf is one; everything else
        is closed over.
      params: Tree of arrays, tracers or `jax.ShapeDtypeStruct`s.
      pieces: Which of its leaves, and ranges of leaves, are perturbed.
      traced: The loss as it was traced, if it was.

    Raises:
      ValueError: If the loss works on mutable Refs.
    """
    traced = trace(loss, params) if traced is None else traced
    program = inline(traced)
    _refuse_refs(program.eqns)
    if _is_searched_for_nan(params):
        return _whole(loss, params, pieces, traced.out_tree)
    eqns, outputs, chosen, rest = peel(program, pieces)
    program = program._replace(eqns=eqns, outputs=outputs)
    parts = _without_dead_residuals(program, cut(program, chosen, rest))
    count = len(parts.residuals)
    crossing = [*parts.residuals, *parts.constants]
    inputs = [*parts.rest, *program.consts]
    first = graph.make_jaxpr(inputs, crossing, parts.before, program.debug_info)
    run_first, run_second = graph.as_function(first), _suffix(program, parts)

    def prefix(rest):
        outputs = run_first(*rest, *program.consts.values())
        return outputs[:count], outputs[count:]

    def suffix(chosen, residuals, constants):
        value, *others = run_second(*chosen, *residuals, *constants)
        return value, others

    return Split(prefix, suffix, traced.out_tree)


def _refuse_refs(eqns: Sequence[core.JaxprEqn]) -> None:
    for eqn in eqns:
        kinds = (type(atom.aval).__name__ for atom in (*eqn.invars, *eqn.outvars))
        if any("Ref" in kind for kind in kinds):
            expected = "free of mutable Refs, for it runs twice"
            got = f"an equation `{eqn.primitive.name}` on a Ref"
            remedy = (
                "Keep state in arrays that the loss takes and returns "
                "(nnx.merge(..., copy=True) inside the loss)."
            )
            raise _checks.value_error(
                "value_and_grad", "loss_fn", expected, got, remedy
            )


def _is_searched_for_nan(params: Any) -> bool:
    """Whether JAX runs the loss operation by operation, to find where a NaN is from."""
    debuggers = ("jax_debug_nans", "jax_debug_infs")
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(params))
    return not traced and any(getattr(jax.config, name) for name in debuggers)


def _whole(
    loss: Callable[[Any], Any], params: Any, pieces: Pieces, out_tree: Any
) -> Split:
    """Returns a split with an empty prefix, and the loss itself as the suffix.

    Only the loss itself has the lines of the user's file, and knows where a NaN in the
    middle of an operation is meant.
    """
    treedef = jax.tree.structure(params)

    def suffix(chosen, residuals, constants):
        del constants
        output = loss(jax.tree.unflatten(treedef, pieces.join(chosen, residuals)))
        value, *rest = graph.arrays(jax.tree.leaves(output))
        return value, rest

    return Split(lambda rest: (list(rest), []), suffix, out_tree)


def _suffix(program: Program, parts: Cut) -> Callable[..., list[jax.Array]]:
    inputs = [*parts.chosen, *parts.residuals, *parts.constants]
    return graph.as_function(
        graph.make_jaxpr(inputs, program.outputs, parts.after, program.debug_info)
    )


def _without_dead_residuals(program: Program, parts: Cut) -> Cut:
    """Makes constants of residuals that came through a while loop and get no gradient.

    JAX has no reverse mode for a while loop and needs none where the gradient that comes
    back is known to be zero. Across the cut it would be an array of zeros, so the suffix
    is first traced to see which of its inputs get a gradient at all.
    """
    from_rest = graph.dependents(parts.before, parts.rest)
    whiles = [eqn for eqn in parts.before if eqn.primitive.name == "while"]
    loops = [v for eqn in whiles for v in eqn.outvars if v in from_rest]
    if not loops:
        return parts
    looped = graph.dependents(parts.before, loops)
    alive = _get_gradients(program, parts)
    dead = [v for i, v in enumerate(parts.residuals) if v in looped and i not in alive]
    residuals = [v for v in parts.residuals if v not in set(dead)]
    return parts._replace(residuals=residuals, constants=[*parts.constants, *dead])


def _get_gradients(program: Program, parts: Cut) -> set[int]:
    """Returns which residuals the value's backward pass carries a gradient to."""
    suffix = _suffix(program, parts)
    seen: set[int] = set()

    def watched(index, x):
        watch = jax.custom_vjp(lambda x: x)
        watch.defvjp(lambda x: (x, None), lambda _, ct: (seen.add(index) or ct,))
        return watch(x)

    def backward(chosen, residuals, constants):
        run = lambda rs: suffix(
            *chosen, *(watched(i, r) for i, r in enumerate(rs)), *constants
        )[0]
        value, pull = jax.vjp(run, residuals)
        return pull(jnp.ones_like(value))

    inputs = (parts.chosen, parts.residuals, parts.constants)
    jax.eval_shape(backward, *([_abstract(v) for v in vs] for vs in inputs))
    return seen


def _abstract(v: core.Var) -> jax.ShapeDtypeStruct:
    aval: Any = v.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
