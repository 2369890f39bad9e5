"""The functional form: the gradient of a method at given parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks
from .._axes import combine as _combine, shape as _shape
from .._axes.which import everything
from .._engine.cover import Cover, static_selection
from .._engine.layers import Layers, refuse_non_arrays, Rule
from .._method import Method
from . import passes as _passes
from .plan import direction_of, LayerwiseGrad, Plan, remember


_WHO = "lwsam.value_and_grad"


def value_and_grad(
    loss_fn: Callable[..., Any],
    selection: tuple[str, ...] | Cover,
    *,
    method: Method | None = None,
    rho: Any = None,
    alpha: Any = None,
    normalize: str = "none",
    rule: Rule | None = None,
    layers: Layers | None = None,
    has_aux: bool = False,
    aux_from: str = "clean",
    axis_name: Any = None,
) -> Callable[..., LayerwiseGrad]:
    r"""Returns a function that evaluates the gradient of a method.

    With the ascent direction $a$ (most often $g = \nabla L(w)$), the perturbation is
    $\epsilon_l = \rho\,s(a)_l$ for the selected layers $l$, zero for the others. With
    $\hat g = \nabla L(w + \epsilon)$ the method's `combine` gives the gradient; that of
    layer-wise SAM is

    $$d_l = (1 - \alpha)\,g_l + \alpha\,\hat g_l \text{ if } l \text{ is selected, else }
    \hat g_l.$$

    What no selected parameter reaches is computed once for both passes, forward and
    backward, and the ascent stops at the input-most selected layer.

    Args:
      loss_fn: `loss_fn(params, *args)`, a real scalar or `(scalar, aux)`. Must be pure.
      selection: Static. A tuple of layer names perturbs exactly these; a `Cover`
        perturbs those of its layers that the mask names; an empty one is the plain
        gradient.
      method: A `Method` whose parts keep no state; its `select` and `when` are not read.
        None: layer-wise SAM of the next three arguments.
      rho: Radius in units of the parameters, >= 0, a float or a traced scalar. A Python
        0 is the plain gradient. With `method` it replaces the method's.
      alpha: Weight of the perturbed gradient, >= 0, a float or a traced scalar. With
        `method` it replaces that of its `combine`.
      normalize: Without `method`. `"none"`: $\epsilon = \rho g$ (Eq. 3, 6).
        `"selected"`: $\rho g / \|g_{w'}\|$ over the perturbed leaves. `"full"`:
        $\rho g / \|g\|$ over all leaves (Eq. 2), at the cost of a whole ascent backward
        pass.
      rule: What a layer is; `lwsam.weights` by default.
      layers: The layers, if known already; then `rule` is not read.
      has_aux: Whether the loss returns `(scalar, aux)`.
      aux_from: `"clean"` or `"perturbed"`: the pass whose aux is returned.
      axis_name: Mapped axis (or axes) inside `pmap` or `shard_map` over which values and
        gradients are averaged. The aux is not.

    Returns:
      `function(params, *args, mask=None, ascent_args=None, key=None, loss_scale=None) ->
      LayerwiseGrad`. The mask, bool[L] in pytree order, picks among the layers of a cover
      at run time; None picks all of them. `ascent_args` is what the ascent sees in place
      of `args`, a part of the batch for example. `key` is the PRNG key of `random()`.
      With a `loss_scale`, f32[], both backward passes run on gradients larger by it, and
      what comes of them is divided by it in float32: see `DynamicLossScale`.

    Raises:
      ValueError: For arguments out of range, unknown layer names, Refs in the loss, a
        method that keeps a state.
      TypeError: For a loss that is no real scalar, or parameters that are not float.

    Numerics: norms and w + epsilon in at least float32, rounded once; a zero gradient
    gives a zero perturbation.
    Cost: 1 + forward(suffix) + backward(suffix down to the input-most perturbed layer)
    plain gradients; the suffix is what depends on a selected parameter.

    Examples:
      >>> import jax.numpy as jnp, lwsam_jax as lwsam
      >>> loss = lambda p, x: jnp.sum((jnp.tanh(x @ p["w1"]) @ p["w2"]) ** 2)
      >>> params = {"w1": jnp.ones((3, 2)), "w2": jnp.ones((2, 1))}
      >>> grad = lwsam.value_and_grad(loss, ("w2",), rho=0.1, alpha=0.8)
      >>> out = grad(params, jnp.ones((1, 3)))
      >>> bool(out.perturbed_value > out.value)
      True

    References:
      Lee, Layer-wise Adaptive Gradient Norm Penalizing Method for Efficient and Accurate
      Deep Learning, KDD 2024, arXiv:2503.14205; Algorithm 1, Eq. 6.
    """
    remedy = "Pass the loss, loss_fn(params, *args) -> scalar."
    _checks.is_callable(_WHO, "loss_fn", loss_fn, remedy)
    _checks.choice(_WHO, "aux_from", aux_from, _checks.AUX_FROM)
    if method is None:
        method = _layerwise(rho, alpha, normalize, rule, layers)
    else:
        _check_method(method, normalize, alpha)
        rule, layers = rule or method.rule, layers or method.layers
        axis_name = axis_name or method.axis_name
        rho = method.rho if rho is None else rho
        alpha = method.combine.alpha if alpha is None else alpha
    _checks.rho(_WHO, rho)
    if alpha is not None:
        _checks.alpha(_WHO, alpha)
    if callable(rho) or callable(alpha):
        remedy = "Pass rho= and alpha= of the step: schedule(step)."
        expected, got = "a number or a traced scalar", "a schedule"
        raise _checks.type_error(_WHO, "rho", expected, got, remedy)
    loss_fn = scalar_loss(_WHO, "loss_fn", loss_fn, has_aux)

    def gradient(
        params: Any,
        *args: Any,
        mask: Any = None,
        ascent_args: tuple[Any, ...] | None = None,
        key: jax.Array | None = None,
        loss_scale: Any = None,
    ) -> LayerwiseGrad:
        loss = lambda p: loss_fn(p, *args)
        if layers is None:
            refuse_non_arrays(params)
            refuse_integers(_WHO, params)
            traced = _passes.trace_loss(loss, params, axis_name)
            known = Layers.of_traced(params, rule, traced)
        else:
            traced, known = None, layers
            known.flatten(_WHO, "params", params)
            refuse_integers(_WHO, params)
        chosen, is_cover = static_selection(_WHO, selection, known)
        if mask is not None and not is_cover:
            remedy = "A tuple perturbs exactly its layers; pass lwsam.Cover(names)."
            raise _checks.type_error(_WHO, "mask", "None for a tuple", "a mask", remedy)
        check_mask(_WHO, mask, known)
        plain = not chosen or (_checks.is_number(rho) and rho == 0)
        plan = Plan(
            layers=known,
            chosen=() if plain else chosen,
            mask=mask,
            rho=rho,
            alpha=alpha,
            shape=method.shape,
            combine=method.combine,
            aux_from=aux_from,
            axis_name=axis_name,
            scale=None if loss_scale is None else jnp.asarray(loss_scale, jnp.float32),
        )
        memory = remember(method, known, params)
        if jax.tree.leaves(memory):
            remedy = "Use lwsam.TrainStep or lwsam.as_optax, which keep it."
            expected = "one whose parts keep no state"
            got = "one that does"
            raise _checks.value_error(_WHO, "method", expected, got, remedy)
        direction = None
        if method.is_stale and not plain:
            direction = _direction(method, params, key)
        elif ascent_args is None and not plain and method.ascent.cut is not None:
            remedy = "Pass ascent_args=, what the ascent sees in place of `args`."
            got = "left out, with an ascent on a part of the batch"
            raise _checks.type_error(_WHO, "ascent_args", "given", got, remedy)
        out, _ = _passes.evaluate(
            plan,
            memory,
            loss,
            params,
            ascent_loss=None
            if ascent_args is None
            else lambda p: loss_fn(p, *ascent_args),
            direction=direction,
            traced=traced,
        )
        return out

    return gradient


def _layerwise(rho: Any, alpha: Any, normalize: str, rule: Any, layers: Any) -> Method:
    """Returns layer-wise SAM; which layers and when is not read."""
    _checks.choice(_WHO, "normalize", normalize, _checks.NORMALIZE)
    _checks.rho(_WHO, rho)
    _checks.alpha(_WHO, alpha)
    return Method(
        everything(),
        rho=rho,
        shape=_shape.BY_NORMALIZE[normalize](),
        combine=_combine.mix(alpha),
        rule=rule,
        layers=layers,
    )


def _check_method(method: Any, normalize: str, alpha: Any) -> None:
    if not isinstance(method, Method):
        remedy = "Pass a lwsam.Method, such as lwsam.sam(0.05)."
        raise _checks.type_error(_WHO, "method", "a Method", repr(method), remedy)
    if normalize != "none":
        remedy = "Leave it out: the method has a shape."
        raise _checks.value_error(
            _WHO, "normalize", "left out", repr(normalize), remedy
        )
    if alpha is not None and method.combine.alpha is None:
        remedy = "Leave it out, or pass a method with combine=lwsam.mix(0.8)."
        expected = "None, for the method's `combine` has no weight"
        raise _checks.value_error(_WHO, "alpha", expected, alpha, remedy)
    for name in ("descent", "split", "max_overhead", "mean_overhead"):
        if getattr(method, name) is not None:
            remedy = "Use lwsam.TrainStep."
            got = f"one with `{name}`"
            raise _checks.value_error(_WHO, "method", "one without", got, remedy)


def _direction(method: Method, params: Any, key: jax.Array | None) -> Any:
    kept = method.ascent.init(params, None)
    if jax.tree.leaves(kept):
        remedy = (
            "Use lwsam.TrainStep, lwsam.as_optax or lwsam.perturbed, which keep it."
        )
        expected, got = "an ascent that keeps no state", "one that does"
        raise _checks.value_error(_WHO, "method", expected, got, remedy)
    if key is None:
        remedy = "Pass key=, a PRNG key of the step."
        raise _checks.type_error(_WHO, "key", "a PRNG key", None, remedy)
    return direction_of(method, kept, None, params, key)


def check_mask(who: str, mask: Any, layers: Layers) -> None:
    """Raises unless a mask has one bool for each layer: an index too large is clamped."""
    if mask is None:
        return
    dtype, shape = getattr(mask, "dtype", type(mask).__name__), jnp.shape(mask)
    if dtype != jnp.bool_ or shape != (len(layers),):
        remedy = "Take the mask of a state that was made for these parameters."
        expected = f"bool[{len(layers)}], one for each layer"
        raise _checks.value_error(
            who, "mask", expected, f"{dtype}{list(shape)}", remedy
        )


def scalar_loss(
    who: str, argument: str, loss_fn: Callable[..., Any], has_aux: bool
) -> Callable[..., Any]:
    """Wraps a loss so that it returns (real scalar, aux or None), or raises."""

    @functools.wraps(loss_fn)
    def wrapped(*args):
        output = loss_fn(*args)
        if has_aux and not (isinstance(output, tuple) and len(output) == 2):
            remedy = "Return (loss, aux), or pass has_aux=False."
            got = f"a {type(output).__name__}"
            raise _checks.type_error(
                who, argument, "a function to (scalar, aux)", got, remedy
            )
        value, aux = output if has_aux else (output, None)
        if isinstance(value, (tuple, list, dict)) or value is None:
            remedy = "Return a scalar; pass has_aux=True for (scalar, aux)."
            got = f"a {type(value).__name__}"
            raise _checks.type_error(
                who, argument, "a function to a scalar", got, remedy
            )
        value = jnp.asarray(value)
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            got = f"{value.dtype}{list(value.shape)}"
            remedy = "Reduce it, for instance with jnp.mean, and take its real part."
            raise _checks.type_error(
                who, argument, "a function to a real scalar", got, remedy
            )
        return value, aux

    return wrapped


def refuse_integers(who: str, params: Any) -> None:
    """Raises on parameters that have no gradient."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            got = f"{dtype or type(leaf).__name__} at {jax.tree_util.keystr(path)}"
            remedy = (
                "Take it out of params and pass it to the loss as another argument."
            )
            raise _checks.type_error(
                who, "params", "of float or complex arrays", got, remedy
            )
