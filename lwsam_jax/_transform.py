"""Layer-wise SAM as an Optax transformation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _checks, _gradient, _perturbation
from ._layers import Layers, Rule
from ._method import LayerwiseSAM
from ._selection import (
    Cover,
    LayerwiseSAMState,
    static_selection,
    StaticLayers,
)
from ._selectors import Selector


_WHO = "layerwise_sam"


def layerwise_sam(
    k: int | None = None,
    *,
    select: Selector | None = None,
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
    * `value_fn`: loss of the parameters on the same batch, a scalar or (scalar, aux).
      Both gradients come from its split; the incoming gradients are used only when
      nothing is selected and there is no `axis_name`.

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
      An `optax.GradientTransformationExtraArgs` with a `LayerwiseSAMState`.

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
    method = LayerwiseSAM(
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

    def init_fn(params: optax.Params) -> LayerwiseSAMState:
        if type(params).__name__ == "_ParamsPlaceholder":  # of optax.tree.map_params
            return _placeholder_state()
        return method.init(params, method.layers_of(params))

    def update_fn(
        updates: optax.Updates,
        state: LayerwiseSAMState,
        params: optax.Params | None = None,
        *,
        grad_fn: Callable[..., Any] | None = None,
        value_fn: Callable[..., Any] | None = None,
        selection: tuple[str, ...] | Cover | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LayerwiseSAMState]:
        del extra_args
        if params is None:
            remedy = "Call tx.update(grads, opt_state, params, grad_fn=jax.grad(loss))."
            raise ValueError(_checks.message(_WHO, "params", "given", None, remedy))
        known = method.layers_of(params)
        known.flatten(_WHO, "updates", updates)
        _check_shapes("updates", updates, params)
        for name, function in (("grad_fn", grad_fn), ("value_fn", value_fn)):
            if function is not None:
                remedy = (
                    "Pass a function of the parameters alone, such as jax.grad(loss)."
                )
                _checks.is_callable(_WHO, name, function, remedy)
        if value_fn is not None:
            loss = value_fn
            value_fn = _gradient.scalar_loss(
                _WHO, "value_fn", lambda p: _first(loss(p)), has_aux=False
            )
        mask = None
        if method.is_plain:
            selection = ()
        elif selection is None:
            selection = Cover(known.names)
        chosen, is_cover = static_selection(_WHO, selection, known)
        if is_cover:
            mask = state.mask
        # With `value_fn` nobody else needs the incoming gradients to be averaged.
        recomputed = None not in (value_fn, axis_name) and grad_fn is None
        if not chosen and not recomputed:
            value = _clean_value(value_fn, params, axis_name, state)
            norms = known.norms(updates)
        elif value_fn is not None and grad_fn is None:
            updates, norms, value = _from_value_fn(
                method, value_fn, params, state, known, selection, mask
            )
        elif grad_fn is not None and value_fn is None:
            updates, norms = _from_grad_fn(
                method, grad_fn, updates, params, state, known, chosen, mask
            )
            value = state.value
        else:
            got = "neither" if grad_fn is None else "both"
            remedy = (
                "Call tx.update(grads, opt_state, params, grad_fn=jax.grad(loss)), or "
                "tx.update(grads, opt_state, params, value_fn=loss)."
            )
            raise ValueError(
                _checks.message(
                    _WHO, "grad_fn", "given, or else `value_fn`", got, remedy
                )
            )
        return updates, method.advance(state, norms, value, known)

    # Optax's alias of a state does not admit NamedTuples, its own states included.
    return optax.GradientTransformationExtraArgs(
        init_fn,  # pyright: ignore[reportArgumentType]
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def _placeholder_state() -> LayerwiseSAMState:
    return LayerwiseSAMState(
        step_count=jnp.zeros((), jnp.int32),
        norms=jnp.zeros((0,)),
        mask=jnp.zeros((0,), bool),
        value=jnp.zeros(()),
        layers=StaticLayers(None, is_placeholder=True),
    )


def _check_shapes(argument: str, grads: Any, params: Any) -> None:
    """Raises unless each gradient has the shape of its parameter."""
    named = jax.tree_util.tree_leaves_with_path(params)
    for (path, w), g in zip(named, jax.tree.leaves(grads), strict=True):
        if jnp.shape(w) != jnp.shape(g):
            where = jax.tree_util.keystr(path)
            expected = f"of shape {jnp.shape(w)} at {where}, as `params`"
            remedy = "Pass the gradients of these parameters."
            raise ValueError(
                _checks.message(_WHO, argument, expected, str(jnp.shape(g)), remedy)
            )


def _clean_value(
    value_fn: Callable[..., Any] | None,
    params: Any,
    axis_name: Any,
    state: LayerwiseSAMState,
) -> jax.Array:
    if value_fn is None:
        return state.value
    value, _ = value_fn(params)
    return value if axis_name is None else jax.lax.pmean(value, axis_name)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and len(output) == 2 else output


def _from_value_fn(
    method: LayerwiseSAM,
    value_fn: Callable[..., Any],
    params: Any,
    state: LayerwiseSAMState,
    layers: Layers,
    selection: Any,
    mask: jax.Array | None,
) -> tuple[Any, jax.Array, jax.Array]:
    out = _gradient.value_and_grad(
        lambda p: value_fn(p)[0],
        selection,
        rho=method.rho_at(state.step_count),
        alpha=method.alpha_at(state.step_count),
        normalize=method.normalize,
        layers=layers,
        axis_name=method.axis_name,
    )(params, mask=mask)
    return out.grads, out.norms, out.value


def _from_grad_fn(
    method: LayerwiseSAM,
    grad_fn: Callable[..., Any],
    grads: Any,
    params: Any,
    state: LayerwiseSAMState,
    layers: Layers,
    chosen: tuple[int, ...],
    mask: jax.Array | None,
) -> tuple[Any, jax.Array]:
    _gradient.check_mask(_WHO, mask, layers)
    weights, treedef = jax.tree.flatten(params)
    clean = jax.tree.leaves(grads)
    selected = [i for i, layer in enumerate(layers.leaf_layer) if layer in set(chosen)]
    active = [None if mask is None else mask[layers.leaf_layer[i]] for i in selected]
    ascent = [clean[i] for i in selected]
    scale = _perturbation.radius_scale(
        method.normalize, method.rho_at(state.step_count), ascent, active, clean
    )
    moved = _perturbation.perturb([weights[i] for i in selected], ascent, scale, active)
    point = list(weights)
    for i, leaf in zip(selected, moved, strict=True):
        point[i] = leaf
    perturbed = _call(grad_fn, jax.tree.unflatten(treedef, point))
    descent = layers.flatten(_WHO, "grad_fn", perturbed)
    _check_shapes("grad_fn", perturbed, params)
    alpha = method.alpha_at(state.step_count)
    combined = _perturbation.combine(
        ascent, [descent[i] for i in selected], alpha, active
    )
    final = list(descent)
    for i, leaf in zip(selected, combined, strict=True):
        final[i] = leaf
    final = [x.astype(g.dtype) for x, g in zip(final, clean, strict=True)]
    updates = jax.tree.unflatten(jax.tree.structure(grads), final)
    return updates, layers.norms(perturbed)


def _call(grad_fn: Callable[..., Any], params: Any) -> Any:
    """Calls with one argument if the function takes one, else as optax.contrib.sam."""
    try:
        inspect.signature(grad_fn).bind(params)
    except TypeError:
        return grad_fn(params, 0)
    except ValueError:  # no signature to read
        return grad_fn(params)
    return grad_fn(params)
