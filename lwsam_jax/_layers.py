"""What a layer is: rules that name leaves, and the names, depths and norms of layers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks, _jaxpr, _tree


Rule = Callable[[tuple[Any, ...], Any], "str | None"]

_NOT_WEIGHTS = frozenset({"bias", "b", "scale", "offset", "gamma", "beta"})


def _key_name(key: Any) -> str:
    """Returns one entry of a key path as text, whatever its kind."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _names_of(path: Sequence[Any]) -> list[str]:
    """Returns the path as names, without the `.value` that NNX adds at its end.

    That one is an attribute; a dictionary may have a key "value" (of an attention).
    """
    names = [_key_name(key) for key in path]
    is_attribute = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey)
    return names[:-1] if is_attribute and names[-1] == "value" else names


def _join(names: Sequence[str]) -> str:
    return "/".join(names) or "params"


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def leaves(path: tuple[Any, ...], leaf: Any) -> str | None:
    """Rule: every float leaf is a layer of its own.

    Args:
      path: Key path of the leaf, as `jax.tree_util.tree_flatten_with_path` gives it.
      leaf: The leaf; anything with a dtype.

    Returns:
      The path joined by "/", with a trailing `.value` and `/kernel` dropped, or None if
      the leaf is not of a float (or complex) dtype.
    """
    if not _is_float(leaf):
        return None
    names = _names_of(path)
    return _join(names[:-1] if len(names) > 1 and names[-1] == "kernel" else names)


def weights(path: tuple[Any, ...], leaf: Any) -> str | None:
    """Rule (the default): every weight matrix or convolution kernel is a layer.

    A leaf is a layer if its rank is >= 2 and the last key of its path is not one of
    bias, b, scale, offset, gamma, beta (Flax attention biases have rank 2).

    Args:
      path: Key path of the leaf, as `jax.tree_util.tree_flatten_with_path` gives it.
      leaf: The leaf; anything with a dtype and a shape.

    Returns:
      The name, as in `leaves`, or None.
    """
    if not _is_float(leaf) or len(leaf.shape) < 2:
        return None
    names = _names_of(path)
    return None if names and names[-1] in _NOT_WEIGHTS else leaves(path, leaf)


def modules(path: tuple[Any, ...], leaf: Any) -> str | None:
    """Rule: all float leaves of one module (kernel and bias) together are a layer.

    `Layers.of` keeps the modules that own at least one leaf that `weights` names, so a
    normalization layer alone is no layer.

    Args:
      path: Key path of the leaf, as `jax.tree_util.tree_flatten_with_path` gives it.
      leaf: The leaf; anything with a dtype.

    Returns:
      The path of the module joined by "/", or None.
    """
    return _join(_names_of(path)[:-1]) if _is_float(leaf) else None


