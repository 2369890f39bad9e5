"""A loss traced once: from a function of trees to a jaxpr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core


AxisEnv = Sequence[tuple[Any, int]] | None


class Traced(NamedTuple):
    """A function of parameters and other arguments as JAX traced it.

    Attributes:
      closed: The jaxpr; the leaves of the parameters are its first inputs, the arrays
        among the other arguments follow.
      params: How many leaves the parameters have.
      out_tree: Structure of the output.
    """

    closed: core.ClosedJaxpr
    params: int
    out_tree: Any


def trace(
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...] = (),
    axis_env: AxisEnv = None,
) -> Traced:
    """Traces `fn(params, *args)`; arguments that are no arrays stay as they are.

    Args:
      fn: Returns any pytree of arrays.
      params: Tree of arrays, tracers or `jax.ShapeDtypeStruct`s.
      args: Trees of the same, or of anything else.
      axis_env: Names and sizes of mapped axes that `fn` uses, if it is traced outside.
    """
    leaves, treedef = jax.tree.flatten(params)
    rest, rest_tree = jax.tree.flatten(args)
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
    return Traced(closed, len(leaves), structure[-1])
