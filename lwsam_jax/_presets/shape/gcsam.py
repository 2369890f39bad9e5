"""GCSAM: the ascent gradient is centralized before it is normalized."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ... import _checks
from ..._axes import combine, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def centered(over: str = "inputs") -> optax.GradientTransformation:
    """Returns the transformation that subtracts from each leaf its mean.

    Args:
      over: `"inputs"`: the mean is that of each output, the last axis, over the other
        axes; leaves of rank below 2 stay. `"tensor"`: one mean for each leaf. As a
        shape it is that of each index of a stack of layers.
    """

    def update(updates, state, params=None, *, layers=None, **extra):
        del params, extra
        leaves, treedef = jax.tree.flatten(updates)
        stacks = [None] * len(leaves) if layers is None else layers.stacks
        own = lambda x: _centered(x, over)
        found = [
            own(x) if stack is None else jax.vmap(own, stack.axis, stack.axis)(x)
            for x, stack in zip(leaves, stacks, strict=True)
        ]
        return jax.tree.unflatten(treedef, found), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def _centered(x: jax.Array, over: str) -> jax.Array:
    if over == "tensor":
        return x - jnp.mean(x)
    return x - jnp.mean(x, tuple(range(x.ndim - 1)), keepdims=True) if x.ndim > 1 else x


def gcsam(
    rho: Any, over: str = "inputs", centers_descent: bool = False, **parts: Any
) -> Method:
    r"""Returns SAM with $\epsilon = \rho\,C(g) / \|C(g)\|$, $C(g) = g - \bar g$.

    Where every leaf has mean 0 already, it is SAM.

    Args:
      rho: Radius, >= 0, a number or a schedule.
      over: `"inputs"`: $\bar g$ is the mean for each output (the last axis of a leaf)
        over its inputs, in leaves of rank 2 and more, as gradient centralization has it.
        `"tensor"`: one mean for each leaf.
      centers_descent: Whether the base optimizer gets $C(\hat g)$ instead of $\hat g$.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, a chain of the centering and
      `normalized()`, so that $\|\epsilon\| = \rho$; `descend()`.

    Raises:
      ValueError: For another `over`.

    References:
      Hassan et al., 2025, arXiv:2501.11584; not confirmed in paper or code. Its abstract
      centers before the ascent; a formula collection centers $\hat g$ as well, and
      takes one mean for each tensor: the two flags. A port takes the norm before
      centering, so that $\|\epsilon\| < \rho$; here it is after.
    """
    _checks.choice("gcsam", "over", over, ("inputs", "tensor"))
    center = lambda ascent, descent: tuple(_centered(x, over) for x in descent)
    own: dict[str, Any] = {}
    if centers_descent:
        own["combine"] = combine.Combine(
            lambda g, d, state, alpha: (center(g, d), state), needs="none"
        )
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=optax.chain(centered(over), shape.normalized()),
        rule=leaves,
        **own,
    )
