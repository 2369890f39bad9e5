"""The perturbation of each layer scales with the width of the network as muP wants it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ... import _checks, _tree
from ..._axes import shape, which
from ..._engine.rules import leaves, slice_of
from ..._method import Method
from ..preset import preset


_WHO = "mup_perturbation"
# Exponents of the width, with one norm over all leaves.
_EXPONENTS: Mapping[str, float] = {"input": 1.5, "hidden": 0.5, "output": -0.5}


def mup_perturbation(
    rho: Any,
    width: float = 1.0,
    role: Callable[[str], str] | None = None,
    per: str = "all",
    **parts: Any,
) -> Method:
    r"""Returns SAM whose perturbation scales with width layer by layer, for muP networks.

    In a wide network the last layer has nearly all of the gradient's norm, so that SAM
    perturbs it alone. Two forms undo that; `per="all"` has
    $\epsilon_l = \rho\,c_l\,g_l / \|g\|$ with the width $n$ over that of the network
    where rho was tuned: $c = n^{3/2}$ for input layers (and biases, whose fan-in is 1),
    $n^{1/2}$ for hidden ones, $n^{-1/2}$ for the output. At $n = 1$ it is SAM.
    `per="layer"` has
    $\epsilon_l = \rho\,\sqrt{n_{out} / n_{in}}\,g_l / \|g_l\|$ for each leaf, and needs
    neither width nor role; $n_{out}$ is a leaf's last axis, $n_{in}$ the product of the
    others, 1 for a vector.

    Args:
      rho: Radius, >= 0, a number or a schedule; for all widths.
      width: $n$, > 0.
      role: Function of a layer's name to `"input"`, `"hidden"` or `"output"`; needed
        unless the width is 1.
      per: `"all"` or `"layer"`.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, a shape of its own, `descend()`.

    Raises:
      ValueError: For arguments out of range; a role that is none of the three.

    References:
      Haas et al., muP^2, NeurIPS 2024, arXiv:2411.00075, for the idea and the claims, as
      secondary sources have them. The exponents are derived here from the scaling of
      gradients in muP (measured at widths of 64 to 2,048), not confirmed in the paper.
    """
    _checks.choice(_WHO, "per", per, ("all", "layer"))
    if not _checks.is_number(width) or not (math.isfinite(width) and width > 0):
        remedy = "Pass the width over that at which rho was tuned, such as 4.0."
        raise _checks.value_error(_WHO, "width", "> 0", repr(width), remedy)
    if per == "all" and role is None and width != 1:
        remedy = 'Pass role=lambda name: "hidden", for instance, by the layer\'s name.'
        raise _checks.value_error(_WHO, "role", "a function", None, remedy)
    if per == "all":
        own: Any = optax.chain(shape.normalized(), _by_role(width, role))
    else:
        own = _by_leaf()
    return preset(parts, select=which.everything(), rho=rho, shape=own, rule=leaves)


def _by_role(
    width: float, role: Callable[[str], str] | None
) -> optax.GradientTransformationExtraArgs:
    def factors(found, params, layers):
        del params
        names = [layers.names[at] if at >= 0 else "" for at in layers.leaf_layer]
        of = lambda name: "hidden" if role is None or not name else role(name)
        roles = [of(name) for name in names]
        for name, x in zip(names, roles, strict=True):
            if x not in _EXPONENTS:
                remedy = f"It is asked about {name!r}."
                expected = 'a function to "input", "hidden" or "output"'
                raise _checks.value_error(_WHO, "role", expected, repr(x), remedy)
        return [
            jnp.asarray(width ** _exponent(x, len(_dims(leaf, stack))), _real(leaf))
            for x, leaf, stack in zip(roles, found, layers.stacks, strict=True)
        ]

    return shape.LeafFactors(factors)


def _exponent(role: str, rank: int) -> float:
    if rank >= 2:
        return _EXPONENTS[role]
    return _EXPONENTS["hidden" if role == "output" else "input"]


def _by_leaf() -> optax.GradientTransformationExtraArgs:
    def factors(found, params, layers):
        del params
        return [
            jnp.asarray(_spectral(_dims(x, stack)), _real(x))
            * _tree.reciprocal(_norm(x, stack)).astype(_real(x))
            for x, stack in zip(found, layers.stacks, strict=True)
        ]

    return shape.LeafFactors(factors)


def _dims(leaf: jax.Array, stack: Any) -> tuple[int, ...]:
    """Returns the shape of a leaf, of a stack that of one index."""
    return leaf.shape if stack is None else slice_of(leaf, stack.axis).shape


def _norm(leaf: jax.Array, stack: Any) -> jax.Array:
    """Returns the norm of a leaf, of a stack that of each index, to broadcast to it."""
    if stack is None:
        return _tree.norm([leaf])
    return stack.spread(_tree.norm([leaf], keep=[stack.axis]))


def _spectral(dims: tuple[int, ...]) -> float:
    return math.sqrt((dims[-1] if dims else 1) / math.prod(dims[:-1]))


def _real(x: jax.Array) -> jnp.dtype:
    return _tree.accumulation_dtype(x)
