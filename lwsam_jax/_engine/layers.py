"""The layers of a parameter tree: their names, depths and norms."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks, _tree
from .depth import Place, places, ranks
from .rules import labels, Rule, stacked, stated_axes, weights
from .stacks import Stack
from .trace import AxisEnv, trace, Traced


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a parameter tree: a static, hashable description, no arrays.

    Make one with `Layers.of`. Names, norms and masks are in pytree order, always.

    Attributes:
      names: One name for each layer, in pytree order.
      depth: One rank for each layer; 0 is nearest the input, no two are equal.
      leaf_layer: For each leaf of the tree the index of its layer, or -1; of a stack
        that of its first, the others follow.
      treedef: Structure of the parameter tree.
      stacks: For each leaf how it is a stack of layers, or None.
    """

    names: tuple[str, ...]
    depth: tuple[int, ...]
    leaf_layer: tuple[int, ...] = dataclasses.field(repr=False)
    treedef: Any = dataclasses.field(repr=False)
    stacks: tuple[Stack | None, ...] = dataclasses.field(repr=False)

    @staticmethod
    def of(
        params: Any,
        rule: Rule | None = None,
        loss_fn: Callable[..., Any] | None = None,
        *args: Any,
        constants: tuple[Any, ...] = (),
        axis_env: AxisEnv = None,
        allow_masked: bool = False,
    ) -> Layers:
        """Finds the layers of a parameter tree.

        The depth of a layer is the position, in the traced loss, of the first equation
        that takes both a value depending on the layer and a value depending on a
        non-parameter input; tied weights count at their earliest, layers that never
        meet data come first. Without a loss it is the natural order of the names
        ("Block_2" before "Block_10"), of stacks from index to index.

        A leaf that the loss scans (`jax.lax.scan`, `nn.scan`, `nnx.scan`), itself or a
        cast of it, is a stack: each index is a layer, `blocks/query/3`, which the scan
        meets index by index. Without a loss only the rule `stacked` says so, and where
        it is given it alone decides.

        Args:
          params: Parameter tree of arrays or `jax.ShapeDtypeStruct`s.
          rule: `weights` (the default), `modules`, `leaves`, `blocks(pattern)`,
            `stacked(pattern)`, or any `(key_path, leaf) -> name | None`; leaves with one
            name are one layer. Of a stack it sees a slice.
          loss_fn: `loss_fn(params, *args, *constants)`; traced, never run.
          *args: Arguments of the loss; arrays may be `jax.ShapeDtypeStruct`s.
          constants: Trees that the loss takes behind them, such as those of a
            `TrainStep`; they are no data, but for a layer that meets nothing else.
          axis_env: Names and sizes of mapped axes that the loss uses, as
            `jax.make_jaxpr` takes them.
          allow_masked: Whether the tree may lack leaves that `optax.masked` and its kin
            took out.

        Returns:
          The layers.

        Raises:
          ValueError: If there is no layer (or no block), if `weights` or `leaves` give
            one name to two leaves, or if another transformation masked out leaves.
          TypeError: If the rule is not callable or returns no string, or if a leaf is no
            array, such as a function inside a model.

        Examples:
          >>> import jax.numpy as jnp
          >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
          >>> Layers.of(params).names
          ('Dense_0',)
        """
        refuse_unsorted("Layers.of", "params", params)
        if not allow_masked:
            _refuse_masked("Layers.of", params)
        traced = None
        if loss_fn is not None:
            refuse_non_arrays(params)
            traced = trace(loss_fn, params, args, axis_env, constants)
        return Layers.of_traced(params, rule, traced)

    @staticmethod
    def of_traced(params: Any, rule: Rule | None, traced: Traced | None) -> Layers:
        """Finds the layers of a parameter tree, with the trace of its loss if any."""
        rule = weights if rule is None else rule
        remedy = (
            "Pass lwsam.weights, modules, leaves, blocks(pattern), stacked(pattern), or "
            "a function."
        )
        _checks.is_callable("Layers.of", "rule", rule, remedy)
        refuse_non_arrays(params)
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        met = [Place()] * len(paths) if traced is None else places(traced)
        axes = stated_axes(rule, paths)
        if axes is None:
            axes = [place.axis for place in met]
        found = labels(rule, paths, axes)
        names, leaf_layer, stacks = _named(found, paths, axes)
        if not names:
            raise ValueError(_nothing_found(rule, paths))
        stems = [rule.stem(p) if isinstance(rule, stacked) else "" for p, _ in paths]
        depth = ranks(names, leaf_layer, stacks, met, stems)
        return Layers(names, depth, leaf_layer, treedef, stacks)

    def __len__(self) -> int:
        """Returns the number of layers, L."""
        return len(self.names)

    @property
    def member_leaves(self) -> tuple[int, ...]:
        """The places of the leaves that belong to a layer."""
        return tuple(i for i, layer in enumerate(self.leaf_layer) if layer >= 0)

    def of_leaf(self, place: int) -> range:
        """Returns the layers that a leaf belongs to: several for a stack."""
        first, stack = self.leaf_layer[place], self.stacks[place]
        return range(first, first + (1 if stack is None else stack.length))

    def norms(self, grads: Any) -> jax.Array:
        """Returns the L2 norm of each layer's gradient.

        Args:
          grads: Tree of the structure of the parameters.

        Returns:
          f32[L] in pytree order (float64 if a layer has float64 leaves), each the root
          of the sum of squares over the layer's leaves.

        Raises:
          ValueError: If the structure is not that of the parameters.
        """
        flat = self.flatten("Layers.norms", "grads", grads)
        dtype = _tree.accumulation_dtype(*(flat[i] for i in self.member_leaves))
        norms = [self.norm(flat, places, dtype) for places in self.groups]
        if all(x.ndim == 0 for x in norms):
            return jnp.stack(norms)
        return jnp.concatenate([jnp.ravel(x) for x in norms])

    @property
    def groups(self) -> list[list[int]]:
        """The places of the leaves that share a layer, or a stack of layers, in order."""
        found: dict[int, list[int]] = {}
        for i in self.member_leaves:
            found.setdefault(self.leaf_layer[i], []).append(i)
        return [found[first] for first in sorted(found)]

    def norm(
        self, flat: Sequence[Any], places: Sequence[int], dtype: Any = None
    ) -> jax.Array:
        """Returns the norm over the leaves of a group; of a stack one for each index."""
        stacks = [self.stacks[i] for i in places]
        keep = [stack.axis for stack in stacks if stack is not None]  # all or none are
        return _tree.norm([flat[i] for i in places], dtype, keep or None)

    def at_leaf(self, values: Any, place: int) -> Any:
        """Returns what a leaf has of one value for each layer, to broadcast to it.

        A scalar; for a stack one value for each index, on its axis.

        Args:
          values: An array [L].
          place: The place of a leaf that belongs to a layer.
        """
        own, stack = self.of_leaf(place), self.stacks[place]
        if stack is None:
            return values[own.start]
        return stack.spread(values[own.start : own.stop])

    def spread(self, x: Any, place: int) -> Any:
        """Returns the norm of a leaf's group, or what has its shape, to broadcast."""
        stack = self.stacks[place]
        return x if stack is None else stack.spread(x)

    def selected(self, mask: Any) -> tuple[str, ...]:
        """Returns the names of the layers where the mask is true.

        Args:
          mask: bool[L] in pytree order; concrete.

        Returns:
          The names, in pytree order.

        Raises:
          ValueError: If the mask has not one entry for each layer.
        """
        mask = np.asarray(mask)
        if mask.shape != (len(self),):
            expected = f"bool[{len(self)}], one entry for each layer"
            remedy = "Pass the mask of the same parameter tree."
            raise _checks.value_error(
                "Layers.selected", "mask", expected, f"shape {mask.shape}", remedy
            )
        return tuple(n for n, chosen in zip(self.names, mask, strict=True) if chosen)

    def flatten(self, who: str, argument: str, tree: Any) -> list[Any]:
        """Returns the leaves of a tree; raises unless it is structured as the params."""
        flat, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            _refuse_masked(who, tree)
            remedy = "Pass a tree of the structure that the layers were made from."
            raise _checks.value_error(
                who, argument, f"structured as {self.treedef}", str(treedef), remedy
            )
        return flat

    def indices(self, who: str, names: Sequence[str]) -> tuple[int, ...]:
        """Returns where the names stand, sorted; raises on a name that is not there."""
        places = {name: i for i, name in enumerate(self.names)}
        unknown = [name for name in names if name not in places]
        if unknown:
            remedy = f"The layers are: {', '.join(self.names)}."
            raise _checks.value_error(
                who, "selection", "names of layers", unknown, remedy
            )
        return tuple(sorted({places[name] for name in names}))

    def from_depth(self, cut: int) -> tuple[str, ...]:
        """Returns the names of all layers of depth >= cut, in pytree order."""
        pairs = zip(self.names, self.depth, strict=True)
        return tuple(name for name, depth in pairs if depth >= cut)


