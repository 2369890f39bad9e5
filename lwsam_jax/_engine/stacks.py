"""Stacks of layers: leaves whose slices are layers, and the scans over them.

A scan whose inputs are parameters runs one block after the other, each with its own
slice. Between the parameter and the scan there may be views, such as a cast: what is done
to each slice by itself.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from . import graph
from .graph import is_var


_ELEMENTWISE = frozenset(
    "convert_element_type reduce_precision copy copy_p stop_gradient name pvary pcast "
    "add add_any sub mul div neg sign abs max min square integer_pow pow sqrt rsqrt exp "
    "exp2 log log1p expm1 tanh logistic erf sin cos clamp select_n round floor ceil "
    "sharding_constraint".split()
)


class Stack(NamedTuple):
    """How a leaf is a stack of layers.

    Attributes:
      axis: The axis of the stack.
      length: How many layers it holds.
      rank: Rank of the leaf.
    """

    axis: int
    length: int
    rank: int

    def spread(self, x: Any) -> Any:
        """Returns a vector, one entry for each index, as it broadcasts to the leaf."""
        shape = [1] * self.rank
        shape[self.axis] = self.length
        return x.reshape(shape)


class Scan(NamedTuple):
    """The inputs of a scan by kind.

    Attributes:
      eqn: The equation.
      consts: How many of its inputs every iteration sees as they are.
      carries: How many of the next are handed from iteration to iteration.
      length: How many iterations there are.
    """

    eqn: core.JaxprEqn
    consts: int
    carries: int
    length: int

    @staticmethod
    def of(eqn: core.JaxprEqn) -> Scan | None:
        """Returns the scan that an equation is, or None.

        Counted by rank, which a slice loses inside: from JAX 0.12 on the parameters no
        longer name the numbers.
        """
        if eqn.primitive.name != "scan":
            return None
        body = eqn.params["jaxpr"].jaxpr
        carries = _of_one_rank(body.outvars, eqn.outvars)
        consts = _of_one_rank(body.invars, eqn.invars) - carries
        return Scan(eqn, consts, carries, eqn.params["length"])

    @property
    def slices(self) -> Sequence[Any]:
        """What each iteration sees a slice of."""
        return self.eqn.invars[self.consts + self.carries :]

    @property
    def order(self) -> range:
        """The indices in the order of the iterations."""
        order = range(self.length)
        return order[::-1] if self.eqn.params["reverse"] else order


def _of_one_rank(inner: Sequence[Any], outer: Sequence[Any]) -> int:
    pairs = zip(inner, outer, strict=True)
    return sum(len(graph.shape(a)) == len(graph.shape(b)) for a, b in pairs)


class Sliced(NamedTuple):
    """A variable whose slices are different sources.

    Attributes:
      axis: The axis of the slices.
      masks: Bit mask of each.
    """

    axis: int
    masks: tuple[int, ...]


class Views:
    """The views of a list of equations."""

    def __init__(self, eqns: Iterable[core.JaxprEqn]) -> None:
        """Remembers which equation defines which variable."""
        self._made_by = {v: eqn for eqn in eqns for v in eqn.outvars}

    def operands(self, v: core.Var, axis: int) -> list[tuple[int, Any, int | None]]:
        """Returns what the slices of a variable along an axis are made of.

        Empty if it is no view. Else for each input of its equation the number, the atom,
        and the axis of its slices, None for what all slices see as it is.
        """
        eqn = self._made_by.get(v)
        if eqn is None:
            return []
        name, shape = eqn.primitive.name, graph.shape(v)
        if name == "transpose":
            return [(0, eqn.invars[0], eqn.params["permutation"][axis])]
        if name == "broadcast_in_dim" and len(eqn.invars) == 1:
            dimensions, inner = eqn.params["broadcast_dimensions"], eqn.invars[0]
            at = dimensions.index(axis) if axis in dimensions else None
            if at is None or graph.shape(inner)[at] != shape[axis]:
                return []
            return [(0, inner, at)]
        if name not in _ELEMENTWISE or len(eqn.outvars) != 1:
            return []
        if name == "sharding_constraint" and _is_split_along(eqn, axis):
            return []
        shapes = [graph.shape(a) for a in eqn.invars]
        if any(len(s) not in (0, len(shape)) for s in shapes) or not shape:
            return []
        # Sizes of 1 are broadcast.
        has_slices = lambda s: bool(s) and s[axis] == shape[axis]
        rows = enumerate(zip(eqn.invars, shapes, strict=True))
        return [(i, a, axis if has_slices(s) else None) for i, (a, s) in rows]

    def equation(self, v: core.Var) -> core.JaxprEqn:
        """Returns the equation that defines a variable."""
        return self._made_by[v]

    def leaves(
        self, atom: Any, axis: int, sources: Container[core.Var]
    ) -> dict[core.Var, int]:
        """Returns the sources whose slices an atom's slices are made of.

        Args:
          atom: A variable, or a literal.
          axis: The axis of its slices.
          sources: Variables that are looked for.

        Returns:
          For each that is found the axis of its slices.
        """
        found: dict[core.Var, int] = {}
        todo = [(atom, axis)]
        while todo:
            atom, axis = todo.pop()
            if not is_var(atom):
                continue
            if atom in sources:
                found[atom] = axis
                continue
            for _, inner, at in self.operands(atom, axis):
                if at is not None:
                    todo.append((inner, at))
        return found

    def mask_of_slice(
        self,
        atom: Any,
        axis: int,
        index: int,
        sliced: dict[core.Var, Sliced],
        masks: dict[core.Var, int],
    ) -> int:
        """Returns the bit mask of one slice of an atom, from those of whole variables."""
        if not is_var(atom):
            return 0
        if atom in sliced and sliced[atom].axis == axis:
            return sliced[atom].masks[index]
        if atom in sliced or not self.leaves(atom, axis, sliced):
            return masks.get(atom, 0)
        found = 0
        for _, inner, at in self.operands(atom, axis):
            if at is not None:
                found |= self.mask_of_slice(inner, at, index, sliced, masks)
            elif is_var(inner):
                found |= masks.get(inner, 0)
        return found


def _is_split_along(eqn: core.JaxprEqn, axis: int) -> bool:
    """Whether a constraint on a sharding says anything of an axis, or cannot be read."""
    spec = getattr(eqn.params["sharding"], "spec", None)
    return spec is None or (axis < len(spec) and spec[axis] is not None)
