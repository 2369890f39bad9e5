"""DAS: the cores of a factorized layer, scaled as SAM would move their norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import _checks, _tree
from ..._engine.layers import Layers
from ..._engine.rules import Rule


_WHO = "das"
_GUARD = 1e-8


class DASState(NamedTuple):
    """State of `das`.

    Attributes:
      step_count: int32[], steps done.
      base: State of the base optimizer.
    """

    step_count: jax.Array
    base: Any


def das(
    base: optax.GradientTransformation,
    learning_rate: Any,
    rule: Rule,
    alpha: Any = 0.2,
    *,
    sign: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns an optimizer that scales the cores of a factorized layer before each step.

    With the cores $G_m$ of a layer and their gradients $g_m$,

    $$G_m \leftarrow \Big(1 + \alpha \eta\,
    \frac{\|g_m\|^2 - \mathrm{mean}_j \|g_j\|^2}
    {\|G_m\|^2 \sqrt{\sum_j \|g_j\|^2} + 10^{-8}}\Big)\,G_m,$$

    and then the step of the base optimizer, which sees the scaled cores. It is what SAM
    does to their norms, without a perturbation: one gradient. A layer of one core, and
    leaves that the rule does not name, are only those of the base.

    Args:
      base: Any Optax optimizer.
      learning_rate: $\eta$, that of the base; a number or a schedule of the step count.
      rule: What a layer is, as in `Layers.of`: `(path, leaf) -> name | None`, the same
        name for all cores of one layer.
      alpha: $\alpha$, >= 0, a number or a schedule; the authors let it fall to 0
        linearly. A Python 0 is the base optimizer, bit for bit.
      sign: 1, that of the code; -1, that of its docstring.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: For numbers out of range; in `init`, where no layer has two cores.
      TypeError: For arguments of the wrong kind.

    References:
      Cao et al., 2025, arXiv:2508.10435. The formula is that of one
      public code, not known to be the authors'; its sign agrees with what SAM does to a
      scale-invariant product, which we derived.
    """
    if not (hasattr(base, "init") and hasattr(base, "update")):
        remedy = "Pass an Optax optimizer such as optax.sgd(0.1)."
        raise _checks.type_error(_WHO, "base", "an optimizer", repr(base), remedy)
    _checks.is_callable(_WHO, "rule", rule, "Pass a function (path, leaf) -> name.")
    _checks.non_negative(_WHO, "alpha", alpha, "0.2 is published.")
    _checks.non_negative(_WHO, "learning_rate", learning_rate, "Pass that of the base.")
    if sign not in (-1, 1):
        raise _checks.value_error(_WHO, "sign", "1 or -1", sign, "1 is the code's.")
    base = optax.with_extra_args_support(base)
    is_plain = _checks.is_number(alpha) and alpha == 0

    def at(x: Any, step: jax.Array) -> Any:
        return x(step) if callable(x) else x

    def init_fn(params: optax.Params) -> DASState:
        if type(params).__name__ != "_ParamsPlaceholder":
            layers = Layers.of(params, rule)
            owners = [i for i in layers.leaf_layer if i >= 0]
            if len(owners) == len(set(owners)):
                remedy = "Return one name for all cores of a layer."
                expected, got = "one that names a layer of two leaves", "none"
                raise _checks.value_error(_WHO, "rule", expected, got, remedy)
        return DASState(jnp.zeros((), jnp.int32), base.init(params))

    def update_fn(
        updates: optax.Updates,
        state: DASState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DASState]:
        if params is None:
            remedy = "Call tx.update(grads, opt_state, params)."
            raise _checks.value_error(_WHO, "params", "given", None, remedy)
        count = jnp.asarray(optax.safe_increment(state.step_count))
        if is_plain:
            found, inner = base.update(updates, state.base, params, **extra_args)
            return found, DASState(count, inner)
        layers = Layers.of(params, rule)
        step = at(alpha, state.step_count) * at(learning_rate, state.step_count)
        scaled = _scaled(layers, params, updates, sign * step)
        found, inner = base.update(updates, state.base, scaled, **extra_args)
        total = jax.tree.map(lambda u, new, old: u + (new - old), found, scaled, params)
        return total, DASState(count, inner)

    return optax.GradientTransformationExtraArgs(
        init_fn,  # pyright: ignore[reportArgumentType]
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def _scaled(layers: Layers, params: Any, grads: Any, step: Any) -> Any:
    """Returns the parameters with the cores of each layer scaled."""
    leaves, treedef = jax.tree.flatten(params)
    axes = [None if stack is None else stack.axis for stack in layers.stacks]
    flat = layers.flatten(_WHO, "updates", grads)
    of_grads = [_tree.square_norm(g, a) for g, a in zip(flat, axes, strict=True)]
    for places in layers.groups:
        if len(places) < 2:
            continue
        total = sum(of_grads[i] for i in places)
        for i in places:
            size = _tree.square_norm(leaves[i], axes[i]) * _tree.root(
                jnp.asarray(total)
            )
            gap = of_grads[i] - total / len(places)
            factor = layers.spread(jnp.asarray(step) * gap / (size + _GUARD), i)
            leaves[i] = _tree.add_scaled(leaves[i], factor, leaves[i])
    return jax.tree.unflatten(treedef, leaves)