def _natural_order(name: str) -> tuple[Any, ...]:
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts)


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
        axis_env: _jaxpr.AxisEnv = None,
    ) -> Layers:
        """Finds the layers of a parameter tree.

        The depth of a layer is the position, in the traced loss, of the first equation
        that takes both a value depending on the layer and a value depending on a
        non-parameter input; tied weights count at their earliest, layers that never
        meet data come first. Without a loss it is the natural order of the names
        ("Block_2" before "Block_10").

        Args:
          params: Parameter tree of arrays or `jax.ShapeDtypeStruct`s.
          rule: `weights` (the default), `modules`, `leaves`, or any
            `(key_path, leaf) -> name | None`; leaves with one name are one layer.
          loss_fn: `loss_fn(params, *args)`; traced, never run.
          *args: Arguments of the loss; arrays may be `jax.ShapeDtypeStruct`s.
          axis_env: Names and sizes of mapped axes that the loss uses, as
            `jax.make_jaxpr` takes them.

        Returns:
          The layers.

        Raises:
          ValueError: If there is no layer, if `weights` or `leaves` give one name to two
            leaves, or if the tree has leaves that another transformation masked out.
          TypeError: If the rule is not callable or returns no string.

        Examples:
          >>> import jax.numpy as jnp
          >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
          >>> Layers.of(params).names
          ('Dense_0',)
        """
        rule = weights if rule is None else rule
        remedy = "Pass lwsam.weights, lwsam.modules, lwsam.leaves, or a function."
        _checks.is_callable("Layers.of", "rule", rule, remedy)
        _refuse_masked("Layers.of", params)
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        labels = [_label(rule, path, leaf) for path, leaf in paths]
        if rule is modules:
            owners = {
                a for a, (p, x) in zip(labels, paths, strict=True) if weights(p, x)
            }
            labels = [label if label in owners else None for label in labels]
        names = tuple(dict.fromkeys(label for label in labels if label is not None))
        if not names:
            raise ValueError(_nothing_found(rule, paths))
        if rule in (weights, leaves):
            _refuse_shared_names(labels, paths)
        index = {name: i for i, name in enumerate(names)}
        leaf_layer = tuple(-1 if a is None else index[a] for a in labels)
        order = [_natural_order(name) for name in names]
        if loss_fn is not None:
            meets = _first_meetings(params, loss_fn, args, axis_env)
            first: dict[int, int] = {}
            for at, m in zip(leaf_layer, meets, strict=True):
                if m >= 0:
                    first[at] = min(first.get(at, m), m)
            keys = [(first.get(i, -1), o, i) for i, o in enumerate(order)]
        else:
            keys = [(0, o, i) for i, o in enumerate(order)]
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
            raise ValueError(
                _checks.message(
                    "Layers.selected", "mask", expected, f"shape {mask.shape}", remedy
                )
            )
        return tuple(n for n, chosen in zip(self.names, mask, strict=True) if chosen)

    def flatten(self, who: str, argument: str, tree: Any) -> list[Any]:
        """Returns the leaves of a tree; raises unless it is structured as the params."""
        flat, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            _refuse_masked(who, tree)
            remedy = "Pass a tree of the structure that the layers were made from."
            raise ValueError(
                _checks.message(
                    who, argument, f"structured as {self.treedef}", str(treedef), remedy
                )
            )
        return flat

    def indices(self, who: str, names: Sequence[str]) -> tuple[int, ...]:
        """Returns where the names stand, sorted; raises on a name that is not there."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            remedy = f"The layers are: {', '.join(self.names)}."
            raise ValueError(
                _checks.message(who, "selection", "names of layers", unknown, remedy)
            )
        return tuple(sorted({self.names.index(name) for name in names}))

    def from_depth(self, cut: int) -> tuple[str, ...]:
        """Returns the names of all layers of depth >= cut, in pytree order."""
        pairs = zip(self.names, self.depth, strict=True)
        return tuple(name for name, depth in pairs if depth >= cut)


def _label(rule: Rule, path: tuple[Any, ...], leaf: Any) -> str | None:
    name = rule(path, leaf)
    if name is not None and not isinstance(name, str):
        remedy = "Return the layer's name, or None for a leaf that is never perturbed."
        raise TypeError(
            _checks.message(
                "Layers.of", "rule", "a function to str or None", name, remedy
            )
        )
    return name


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
        "Equinox models are passed as eqx.filter(model, eqx.is_inexact_array)."
    )
    return _checks.message("Layers.of", "params", "a tree with layers", got, remedy)


def _refuse_shared_names(labels: Sequence[str | None], paths: Sequence[Any]) -> None:
    seen: dict[str, str] = {}
    for label, (path, _) in zip(labels, paths, strict=True):
        where = jax.tree_util.keystr(path)
        if label is not None and seen.setdefault(label, where) != where:
            got = f"{seen[label]} and {where}, which are both named {label!r}"
            remedy = "Rename one of them, or pass a rule that tells them apart."
            raise ValueError(
                _checks.message(
                    "Layers.of",
                    "params",
                    "a tree whose layers differ in name",
                    got,
                    remedy,
                )
            )


def _refuse_masked(who: str, tree: Any) -> None:
    """Raises on the placeholders that optax.masked and its kin put in place of leaves."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: type(x).__name__ == "MaskedNode")
    if any(type(x).__name__ == "MaskedNode" for x in nodes):
        remedy = (
            "The perturbed loss needs every parameter: take layerwise_sam out of "
            "optax.masked, multi_transform or partition and choose layers with rule=."
        )
        raise ValueError(
            _checks.message(
                who, "params", "the whole parameter tree", "MaskedNode", remedy
            )
        )


def _first_meetings(
    params: Any,
    loss_fn: Callable[..., Any],
    args: tuple[Any, ...],
    axis_env: _jaxpr.AxisEnv,
) -> list[int]:
    """Returns for each parameter leaf the first equation where it meets data, or -1."""
    traced, inputs = _jaxpr.trace_call(loss_fn, params, args, True, axis_env)
    # A scalar that the loss closed over is a coefficient, not data.
    batch = [v for v in traced.consts if _jaxpr.shape(v)]
    data = _jaxpr.dependents(traced.eqns, [*inputs, *batch])
    waiting = {v: frozenset({i}) for i, v in enumerate(traced.invars)}
    first = [-1] * len(traced.invars)
    for position, eqn in enumerate(traced.eqns):
        read = [atom for atom in eqn.invars if _jaxpr.is_var(atom)]
        touched = frozenset().union(*(waiting.get(v, frozenset()) for v in read))
        touched = frozenset(i for i in touched if first[i] < 0)
        if touched and any(v in data for v in read):
            for i in touched:
                first[i] = position
        elif touched:
            waiting.update(dict.fromkeys(eqn.outvars, touched))
    return first
