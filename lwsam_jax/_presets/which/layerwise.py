"""Layer-wise SAM as the paper has it: Algorithm 1 and Eq. 6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from ... import _checks
from ..._axes import combine as _combine, shape as _shape, when as _when, which
from ..._engine.layers import Layers, Rule
from ..._loops.transform import as_optax
from ..._method import Method


_WHO = "lwsam"


def LayerwiseSAM(
    k: Any = None,
    *,
    select: which.Selector | None = None,
    rho: Any,
    alpha: Any,
    normalize: str = "none",
    rule: Rule | None = None,
    layers: Layers | None = None,
    axis_name: Any = None,
    seed: Any = 0,
    when: Callable[[jax.Array], jax.Array] | None = None,
    max_overhead: float | None = None,
    mean_overhead: float | None = None,
) -> Method:
    r"""Returns layer-wise SAM: $d_l = (1 - \alpha)\,g_l + \alpha\,\hat g_l$ if selected.

    The layers of the k largest gradient norms in the step before are perturbed by
    $\epsilon_l = \rho\,g_l$; all others get the gradient at the perturbed point.

    Args:
      k: Number of layers of the largest gradient norm; exactly one of k and select.
      select: A selector `(norms f32[L], key) -> bool[L]`.
      rho: Perturbation radius (the paper's r), >= 0; a number or a schedule.
      alpha: Mixing weight of Eq. 6, >= 0; a number or a schedule. 1 is SAM, above it
        WSAM.
      normalize: `"none"`: `raw()` (Eq. 3, 6); `"selected"`: `normalized()`; `"full"`:
        `normalized("all")` (Eq. 2), at the cost of a whole ascent backward pass.
      rule: What a layer is; `lwsam.weights` by default.
      layers: The layers, if known already.
      axis_name: Mapped axis inside pmap or shard_map; `TrainStep` sets its own.
      seed: Seed of selectors that draw at random.
      when: Predicate of the step count; None perturbs in every step.
      max_overhead: See `Method`.
      mean_overhead: See `Method`.

    Returns:
      A `Method`: `select` or `top_k(k)`, `raw()`, `mix(alpha)`.

    Raises:
      ValueError: For numbers out of range, or neither or both of k and select.
      TypeError: For arguments of the wrong kind.

    References:
      Lee, Layer-wise Adaptive Gradient Norm Penalizing Method for Efficient and Accurate
      Deep Learning, KDD 2024, arXiv:2503.14205; Algorithm 1, Eq. 6. Confirmed in the
      paper.
    """
    if (k is None) == (select is None):
        got = "neither" if k is None else "both"
        remedy = "Pass k=4 for the four layers of largest norm, or select=<selector>."
        expected = "given if and only if `select` is not"
        raise _checks.value_error(_WHO, "k", expected, got, remedy)
    if k is not None:
        _checks.count_of_layers(_WHO, "k", k)
    _checks.alpha(_WHO, alpha)
    _checks.choice(_WHO, "normalize", normalize, _checks.NORMALIZE)
    return Method(
        which.top_k(0 if k is None else k) if select is None else select,
        rho=rho,
        shape=_shape.BY_NORMALIZE[normalize](),
        combine=_combine.mix(alpha),
        when=_when.always() if when is None else when,
        rule=rule,
        layers=layers,
        axis_name=axis_name,
        seed=seed,
        max_overhead=max_overhead,
        mean_overhead=mean_overhead,
    )


def layerwise_sam(
    k: int | None = None,
    *,
    select: which.Selector | None = None,
    rho: Any,
    alpha: Any,
    normalize: str = "none",
    rule: Rule | None = None,
    layers: Layers | None = None,
    axis_name: Any = None,
    seed: int = 0,
    when: Callable[[jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns gradients into layer-wise penalized gradients (Algorithm 1).

    Stands first in its `optax.chain`. Its update takes one of

    * `grad_fn`: gradient function of the parameters on the same batch. The incoming
      gradients are the ascent gradient; `grad_fn` is called once, at the perturbed
      point, with `(params)` if it can be, else with `(params, 0)`. Inside `pmap` or
      `shard_map` it must average over devices itself, as must the incoming gradients.
    * `value_fn` (or `obj_fn`, as Levanter calls it): loss of the parameters on the same
      batch, a scalar or (scalar, aux). Both gradients come from its split; the incoming
      gradients are used only when nothing is selected and there is no `axis_name`.

    and `selection`, static: a tuple of names (`lwsam.selection(state)`), a `Cover`
    (`lwsam.selection(state, cover="depth")`), or None for the mask in the state, which
    is always right, also inside `lax.scan` and `vmap`, and costs what SAM costs.

    Args:
      k: Number of layers to perturb, those of the largest gradient norm in the step
        before; exactly one of k and select.
      select: A selector `(norms f32[L], key) -> bool[L]`, such as `lwsam.random_k(4)`.
      rho: Perturbation radius, >= 0; a float, or a schedule of the step count.
      alpha: Mixing weight of Eq. 6, >= 0; a float, or a schedule.
      normalize: `"none"` ($\epsilon = \rho g$), `"selected"` or `"full"`; see
        `lwsam.value_and_grad`.
      rule: What a layer is; `lwsam.weights` by default.
      layers: The layers, if known already. `Layers.of(params, rule, loss_fn, *args)`
        knows their depth, which covers and ties use; without it the depth is the
        natural order of the names.
      axis_name: Mapped axis over which `value_fn`'s values and gradients are averaged.
      seed: Seed of selectors that draw at random.
      when: Predicate of the step count, such as `lwsam.every(2)`; other steps are plain.

    Returns:
      An `optax.GradientTransformationExtraArgs`; see `lwsam.as_optax`.

    Raises:
      ValueError: For numbers out of range, neither or both of k and select, k above the
        number of layers, unknown names, trees of another structure, masked trees,
        neither or both of grad_fn and value_fn.
      TypeError: For arguments of the wrong kind.

    Examples:
      >>> import jax, optax, jax.numpy as jnp, lwsam_jax as lwsam
      >>> loss = lambda p: jnp.sum((p["w"] @ jnp.ones((2, 1)) - 1.0) ** 2)
      >>> params = {"w": jnp.ones((2, 2))}
      >>> tx = optax.chain(lwsam.layerwise_sam(k=1, rho=0.1, alpha=0.8), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(
      ...     jax.grad(loss)(params), state, params, grad_fn=jax.grad(loss)
      ... )

    References:
      Lee, Layer-wise Adaptive Gradient Norm Penalizing Method for Efficient and Accurate
      Deep Learning, KDD 2024, arXiv:2503.14205; Algorithm 1. Unselected layers get the
      gradient at the perturbed point (line 6).
    """
    return as_optax(
        LayerwiseSAM(
            k,
            select=select,
            rho=rho,
            alpha=alpha,
            normalize=normalize,
            rule=rule,
            layers=layers,
            axis_name=axis_name,
            seed=seed,
            when=when,
        )
    )
