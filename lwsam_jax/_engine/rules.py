"""What a layer is: rules that name the leaves of a parameter tree."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks


Rule = Callable[[tuple[Any, ...], Any], "str | None"]

_NOT_WEIGHTS = frozenset({"bias", "scale", "offset", "gamma", "beta"})


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


def is_bias(path: Sequence[Any], leaf: Any) -> bool:
    """Returns whether a leaf is a bias by its name; `b` only below rank 2."""
    name = (_names_of(path) or [""])[-1]
    return name in ("bias", "beta", "offset") or (name == "b" and leaf.ndim < 2)


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
    bias, scale, offset, gamma, beta (Flax attention biases have rank 2).

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


@dataclasses.dataclass(frozen=True)
class blocks:  # a rule, named as the others are
    r"""Rule: whatever is inside a module of this name is one layer; else as `weights`.

    `blocks("LSTMCell")` makes one layer of the eight gate matrices of each cell,
    `blocks(r"layers/\d+")` one of each entry of a list of blocks. As with `modules`, all
    float leaves belong to it, and one that owns no weight is no layer.

    Attributes:
      pattern: Regular expression that the path of the module, joined by "/", contains.
        Its first match, continued to the end of that key, ends the layer's name.

    Examples:
      >>> import jax.numpy as jnp, lwsam_jax as lwsam
      >>> gate = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> params = {"Dense_0": gate, "LSTMCell_0": {"hi": gate, "ii": gate}}
      >>> lwsam.Layers.of(params, blocks("LSTMCell")).names
      ('Dense_0', 'LSTMCell_0')
    """

    pattern: str

    def __call__(self, path: tuple[Any, ...], leaf: Any) -> str | None:
        """Returns the name of the block or, outside of all, of the weight."""
        module = self.module(path)
        if module is None:
            return weights(path, leaf)
        return module if _is_float(leaf) else None

    def module(self, path: tuple[Any, ...]) -> str | None:
        """Returns the name of the block that a path leads into, or None."""
        module = "/".join(_names_of(path)[:-1])
        found = re.search(self.pattern, module)
        if found is None:
            return None
        end = module.find("/", found.end())
        return module if end < 0 else module[:end]


@dataclasses.dataclass(frozen=True)
class stacked:  # a rule, named as the others are
    r"""Rule: leaves whose path matches are stacks; each index of one is a layer.

    For blocks that are stacked along an axis and run by `nn.scan`, `nnx.scan` or
    `jax.lax.scan`, in forms that do not see the loss (`as_optax`, `perturbed`); those
    that see it find scanned stacks by themselves. Layers are named by the rule of one
    slice and its index, `blocks/query/3`.

    Attributes:
      pattern: Regular expression that the path of a leaf, joined by "/", contains.
      rule: What a layer is in one slice, and among all other leaves; another `stacked`
        where stacks differ in axis.
      axis: Axis of the stack; 0 unless a framework was told otherwise (MaxText: 1).

    Examples:
      >>> import jax.numpy as jnp, lwsam_jax as lwsam
      >>> block = {"query": jnp.ones((3, 4, 4)), "scale": jnp.ones((3, 4))}
      >>> params = {"blocks": block, "out": jnp.ones((4, 2))}
      >>> lwsam.Layers.of(params, lwsam.stacked("^blocks/")).names
      ('blocks/query/0', 'blocks/query/1', 'blocks/query/2', 'out')
    """

    pattern: str
    rule: Rule = weights
    axis: int = 0

    def __post_init__(self) -> None:
        """Raises on what is no regular expression, no rule or no axis."""
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            remedy = f"Python's re says: {error}."
            expected = "a regular expression"
            raise _checks.value_error(
                "stacked", "pattern", expected, repr(self.pattern), remedy
            ) from None
        remedy = "Pass lwsam.weights, modules, leaves, blocks(pattern), or a function."
        _checks.is_callable("stacked", "rule", self.rule, remedy)
        remedy = "Pass the axis of the stack, 0 for the first."
        _checks.count("stacked", "axis", self.axis, remedy)

    def __call__(self, path: tuple[Any, ...], leaf: Any) -> str | None:
        """Returns the name of the leaf in the rule of a slice, without an index."""
        axis = self.axis_of(path)
        return self.rule(path, leaf if axis is None else slice_of(leaf, axis))

    def axis_of(self, path: tuple[Any, ...]) -> int | None:
        """Returns the axis along which a leaf is a stack, or None."""
        found = self._match(path)
        return None if found is None else found[0]

    def stem(self, path: tuple[Any, ...]) -> str:
        """Returns the path of a leaf to where its pattern ends; empty without a stack."""
        found = self._match(path)
        return "" if found is None else found[1].rstrip("/")

    def _match(self, path: tuple[Any, ...]) -> tuple[int, str] | None:
        whole = _join(_names_of(path))
        found = re.search(self.pattern, whole)
        if found is not None:
            return self.axis, whole[: found.end()]
        return self.rule._match(path) if isinstance(self.rule, stacked) else None


def stated_axes(
    rule: Rule, paths: Sequence[tuple[Any, Any]]
) -> list[int | None] | None:
    """Returns for each leaf the axis of the stack that it is, or None.

    None in place of a list if the rule says nothing of stacks.

    Raises:
      ValueError: If the rule names a stack that is not there, or a leaf without the axis.
    """
    if not isinstance(rule, stacked):
        return None
    axes = [rule.axis_of(path) for path, _ in paths]
    if paths and all(axis is None for axis in axes):
        there = dict.fromkeys(_join(_names_of(path)) for path, _ in paths)
        remedy = f"The leaves are: {', '.join(there)}."
        raise ValueError(_refusal("stacked of a path that is there", rule, remedy))
    for axis, (path, leaf) in zip(axes, paths, strict=True):
        if axis is not None and len(jnp.shape(leaf)) <= axis:
            got = f"{rule}, which matches {_join(_names_of(path))}{[*jnp.shape(leaf)]}"
            remedy = "Pass a pattern that leaves it out."
            expected = f"stacked of leaves that have an axis {axis}"
            raise ValueError(_refusal(expected, got, remedy))
    return axes


def of_slices(rule: Rule) -> Rule:
    """Returns the rule of one slice."""
    while isinstance(rule, stacked):
        rule = rule.rule
    return rule


def slice_of(leaf: Any, axis: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of one slice of a stack."""
    shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


