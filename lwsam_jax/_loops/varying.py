"""Casts and means over mapped axes, exact with and without `check_vma`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def varying(tree: Any, axis_name: Any) -> Any:
    """Casts to device-varying, so that gradients are not summed behind our back.

    `shard_map` with `check_vma` sums the gradients of replicated values by itself; a mean
    after that is too large by the number of devices.
    """
    if axis_name is None:
        return tree
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)

    def cast(x):
        missing = tuple(a for a in axes if a not in _axes_of(x))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        return jax.lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]

    return jax.tree.map(cast, tree)


def local(
    loss: Callable[[Any], Any], params: Any, axis_name: Any
) -> Callable[[Any], Any]:
    """Casts the value of a loss that averages itself to device-varying, too.

    Else, with `check_vma`, the devices would share one cotangent, and the mean over them
    would be too small by their number. Without it values carry no such type.
    """
    if axis_name is None or not any(map(_axes_of, jax.tree.leaves(params))):
        return loss

    def cast(p):
        value, aux = loss(p)
        return varying(value, axis_name), aux

    return cast


def _axes_of(x: Any) -> frozenset[Any]:
    """Returns the mesh axes over which a value's type says that it differs."""
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):  # from JAX 0.10 on
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", ()))


def settled(x: jax.Array, axis_name: Any) -> jax.Array:
    """Returns a scalar that devices have in common, without the type that says other."""
    return mean(x, axis_name) if _axes_of(x) else x


def mean(tree: Any, axis_name: Any) -> Any:
    """Returns the mean over the devices of a mapped axis, or what came without one."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
