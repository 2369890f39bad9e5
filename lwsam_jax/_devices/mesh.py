"""How a step is spread over a mesh: by jit, with the shardings that it is given.

The loss is that of the global batch, so that means, weights and statistics are right by
construction; what moves between devices is the compiler's.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import _checks
from .._axes.ascent import batch_size
from . import hosts, layout as _layout
from .local import copied, OneDevice


class OnMesh(OneDevice):
    """A step under `jax.jit` on the devices of a mesh, for the global batch."""

    def __init__(self, who: str, mesh: Mesh, batch_axes: Any, donate: bool) -> None:
        """Refuses axes that the mesh does not have."""
        super().__init__(who, donate)
        if isinstance(batch_axes, str):
            batch_axes = (batch_axes,)
        axes = mesh.axis_names if batch_axes is None else tuple(batch_axes)
        if not set(axes) <= set(mesh.axis_names) or len(set(axes)) < len(axes):
            remedy = "Pass the names over which the batch is cut, such as ('data',)."
            expected = f"among the axes of the mesh, {mesh.axis_names}"
            raise _checks.value_error(who, "batch_axes", expected, repr(axes), remedy)
        self.mesh, self.axes = mesh, axes
        self.count = math.prod(mesh.shape[axis] for axis in axes)
        self._shares = hosts.shares(mesh, axes)
        self.is_of_many = hosts.are_spanned(mesh)
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        # Of the states that were seen, by structure: steps leave them as they are.
        self._layouts: dict[Any, Any] = {}

    def context(self) -> Any:
        """Returns the context in which a loss may name the axes of the mesh."""
        if hasattr(jax, "set_mesh"):
            return jax.set_mesh(self.mesh)
        before_0_8: Any = jax.sharding
        return before_0_8.use_mesh(self.mesh)

    def seen(self, batch: Any) -> Any:
        """Returns the shapes of the global batch."""
        usual = self.examples(batch, 0)

        def seen(x):
            sharding = self._sharding_of(x, usual, 0)
            is_whole = sharding is self.everywhere
            shape = x.shape if is_whole else self._global_shape(x, 0)
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        return jax.tree.map(lambda x: seen(_array(x)), batch)

    def share(self, batch: Any) -> Any:
        """Returns the shapes of one device's share; raises on what is no batch."""
        seen = OnMesh.seen(self, batch)
        if any(x.shape for x in jax.tree.leaves(seen)):
            batch_size(self._who, seen)
        cut = lambda shape: (shape[0] // self.count, *shape[1:]) if shape else shape
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(cut(x.shape), x.dtype), seen)

    def examples(self, batch: Any, lead: int) -> int | None:
        """Returns the first axis that most arrays share, the largest of several."""
        shapes = [self._global_shape(_array(x), lead) for x in jax.tree.leaves(batch)]
        counts = collections.Counter(s[lead] for s in shapes if len(s) > lead)
        return max(counts, key=lambda n: (counts[n], n), default=None)

    def _global_shape(self, x: Any, lead: int) -> tuple[int, ...]:
        """Returns the shape over all processes, of which each has its own share."""
        if self._shares == 1 or len(x.shape) <= lead or not hosts.is_local(x):
            return x.shape
        whole = x.shape[lead] * self._shares
        return (*x.shape[:lead], whole, *x.shape[lead + 1 :])

    def _sharding_of(self, x: Any, usual: int | None, lead: int) -> NamedSharding:
        """Returns where an array of a batch belongs: cut, if it is one of the batch."""
        if _layout.is_cut(x, self.mesh):
            return x.sharding
        shape = self._global_shape(x, lead)
        if len(shape) <= lead or shape[lead] != usual:
            return self.everywhere
        self.refuse_remainder(shape, lead)
        return NamedSharding(self.mesh, PartitionSpec(*[None] * lead, self.axes))

    def place_batch(self, batch: Any, lead: int = 0) -> Any:
        """Cuts a batch over its axes; what is no batch goes to every device."""
        usual = self.examples(batch, lead)

        def place(x):
            sharding = self._sharding_of(x, usual, lead)
            if sharding is self.everywhere or self._shares == 1:
                return put(x, sharding)
            return hosts.from_share(x, sharding) if hosts.is_local(x) else x

        return jax.tree.map(lambda x: place(_array(x)), batch)

    def place(self, tree: Any) -> Any:
        """Keeps the shardings on the mesh; what is on one device goes to every one."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: put(x, _layout.given(self._who, path, x, self.mesh)), tree
        )

    def first(
        self, init: Callable[..., Any], params: Any, model_state: Any, key: Any
    ) -> Any:
        """Returns the first state, made where it belongs."""
        make = lambda *args: jax.tree.map(copied, init(*args))
        args = (params, model_state, put(key, self.everywhere))
        with self.context():
            shapes = jax.eval_shape(make, *args)
            params, model_state = _shardings(params), _shardings(model_state)
            layout = _layout.of_state(shapes, params, model_state, self.mesh)
            self._layouts = {jax.tree.structure(shapes): layout}
            return jax.jit(make, out_shardings=layout)(*args)

    def layout(self, state: Any) -> Any:
        """Returns the sharding of each leaf: that of states of the same structure."""
        treedef = jax.tree.structure(state)
        if treedef not in self._layouts:
            given = jax.tree_util.tree_map_with_path(
                lambda path, x: _layout.given(self._who, path, x, self.mesh), state
            )
            self._layouts[treedef] = _layout.of_state(
                state, given.params, given.model_state, self.mesh
            )
        return self._layouts[treedef]

    def place_state(self, state: Any) -> Any:
        """Puts a state where those of its structure lie."""
        return jax.tree.map(put, state, self.layout(state))

    def compile(
        self,
        local: Callable[..., Any],
        lead: int = 0,
        donates: bool = True,
        part: Callable[[Any], Any] = lambda state: state,
        name: Any = None,
    ) -> Any:
        """Returns `local` under jit; what it returns beside a state is everywhere."""
        del lead
        donated = self._donated(donates)
        return _OnMesh(self._who, name, self, local, donated, part)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Where one process raises inside, all do."""
        try:
            yield
        except Exception as error:
            if self.is_of_many:
                hosts.disagree(self._who, error)
            raise

    def refuse_others(self, **trees: Any) -> None:
        """Raises where processes have arrays of their own that are not the same."""
        if self.is_of_many:
            said = {name: hosts.values(tree) for name, tree in trees.items()}
            hosts.agree(self._who, said)

    def on_shares(self, fn: Callable[..., Any], cut: Any, whole: Any) -> Any:
        """Returns `fn(cut, whole)` of each device's share, so that no example moves."""
        batch_size(self._who, cut)  # every array is cut
        if not self.axes:
            return fn(cut, whole)
        axes = PartitionSpec(self.axes)
        specs = lambda tree: jax.tree.map(
            lambda x: axes if jnp.ndim(x) else PartitionSpec(), tree
        )
        shapes = jax.eval_shape(lambda x: x, cut)
        outputs = jax.eval_shape(fn, self.share(shapes), whole)
        return jax.shard_map(
            fn,
            mesh=self.mesh,
            in_specs=(specs(cut), PartitionSpec()),
            out_specs=specs(outputs),
            axis_names=set(self.axes),
            check_vma=False,
        )(cut, whole)


