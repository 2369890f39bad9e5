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
from .depth import first_meetings
from .rules import labels, leaves, natural_order, Rule, weights
from .trace import AxisEnv


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a parameter tree: a static, hashable description, no arrays.

    Make one with `Layers.of`. Names, norms and masks are in pytree order, always.

    Attributes:
      names: One name for each layer, in pytree order.
      depth: One rank for each layer; 0 is nearest the input, no two are equal.
      leaf_layer: For each leaf of the tree the index of its layer, or -1.
      treedef: Structure of the parameter tree.
    """

    names: tuple[str, ...]
    depth: tuple[int, ...]
    leaf_layer: tuple[int, ...] = dataclasses.field(repr=False)
    treedef: Any = dataclasses.field(repr=False)

    @staticmethod
    def of(
        params: Any,
        rule: Rule | None = None,
        loss_fn: Callable[..., Any] | None = None,
        *args: Any,
        axis_env: AxisEnv = None,
        allow_masked: bool = False,
    ) -> Layers:
        """Finds the layers of a parameter tree.

        The depth of a layer is the position, in the traced loss, of the first equation
        that takes both a value depending on the layer and a value depending on a
        non-parameter input; tied weights count at their earliest, layers that never
        meet data come first. Without a loss it is the natural order of the names
        ("Block_2" before "Block_10").

        Args:
          params: Parameter tree of arrays or `jax.ShapeDtypeStruct`s.
          rule: `weights` (the default), `modules`, `leaves`, `blocks(pattern)`, or any
            `(key_path, leaf) -> name | None`; leaves with one name are one layer.
          loss_fn: `loss_fn(params, *args)`; traced, never run.
          *args: Arguments of the loss; arrays may be `jax.ShapeDtypeStruct`s.
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
        rule = weights if rule is None else rule
        remedy = "Pass lwsam.weights, modules, leaves, blocks(pattern), or a function."
        _checks.is_callable("Layers.of", "rule", rule, remedy)
        refuse_unsorted("Layers.of", "params", params)
        if not allow_masked:
            _refuse_masked("Layers.of", params)
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        _refuse_non_arrays(paths)
        found = labels(rule, paths)
        names = tuple(dict.fromkeys(name for name in found if name is not None))
        if not names:
            raise ValueError(_nothing_found(rule, paths))
        if rule in (weights, leaves):
            _refuse_shared_names(found, paths)
        index = {name: i for i, name in enumerate(names)}
        leaf_layer = tuple(-1 if a is None else index[a] for a in found)
        first: dict[int, int] = {}
        if loss_fn is not None:
            meetings = first_meetings(params, loss_fn, args, axis_env)
            for at, met in zip(leaf_layer, meetings, strict=True):
                if met >= 0:
                    first[at] = min(first.get(at, met), met)
        keys = [(first.get(i, -1), natural_order(n), i) for i, n in enumerate(names)]
        by_depth = sorted(range(len(names)), key=keys.__getitem__)
        depth = tuple(int(r) for r in np.argsort(by_depth))
        return Layers(names, depth, leaf_layer, treedef)

    def __len__(self) -> int:
        """Returns the number of layers, L."""
        return len(self.names)

    @property
    def member_leaves(self) -> tuple[int, ...]:
        """The places of the leaves that belong to a layer."""
        return tuple(i for i, layer in enumerate(self.leaf_layer) if layer >= 0)

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
        grouped = [
            [g for g, at in zip(flat, self.leaf_layer, strict=True) if at == i]
            for i in range(len(self))
        ]
        dtype = _tree.accumulation_dtype(*(g for group in grouped for g in group))
        return jnp.stack([_tree.norm(group, dtype) for group in grouped])

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
        unknown = [name for name in names if name not in self.names]
        if unknown:
            remedy = f"The layers are: {', '.join(self.names)}."
            raise _checks.value_error(
                who, "selection", "names of layers", unknown, remedy
            )
        return tuple(sorted({self.names.index(name) for name in names}))

    def from_depth(self, cut: int) -> tuple[str, ...]:
        """Returns the names of all layers of depth >= cut, in pytree order."""
        pairs = zip(self.names, self.depth, strict=True)
        return tuple(name for name, depth in pairs if depth >= cut)


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


def _refuse_non_arrays(paths: Sequence[tuple[Any, Any]]) -> None:
    """Raises on functions and other things that models keep among their arrays."""
    for path, leaf in paths:
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


def _refuse_shared_names(labels: Sequence[str | None], paths: Sequence[Any]) -> None:
    seen: dict[str, str] = {}
    for label, (path, _) in zip(labels, paths, strict=True):
        where = jax.tree_util.keystr(path)
        if label is not None and seen.setdefault(label, where) != where:
            got = f"{seen[label]} and {where}, which are both named {label!r}"
            remedy = "Rename one of them, or pass a rule that tells them apart."
            raise _checks.value_error(
                "Layers.of", "params", "a tree whose layers differ in name", got, remedy
            )


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