def _named(
    found: Sequence[str | None],
    paths: Sequence[tuple[Any, Any]],
    axes: Sequence[int | None],
) -> tuple[tuple[str, ...], tuple[int, ...], tuple[Stack | None, ...]]:
    """Returns the names of the layers, and for each leaf its first layer and its stack.

    Raises:
      ValueError: If two stacks of one name differ in length, or an index of one has the
        name of another layer.
    """
    first: dict[tuple[str, int | None], int] = {}
    names: dict[str, None] = {}
    leaf_layer: list[int] = []
    stacks: list[Stack | None] = []
    for label, (_, leaf), axis in zip(found, paths, axes, strict=True):
        if label is None or (axis is not None and leaf.shape[axis] == 0):
            leaf_layer.append(-1)
            stacks.append(None)
            continue
        stack = None
        if axis is not None:
            stack = Stack(axis, leaf.shape[axis], len(leaf.shape))
        key = (label, stack and stack.length)
        if key not in first:
            first[key] = len(names)
            indices = range(stack.length) if stack else ()
            own = [f"{label}/{i}" for i in indices] if stack else [label]
            twice = [name for name in own if name in names]
            if twice:
                remedy = "Pass a rule that tells them apart."
                expected = "a tree whose layers differ in name"
                got = (
                    f"two layers named {twice[0]!r}, of stacks or of a stack and a leaf"
                )
                raise _checks.value_error("Layers.of", "params", expected, got, remedy)
            names.update(dict.fromkeys(own))
        leaf_layer.append(first[key])
        stacks.append(stack)
    return tuple(names), tuple(leaf_layer), tuple(stacks)


