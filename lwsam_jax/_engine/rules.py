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


def labels(rule: Rule, paths: Sequence[tuple[Any, Any]]) -> list[str | None]:
    """Returns the layer of each leaf, or None; raises on what is no name of one."""
    found = [rule(path, leaf) for path, leaf in paths]
    for name in found:
        if name is not None and not isinstance(name, str):
            remedy = "Return the layer's name, or None for a leaf never perturbed."
            raise TypeError(_refusal("a function to str or None", name, remedy))
    if isinstance(rule, blocks) and not any(rule.module(path) for path, _ in paths):
        modules_there = dict.fromkeys(_join(_names_of(path)[:-1]) for path, _ in paths)
        remedy = f"The modules are: {', '.join(modules_there)}."
        raise ValueError(_refusal("blocks of a name that is there", rule, remedy))
    if rule is modules or isinstance(rule, blocks):
        owners = {a for a, x in zip(found, paths, strict=True) if weights(*x)}
        return [name if name in owners else None for name in found]
    return found


def _refusal(expected: str, got: Any, remedy: str) -> str:
    return _checks.message("Layers.of", "rule", expected, got, remedy)


def natural_order(name: str) -> tuple[Any, ...]:
    """Returns a sort key by which "Block_2" comes before "Block_10"."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts)
