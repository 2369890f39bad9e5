"""A static value inside a state, which is otherwise made of arrays."""

from __future__ import annotations

import sys
from typing import Any

import jax


@jax.tree_util.register_pytree_node_class
class Static:
    """A pytree node without leaves that carries a hashable value through a state.

    `is_placeholder` marks one that `optax.tree.map_params` made from parameters that are
    not there. Its structure equals that of any other, for it is mapped with a real one,
    and takes on the value of that: the result of the mapping has the placeholder's.
    """

    def __init__(self, value: Any, is_placeholder: bool = False) -> None:
        self.value, self._is_placeholder = value, is_placeholder

    def tree_flatten(self) -> tuple[tuple[()], _Data]:
        return (), _Data(self.value, self._is_placeholder)

    @classmethod
    def tree_unflatten(cls, data: _Data, children: tuple[()]) -> Static:
        del children
        return cls(data.value, data.is_placeholder)

    def __repr__(self) -> str:
        return f"Static({getattr(self.value, 'names', self.value)})"


class _Data:
    """Auxiliary data of `Static`, with the equality that it documents."""

    def __init__(self, value: Any, is_placeholder: bool) -> None:
        self.value, self.is_placeholder = value, is_placeholder

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Data):
            return NotImplemented
        for one, another in ((self, other), (other, self)):
            if one.is_placeholder and one.value is None:
                one.value = another.value
        either = self.is_placeholder or other.is_placeholder
        return either or self.value == other.value

    def __hash__(self) -> int:
        return hash(_Data)  # equal values need equal hashes, and some equal all

    def __repr__(self) -> str:
        return repr(self.value)


def register_with_flax() -> None:
    """Tells Flax's serialization, where it is loaded, that the node holds no data.

    `flax.serialization.to_bytes(state)` and `from_bytes` work then; Flax is never
    imported for it.
    """
    serialization = sys.modules.get("flax.serialization")
    if serialization is None or hasattr(Static, "_known_to_flax"):
        return
    serialization.register_serialization_state(
        Static, lambda node: {}, lambda node, state: node
    )
    Static._known_to_flax = True  # pyright: ignore[reportAttributeAccessIssue]
