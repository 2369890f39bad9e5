"""The first moment inside an optimizer's state, whatever wraps it."""

from __future__ import annotations

from typing import Any

import jax


_NAMES = ("trace", "mu")


def first_moment(opt_state: Any, params: Any) -> Any:
    """Returns the first moment of a base optimizer; None if some leaf has none.

    Found by the fields `trace` and `mu` of the states of Optax. Parts that hold some
    leaves only (`optax.contrib.muon`, `multi_transform`) are put together.

    Args:
      opt_state: State of any Optax optimizer; None has no moment.
      params: The parameters, for their structure.
    """
    count = len(jax.tree.leaves(params, is_leaf=_is_masked))
    found: list[Any] = [None] * count
    for moment in _moments(opt_state):
        leaves = jax.tree.leaves(moment, is_leaf=_is_masked)
        if len(leaves) != count:
            continue
        for i, leaf in enumerate(leaves):
            if found[i] is None and not _is_masked(leaf):
                found[i] = leaf
    places, treedef = jax.tree.flatten(params, is_leaf=_is_masked)
    wanted = [i for i, place in enumerate(places) if not _is_masked(place)]
    if not wanted or any(found[i] is None for i in wanted):
        return None
    leaves = [x if _is_masked(x) else found[i] for i, x in enumerate(places)]
    return jax.tree.unflatten(treedef, leaves)


def _moments(state: Any) -> list[Any]:
    """Returns the moments in a state, outermost first."""
    has_moment = lambda x: any(hasattr(x, name) for name in _NAMES)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: _is_state(x) and has_moment(x))
    return [
        getattr(node, next(name for name in _NAMES if hasattr(node, name)))
        for node in nodes
        if _is_state(node) and has_moment(node)
    ]


def _is_state(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields")


def _is_masked(x: Any) -> bool:
    return type(x).__name__ == "MaskedNode"
