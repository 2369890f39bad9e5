"""Where each leaf of a state lies on a mesh: as its parameter does, or everywhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import _checks


def of_state(state: Any, params: Any, model_state: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every leaf of a `TrainState`, structured as it.

    Moments, averages and directions lie as the parameter whose path theirs ends with and
    whose shape they have; what is no parameter's is on every device.

    Args:
      state: The state, or its shapes; a leaf that is cut over the mesh already stays so.
      params: Shardings of the parameters.
      model_state: Shardings of the model state.
      mesh: The mesh.
    """
    shardings = jax.tree.leaves(params)
    named = jax.tree_util.tree_leaves_with_path(state.params)
    places = [
        (path, jnp.shape(x), sharding)
        for (path, x), sharding in zip(named, shardings, strict=True)
    ]
    layers = state.method_state.layers.value
    members = [
        ((jax.tree_util.SequenceKey(i),), *places[at][1:])
        for i, at in enumerate(layers.member_leaves)
    ]
    like = lambda tree, places: jax.tree_util.tree_map_with_path(
        lambda path, x: _place(path, x, places, mesh), tree
    )
    found = like(state, places)
    memory = state.method_state.memory
    kept = found.method_state.memory._replace(combine=like(memory.combine, members))
    return found._replace(
        params=params,
        model_state=model_state,
        method_state=found.method_state._replace(memory=kept),
    )


def _place(path: Any, x: Any, places: Any, mesh: Mesh) -> NamedSharding:
    if is_cut(x, mesh):
        return x.sharding
    ends = lambda suffix: not suffix or path[-len(suffix) :] == suffix
    fitting = [p for p in places if p[1] == jnp.shape(x) and ends(p[0])]
    if not fitting:
        return NamedSharding(mesh, PartitionSpec())
    return max(fitting, key=lambda p: len(p[0]))[2]


def is_cut(x: Any, mesh: Mesh) -> bool:
    """Whether an array lies on a mesh, cut over some of its axes."""
    return _is_on(x, mesh) and not x.sharding.is_fully_replicated


def _is_on(x: Any, mesh: Mesh) -> bool:
    own = x.sharding if isinstance(x, jax.Array) else None
    return isinstance(own, NamedSharding) and own.mesh == mesh


def given(who: str, path: Any, x: Any, mesh: Mesh) -> NamedSharding:
    """Returns the sharding that an array came with, as one on the mesh.

    One that lies on a single device, or on all of them, is replicated.

    Raises:
      ValueError: For one that is cut over another mesh.
    """
    if _is_on(x, mesh):
        return x.sharding
    own = x.sharding if isinstance(x, jax.Array) else None
    if own is None or own.is_fully_replicated:
        return NamedSharding(mesh, PartitionSpec())
    remedy = "jax.device_put(x, NamedSharding(mesh, spec)) puts it there."
    expected = f"on the step's mesh, {mesh}, or on one device"
    where = f"state{jax.tree_util.keystr(path)}"
    raise _checks.value_error(who, where, expected, f"on {own}", remedy)