class _OnMesh:
    """A step on a mesh; the layout of a state is known only when it comes."""

    def __init__(
        self,
        who: str,
        name: Any,
        devices: OnMesh,
        local: Callable[..., Any],
        donated: tuple[int, ...],
        part: Callable[[Any], Any],
    ) -> None:
        self._devices, self._donated, self._part = devices, donated, part
        self._who, self._name = who, name
        self._steps: dict[Any, Any] = {}

        def run(state, batch, constants):
            first, *others = local(state, batch, constants)
            return first, others

        self._run = run

    def _step(self, state: Any) -> Any:
        treedef = jax.tree.structure(state)
        if treedef not in self._steps:
            layout = self._part(self._devices.layout(state))
            self._steps[treedef] = jax.jit(
                self._run,
                out_shardings=(layout, self._devices.everywhere),
                donate_argnums=self._donated,
            )
        return self._steps[treedef]

    def __call__(self, state: Any, batch: Any, constants: Any) -> Any:
        if self._devices.is_of_many:
            kinds = {"batch": batch, "constants": constants, "state": state}
            said = {name: _kinds(tree) for name, tree in kinds.items()}
            hosts.agree(self._who, {"selection": str(self._name), **said})
        with self._devices.context():
            first, others = self._step(state)(state, batch, constants)
        return first, *others

    def lower(self, state: Any, batch: Any, constants: Any) -> Any:
        with self._devices.context():
            return self._step(state).lower(state, batch, constants)


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """Returns an array where it belongs, itself if it is there."""
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    if hosts.are_many() and hosts.is_local(x):
        return hosts.from_copy(x, sharding)
    return jax.device_put(x, sharding)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def _array(x: Any) -> Any:
    return x if hasattr(x, "dtype") else np.asarray(x)


def _kinds(tree: Any) -> str:
    """Returns path, dtype, shape and place of every leaf, as text."""
    where = lambda x: x.sharding.spec if hasattr(x, "sharding") else "the host"
    return ", ".join(
        f"{jax.tree_util.keystr(path)}: {x.dtype}{list(x.shape)} on {where(x)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    )
