"""What a step is to do, what it remembers, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _tree
from .._axes.combine import Combine
from .._axes.probe import Probe
from .._axes.when import Gate
from .._engine.layers import Layers
from .._method import Method


class LayerwiseGrad(NamedTuple):
    """What one evaluation of the gradient of a method returns.

    Attributes:
      value: Loss at the parameters, L(w), on the whole batch; where no pass sees both,
        `perturbed_value`.
      aux: Auxiliary output of the loss, of the pass that `aux_from` names, or None. With
        an ascent of its own arguments, or none, that of the descent.
      grads: The gradient for the base optimizer (Eq. 6), structured as the parameters.
      norms: f32[L], norms of the gradient at the perturbed point (Algorithm 1, line 9).
      perturbed_value: Loss at the perturbed point; `value` where nothing is perturbed.
      ascent_value: Loss at the parameters on what the ascent sees; `value` on the whole
        batch, None where the ascent takes no pass.
      late: What the parameters lose after the base optimizer's step, times its learning
        rate, structured as they are; None where `combine` says nothing of that.
      ascended: bool[], whether a `Gate` was open; None where there is none.
      mask: bool[L], layers that were perturbed.
      perturbation_norm: f32[], norm of the perturbation over all parameters.
      cosine: f32[], of the angle between the gradients of both passes on the perturbed
        leaves, 1 where none is; None where the ascent takes no pass.
      finite: bool[], whether the values and gradients of both passes are finite.
    """

    value: jax.Array
    aux: Any
    grads: Any
    norms: jax.Array
    perturbed_value: jax.Array
    ascent_value: Any = None
    late: Any = None
    ascended: Any = None
    mask: Any = None
    perturbation_norm: Any = None
    cosine: Any = None
    finite: Any = None


class Plan(NamedTuple):
    """What a step does, known when it is traced, but for arrays.

    Attributes:
      layers: The layers.
      chosen: Static: which of them the step is compiled for; none: a plain step.
      mask: bool[L], which of these are perturbed; None: all of them.
      rho: Radius.
      alpha: Weight of `combine`, or None.
      shape: The shape.
      combine: The combination.
      aux_from: Whose aux is returned, where both passes see the whole batch.
      axis_name: Mapped axis over which gradients and values are averaged, or None.
      gate: What decides within the step whether it perturbs, or None.
      step: Number of the step, for the gate.
      guards: Static: whether a pass that is not finite makes the step a plain one, as far
        as it can.
      scale: f32[], the loss scale, or None.
    """

    layers: Layers
    chosen: Sequence[int]
    mask: Any
    rho: Any
    alpha: Any
    shape: Any
    combine: Combine
    aux_from: str = "clean"
    axis_name: Any = None
    gate: Gate | None = None
    step: Any = 0
    guards: bool = False
    scale: Any = None

    @property
    def selected(self) -> list[int]:
        """The places of the leaves that the step is compiled for."""
        chosen, layers = set(self.chosen), self.layers
        is_any = lambda place: any(at in chosen for at in layers.of_leaf(place))
        return [i for i in layers.member_leaves if is_any(i)]

    @property
    def active(self) -> list[Any]:
        """For each of them where it is perturbed: bool[], or None: everywhere, always.

        For a stack one bool for each index, which broadcasts to the leaf.
        """
        chosen, layers, mask = set(self.chosen), self.layers, self.mask
        compiled = np.array([i in chosen for i in range(len(layers))])
        # A cover may hold a part of a stack, and the mask more than that.
        within = compiled if mask is None else compiled & mask

        def where(place):
            if not all(at in chosen for at in layers.of_leaf(place)):
                return layers.at_leaf(within, place)
            return None if mask is None else layers.at_leaf(mask, place)

        return [where(i) for i in self.selected]

    @property
    def bits(self) -> jax.Array:
        """bool[L], the layers that are perturbed."""
        compiled = jnp.asarray([i in set(self.chosen) for i in range(len(self.layers))])
        return compiled if self.mask is None else compiled & self.mask

    @property
    def rho_applied(self) -> jax.Array:
        """The radius: at least 0, and 0 where nothing is perturbed."""
        if not self.chosen:
            return jnp.zeros((), jnp.float32)
        rho = jnp.maximum(jnp.asarray(self.rho), 0)
        return jnp.where(jnp.any(self.bits), rho, 0)


class Memory(NamedTuple):
    """What shape, combine and gate remember from step to step.

    Attributes:
      shape: State of the shape.
      combine: State of the combination.
      gate: State of the gate.
    """

    shape: Any = ()
    combine: Any = ()
    gate: Any = ()


def remember(method: Method, layers: Layers, params: Any) -> Memory:
    """Returns the memory before the first step."""
    leaves = jax.tree.leaves(params)
    members = tuple(leaves[i] for i in layers.member_leaves)
    kept: Any = ()
    if method.gate is not None:
        kept = method.gate.init(_tree.accumulation_dtype(*leaves))
    return Memory(
        first_of_shape(method.shape, params), method.combine.init(members), kept
    )


def first_of_shape(shape: Any, params: Any) -> Any:
    """Returns the first state of a shape, of the precision that it sees."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
        return shape.init(jax.eval_shape(lambda p: jax.tree.map(_tree.wide, p), params))
    return shape.init(jax.tree.map(_tree.wide, params))


def direction_of(
    method: Method, kept: Any, opt_state: Any, params: Any, key: jax.Array
) -> Any:
    """Returns the direction of a stale ascent; of a `Probe` a function of the loss."""
    if isinstance(method.ascent, Probe):
        return lambda value_fn: method.ascent.direction(
            kept, opt_state, params, key, value_fn
        )
    return method.ascent.direction(kept, opt_state, params, key)