def labels(
    rule: Rule, paths: Sequence[tuple[Any, Any]], axes: Sequence[int | None]
) -> list[str | None]:
    """Returns the layer of each leaf, or None; raises on what is no name of one.

    Under `weights` and `leaves` two leaves of one name raise as well.

    Args:
      rule: The rule; it sees one slice of a stack.
      paths: Path and leaf of each leaf.
      axes: For each leaf the axis along which it is a stack, or None.
    """
    rule = of_slices(rule)
    paths = [
        (path, leaf if axis is None else slice_of(leaf, axis))
        for (path, leaf), axis in zip(paths, axes, strict=True)
    ]
    found = [rule(path, leaf) for path, leaf in paths]
    for name in found:
        if name is not None and not isinstance(name, str):
            remedy = "Return the layer's name, or None for a leaf never perturbed."
            raise TypeError(_refusal("a function to str or None", name, remedy))
    if isinstance(rule, blocks) and not any(rule.module(path) for path, _ in paths):
        modules_there = dict.fromkeys(_join(_names_of(path)[:-1]) for path, _ in paths)
        remedy = f"The modules are: {', '.join(modules_there)}."
        raise ValueError(_refusal("blocks of a name that is there", rule, remedy))
    if rule in (weights, leaves):
        _refuse_shared_names(found, paths)
    if rule is modules or isinstance(rule, blocks):
        owners = {a for a, x in zip(found, paths, strict=True) if weights(*x)}
        return [name if name in owners else None for name in found]
    return found


def _refuse_shared_names(found: Sequence[str | None], paths: Sequence[Any]) -> None:
    seen: dict[str, str] = {}
    for label, (path, _) in zip(found, paths, strict=True):
        where = jax.tree_util.keystr(path)
        if label is not None and seen.setdefault(label, where) != where:
            got = f"{seen[label]} and {where}, which are both named {label!r}"
            remedy = "Rename one of them, or pass a rule that tells them apart."
            raise _checks.value_error(
                "Layers.of", "params", "a tree whose layers differ in name", got, remedy
            )


def _refusal(expected: str, got: Any, remedy: str) -> str:
    return _checks.message("Layers.of", "rule", expected, got, remedy)


def sort_name(name: str, stem: str) -> str:
    """Returns "blocks/3/query" of the layer "blocks/query/3" of the stacks "blocks"."""
    label, _, index = name.rpartition("/")
    inside = label.startswith(stem)
    return f"{stem}/{index}{label[len(stem) :]}" if stem and inside else name


def natural_order(name: str) -> tuple[Any, ...]:
    """Returns a sort key by which "Block_2" comes before "Block_10"."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts)
