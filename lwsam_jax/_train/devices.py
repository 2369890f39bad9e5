"""How a step is spread over devices: one, pmap, or a mesh. States have no device axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import _checks


_PMAP_AXIS = "data"


class Devices:
    """Data parallelism over `parallel`: None, "pmap", or a `jax.sharding.Mesh`.

    Attributes:
      axis_name: Name (or names) of the mapped axis inside a step, or None.
      count: Number of devices that share a batch.
    """

    def __init__(self, who: str, parallel: Any, donate: bool = True) -> None:
        """Refuses what is none of the three."""
        self._who, self._donate = who, donate
        self._mesh = parallel if isinstance(parallel, Mesh) else None
        self.axis_name: Any = None
        self.count = 1
        if self._mesh is not None:
            self.axis_name, self.count = self._mesh.axis_names, self._mesh.devices.size
        elif parallel == "pmap":
            self.axis_name, self.count = _PMAP_AXIS, jax.local_device_count()
        elif parallel is not None:
            remedy = "Pass None, 'pmap', or a jax.sharding.Mesh."
            raise _checks.value_error(
                who, "parallel", "a way to spread", repr(parallel), remedy
            )

    def axis_sizes(self) -> list[tuple[Any, int]]:
        """Returns the mapped axes as `jax.make_jaxpr` takes them."""
        if self._mesh is not None:
            return list(self._mesh.shape.items())
        return [] if self.axis_name is None else [(self.axis_name, self.count)]

    def share(self, x: Any, lead: int = 0) -> jax.ShapeDtypeStruct:
        """Returns the shape that one device sees of a leaf; its batch axis is `lead`."""
        x = x if hasattr(x, "dtype") else np.asarray(x)
        if len(x.shape) <= lead:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        if x.shape[lead] % self.count:
            remedy = "Pad the batch, drop its remainder, or use fewer devices."
            expected = f"divisible by the {self.count} devices in axis {lead}"
            raise _checks.value_error(
                self._who, "batch", expected, str(x.shape), remedy
            )
        shape = (*x.shape[:lead], x.shape[lead] // self.count, *x.shape[lead + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def place_state(self, state: Any) -> Any:
        """Puts a state where steps expect it."""
        if self._mesh is None:
            return state
        return jax.device_put(state, NamedSharding(self._mesh, PartitionSpec()))

    def place(self, batch: Any, lead: int = 0) -> Any:
        """Puts a global batch where steps expect it; raises where it does not divide."""
        if self.axis_name is None:
            return batch
        shares = jax.tree.map(lambda x: self.share(x, lead), batch)
        if self._mesh is not None:
            mesh = self._mesh
            shard = lambda x: NamedSharding(mesh, self._spec(x, lead))
            return jax.tree.map(lambda x: jax.device_put(x, shard(x)), batch)
        split = lambda x, one: (
            x.reshape(*x.shape[:lead], self.count, *one.shape[lead:])
            if np.ndim(x) > lead
            else x
        )
        return jax.tree.map(split, batch, shares)

    def _spec(self, x: Any, lead: int) -> PartitionSpec:
        if np.ndim(x) <= lead:
            return PartitionSpec()
        return PartitionSpec(*[None] * lead, self.axis_name)

    def compile(
        self, local: Callable[..., Any], lead: int = 0, donates: bool = True
    ) -> Any:
        """Returns `local(state, batch)` as a jitted step that may donate its state."""
        donated = (0,) if donates and self._donate else ()
        if self._mesh is not None:
            mesh = self._mesh

            def sharded(state, batch):
                return jax.shard_map(
                    local,
                    mesh=mesh,
                    in_specs=(
                        PartitionSpec(),
                        jax.tree.map(lambda x: self._spec(x, lead), batch),
                    ),
                    out_specs=PartitionSpec(),
                    # The check cannot type a scan whose carry starts as a constant, so
                    # it would refuse many models; our casts are exact without it.
                    check_vma=False,
                )(state, batch)

            return jax.jit(sharded, donate_argnums=donated)
        if self.axis_name is not None:
            return _Pmapped(local, lead, donated)
        return jax.jit(local, donate_argnums=donated)

    def average(self, model_state: Any, metrics: Any) -> tuple[Any, Any]:
        """Averages float leaves over the devices; sums integer metrics."""
        axis = self.axis_name
        if axis is None:
            return model_state, metrics
        add = lambda x: jax.lax.psum(x, axis)
        return (
            jax.tree.map(lambda x: _mean_or(x, axis, lambda x: x), model_state),
            jax.tree.map(lambda x: _mean_or(x, axis, add), metrics),
        )

    def index(self) -> Any:
        """Returns the number of this device, inside a step."""
        return 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name)

    def local_key(self, key: jax.Array) -> jax.Array:
        """Returns a key of the device's own."""
        if self.axis_name is None:
            return key
        return jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))


def _mean_or(x: Any, axis: Any, otherwise: Callable[[Any], Any]) -> Any:
    x = jnp.asarray(x)
    is_float = jnp.issubdtype(x.dtype, jnp.inexact)
    return jax.lax.pmean(x, axis) if is_float else otherwise(x)


class _Pmapped:
    """A pmapped step; the axes of a batch are known only when it comes."""

    def __init__(
        self, local: Callable[..., Any], lead: int, donated: tuple[int, ...]
    ) -> None:
        self._local, self._lead, self._donated = local, lead, donated
        self._steps: dict[Any, Any] = {}

    def _step(self, batch: Any) -> Any:
        lead = self._lead
        leaves, treedef = jax.tree.flatten(batch)
        axes = tuple(lead if np.ndim(x) > lead else None for x in leaves)
        if (treedef, axes) not in self._steps:
            self._steps[treedef, axes] = jax.pmap(
                self._local,
                axis_name=_PMAP_AXIS,
                in_axes=(None, jax.tree.unflatten(treedef, axes)),
                out_axes=None,
                donate_argnums=self._donated,
            )
        return self._steps[treedef, axes]

    def __call__(self, state: Any, batch: Any) -> Any:
        return self._step(batch)(state, batch)

    def lower(self, state: Any, batch: Any) -> Any:
        return self._step(batch).lower(state, batch)
