"""How a step is spread over one device, or over local ones by pmap.

States have no device axis, and batches are global, in every mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._axes.ascent import batch_size


_PMAP_AXIS = "data"


class OneDevice:
    """A step on one device, and what the other ways to run it have in common.

    Attributes:
      axis_name: Name of the mapped axis inside a step, or None.
      count: Number of devices that share a batch.
    """

    axis_name: Any = None
    count: int = 1

    def __init__(self, who: str, donate: bool) -> None:
        """Takes the name for messages, and whether steps donate their state."""
        self._who, self._donate = who, donate

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which a loss is traced."""
        return contextlib.nullcontext()

    def together(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which what raises here raises in every process."""
        return contextlib.nullcontext()

    def refuse_others(self, **trees: Any) -> None:
        """Raises where processes have arrays of their own that are not the same."""

    def axis_sizes(self) -> list[tuple[Any, int]]:
        """Returns the mapped axes as `jax.make_jaxpr` takes them."""
        return [] if self.axis_name is None else [(self.axis_name, self.count)]

    def seen(self, batch: Any) -> Any:
        """Returns the shapes that the loss sees of a batch."""
        return jax.tree.map(_shape_of, batch)

    def share(self, batch: Any) -> Any:
        """Returns the shapes that an ascent cuts: those of one device's share."""
        return self.seen(batch)

    def place(self, tree: Any) -> Any:
        """Puts parameters, model state or constants where steps expect them."""
        return tree

    def place_state(self, state: Any) -> Any:
        """Puts a state where steps expect it."""
        return state

    def place_batch(self, batch: Any, lead: int = 0) -> Any:
        """Puts a batch where steps expect it; its first axis is number `lead`."""
        del lead
        return batch

    def first(
        self, init: Callable[..., Any], params: Any, model_state: Any, key: Any
    ) -> Any:
        """Returns the first state; it shares no buffer with what it is made from."""
        return jax.tree.map(copied, init(params, model_state, key))

    def compile(
        self,
        local: Callable[..., Any],
        lead: int = 0,
        donates: bool = True,
        part: Callable[[Any], Any] = lambda state: state,
        name: Any = None,
    ) -> Any:
        """Returns `local` as a jitted step that may donate its state.

        Args:
          local: `local(state, batch, constants)`, to a tuple.
          lead: Number of the batch's first axis.
          donates: Whether it may donate.
          part: What part of a state the first output is.
          name: What processes call it where they compare what they run.
        """
        del lead, part, name
        return jax.jit(local, donate_argnums=self._donated(donates))

    def _donated(self, donates: bool) -> tuple[int, ...]:
        return (0,) if donates and self._donate else ()

    def on_shares(self, fn: Callable[..., Any], cut: Any, whole: Any) -> Any:
        """Returns `fn(cut, whole)`, on each device's share of `cut`."""
        return fn(cut, whole)

    def average(self, model_state: Any, metrics: Any) -> tuple[Any, Any]:
        """Averages float leaves over a mapped axis; sums integer metrics."""
        axis = self.axis_name
        if axis is None:
            return model_state, metrics
        add = lambda x: jax.lax.psum(x, axis)
        return (
            jax.tree.map(lambda x: _mean_or(x, axis, lambda x: x), model_state),
            jax.tree.map(lambda x: _mean_or(x, axis, add), metrics),
        )

    def index(self) -> Any:
        """Returns the number of this device, inside a step over a mapped axis."""
        return 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name)

    def local_key(self, key: jax.Array) -> jax.Array:
        """Returns the key that the loss draws from; over a mapped axis its own."""
        if self.axis_name is None:
            return key
        return jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))

    def refuse_remainder(self, shape: tuple[int, ...], lead: int) -> None:
        """Raises where a batch does not divide by the devices."""
        if shape[lead] % self.count:
            remedy = "Pad the batch, drop its remainder, or use fewer devices."
            expected = f"divisible by the {self.count} devices in axis {lead}"
            raise _checks.value_error(self._who, "batch", expected, str(shape), remedy)


class LocalDevices(OneDevice):
    """Data parallelism over the local devices by `jax.pmap`: each runs its share."""

    axis_name = _PMAP_AXIS

    def __init__(self, who: str, donate: bool) -> None:
        """Counts the devices."""
        super().__init__(who, donate)
        self.count = jax.local_device_count()
        if jax.process_count() > 1:
            remedy = "Pass a jax.sharding.Mesh over jax.devices()."
            got = f"'pmap' in one of {jax.process_count()} processes"
            raise _checks.value_error(who, "parallel", "a mesh", got, remedy)

    def seen(self, batch: Any) -> Any:
        """Returns the shapes of one device's share."""
        return self._shares(batch, 0)

    def _shares(self, batch: Any, lead: int) -> Any:
        shapes = jax.tree.map(_shape_of, batch)
        if any(len(x.shape) > lead for x in jax.tree.leaves(shapes)):
            batch_size(self._who, jax.tree.map(lambda x: _without(x, lead), shapes))
        return jax.tree.map(lambda x: self._share(x, lead), shapes)

    def _share(self, x: Any, lead: int) -> jax.ShapeDtypeStruct:
        if len(x.shape) <= lead:
            return x
        self.refuse_remainder(x.shape, lead)
        shape = (*x.shape[:lead], x.shape[lead] // self.count, *x.shape[lead + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def place_batch(self, batch: Any, lead: int = 0) -> Any:
        """Gives every array an axis of devices; raises where it does not divide."""
        split = lambda x, one: (
            x.reshape(*x.shape[:lead], self.count, *one.shape[lead:])
            if np.ndim(x) > lead
            else x
        )
        return jax.tree.map(split, batch, self._shares(batch, lead))

    def compile(
        self,
        local: Callable[..., Any],
        lead: int = 0,
        donates: bool = True,
        part: Callable[[Any], Any] = lambda state: state,
        name: Any = None,
    ) -> Any:
        """Returns `local` under `jax.pmap`."""
        del part, name
        return _Pmapped(local, lead, self._donated(donates))


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
                in_axes=(None, jax.tree.unflatten(treedef, axes), None),
                out_axes=None,
                donate_argnums=self._donated,
            )
        return self._steps[treedef, axes]

    def __call__(self, state: Any, batch: Any, constants: Any) -> Any:
        return self._step(batch)(state, batch, constants)

    def lower(self, state: Any, batch: Any, constants: Any) -> Any:
        return self._step(batch).lower(state, batch, constants)


def copied(x: Any) -> jax.Array:
    """Returns an array with a buffer and a dtype of its own: a weak one traces again."""
    if not isinstance(x, jax.Array):
        return jnp.array(x)
    return jnp.array(x, x.dtype) if getattr(x, "weak_type", False) else x.copy()


def _mean_or(x: Any, axis: Any, otherwise: Callable[[Any], Any]) -> Any:
    x = jnp.asarray(x)
    is_float = jnp.issubdtype(x.dtype, jnp.inexact)
    return jax.lax.pmean(x, axis) if is_float else otherwise(x)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    x = x if hasattr(x, "dtype") else np.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _without(x: jax.ShapeDtypeStruct, lead: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[lead:], x.dtype)