_FILTER = "Equinox models are passed as eqx.filter(model, eqx.is_inexact_array)."


def refuse_unsorted(who: str, argument: str, tree: Any) -> None:
    """Raises on dictionaries whose keys JAX cannot bring into an order."""
    try:
        jax.tree.structure(tree)
    except ValueError as error:
        remedy = "Name all entries of one dictionary by keys of one kind."
        expected = "a tree whose dictionaries can be sorted by their keys"
        got = f"one that cannot ({error.__cause__ or error})"
        raise _checks.value_error(who, argument, expected, got, remedy) from error


def refuse_non_arrays(params: Any) -> None:
    """Raises on functions and other things that models keep among their arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        if not is_array and not isinstance(leaf, numbers.Number):
            got = f"{leaf!r} at {jax.tree_util.keystr(path)}"
            remedy = f"Take it out, to give it back inside the loss. {_FILTER}"
            raise _checks.type_error(
                "Layers.of", "params", "a tree of arrays", got, remedy
            )


def _nothing_found(rule: Rule, paths: Sequence[Any]) -> str:
    name = getattr(rule, "__name__", repr(rule))
    seen = ", ".join(
        f"{jax.tree_util.keystr(path)}: {getattr(leaf, 'dtype', type(leaf).__name__)}"
        f"{list(getattr(leaf, 'shape', ()))}"
        for path, leaf in paths[:8]
    )
    got = (
        f"a tree of {len(paths)} leaves in which the rule `{name}` names none ({seen})"
    )
    remedy = (
        "Pass rule=lwsam.leaves for trees without matrices, or a rule of your own; "
        + _FILTER
    )
    return _checks.message("Layers.of", "params", "a tree with layers", got, remedy)


def _refuse_masked(who: str, tree: Any) -> None:
    """Raises on the placeholders that optax.masked and its kin put in place of leaves."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: type(x).__name__ == "MaskedNode")
    if any(type(x).__name__ == "MaskedNode" for x in nodes):
        remedy = (
            "The perturbed loss needs every parameter: take layerwise_sam out of "
            "optax.masked, multi_transform or partition and choose layers with rule=."
        )
        raise _checks.value_error(
            who, "params", "the whole parameter tree", "MaskedNode", remedy
        )
