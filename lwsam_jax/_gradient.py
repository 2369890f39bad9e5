"""The layer-wise penalized gradient: Algorithm 1, lines 5 to 9, and Eq. 6."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _checks, _perturbation, _split
from ._layers import Layers, Rule
from ._selection import Cover, static_selection


class LayerwiseGrad(NamedTuple):
    """What one evaluation of the penalized gradient returns.

    Attributes:
      value: Loss at the parameters, L(w).
      aux: Auxiliary output of the loss, of the pass that `aux_from` names, or None.
      grads: Penalized gradient (Eq. 6), structured as the parameters.
      norms: f32[L], norms of the gradient at the perturbed point (Algorithm 1, line 9).
      perturbed_value: Loss at the perturbed point; `value` where nothing is perturbed.
    """

    value: jax.Array
    aux: Any
    grads: Any
    norms: jax.Array
    perturbed_value: jax.Array


class Passes(NamedTuple):
    """Both gradients of the leaves that may be perturbed; none in a plain step.

    Attributes:
      selected: Their places among the leaves of the parameters.
      ascent: Gradient at the parameters, for each of them.
      descent: Gradient at the perturbed point, for each of them.
    """

    selected: Sequence[int] = ()
    ascent: Sequence[jax.Array] = ()
    descent: Sequence[jax.Array] = ()


def value_and_grad(
    loss_fn: Callable[..., Any],
    selection: tuple[str, ...] | Cover,
    *,
    rho: Any,
    alpha: Any,
    normalize: str = "none",
    rule: Rule | None = None,
    layers: Layers | None = None,
    has_aux: bool = False,
    aux_from: str = "clean",
    axis_name: Any = None,
) -> Callable[..., LayerwiseGrad]:
    r"""Returns a function that evaluates the layer-wise penalized gradient.

    With $g = \nabla L(w)$ and $\epsilon_l = \rho\,g_l$ for the selected layers $l$, zero
    for the others, and $\hat g = \nabla L(w + \epsilon)$,

    $$d_l = (1 - \alpha)\,g_l + \alpha\,\hat g_l \text{ if } l \text{ is selected, else }
    \hat g_l.$$

    What no selected parameter reaches is computed once for both passes, forward and
    backward, and the ascent stops at the input-most selected layer.

    Args:
      loss_fn: `loss_fn(params, *args)`, a real scalar or `(scalar, aux)`. Must be pure.
      selection: Static. A tuple of layer names perturbs exactly these; a `Cover`
        perturbs those of its layers that the mask names; an empty one is the plain
        gradient.
      rho: Radius in units of the parameters, >= 0, a float or a traced scalar. A Python
        0 is the plain gradient.
      alpha: Weight of the perturbed gradient, >= 0, a float or a traced scalar.
      normalize: `"none"`: $\epsilon = \rho g$ (Eq. 3, 6). `"selected"`:
        $\rho g / \|g_{w'}\|$ over the perturbed leaves. `"full"`: $\rho g / \|g\|$ over
        all leaves (Eq. 2), at the cost of a whole ascent backward pass.
      rule: What a layer is; `lwsam.weights` by default.
      layers: The layers, if known already; then `rule` is not read.
      has_aux: Whether the loss returns `(scalar, aux)`.
      aux_from: `"clean"` or `"perturbed"`: the pass whose aux is returned.
      axis_name: Mapped axis (or axes) inside `pmap` or `shard_map` over which values and
        gradients are averaged. The aux is not.

    Returns:
      `penalized(params, *args, mask=None) -> LayerwiseGrad`. The mask, bool[L] in pytree
      order, picks among the layers of a cover at run time; None picks all of them.

    Raises:
      ValueError: For arguments out of range, unknown layer names, Refs in the loss.
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
    with_passes = value_and_passes(
        loss_fn,
        selection,
        rho=rho,
        alpha=alpha,
        normalize=normalize,
        rule=rule,
        layers=layers,
        has_aux=has_aux,
        aux_from=aux_from,
        axis_name=axis_name,
    )
    return lambda params, *args, mask=None: with_passes(params, *args, mask=mask)[0]


def value_and_passes(
    loss_fn: Callable[..., Any],
    selection: tuple[str, ...] | Cover,
    *,
    rho: Any,
    alpha: Any,
    normalize: str = "none",
    rule: Rule | None = None,
    layers: Layers | None = None,
    has_aux: bool = False,
    aux_from: str = "clean",
    axis_name: Any = None,
) -> Callable[..., tuple[LayerwiseGrad, Passes]]:
    """As `value_and_grad`; the function returns both gradients as well."""
    who = "lwsam.value_and_grad"
    remedy = "Pass the loss, loss_fn(params, *args) -> scalar."
    _checks.is_callable(who, "loss_fn", loss_fn, remedy)
    _checks.rho(who, rho)
    _checks.alpha(who, alpha)
    _checks.choice(who, "normalize", normalize, _checks.NORMALIZE)
    _checks.choice(who, "aux_from", aux_from, _checks.AUX_FROM)
    loss_fn = scalar_loss(who, "loss_fn", loss_fn, has_aux)

    def penalized(
        params: Any, *args: Any, mask: Any = None
    ) -> tuple[LayerwiseGrad, Passes]:
        known = Layers.of(params, rule) if layers is None else layers
        known.flatten(who, "params", params)
        _refuse_integers(who, params)
        chosen, is_cover = static_selection(who, selection, known)
        if mask is not None and not is_cover:
            remedy = "A tuple perturbs exactly its layers; pass lwsam.Cover(names)."
            raise TypeError(
                _checks.message(who, "mask", "None for a tuple", "a mask", remedy)
            )
        check_mask(who, mask, known)
        params = _varying(params, axis_name)
        loss = _local(lambda p: loss_fn(p, *args), params, axis_name)
        if not chosen or (_checks.is_number(rho) and rho == 0):
            return _plain(loss, params, known, axis_name), Passes()
        return _penalized(
            loss,
            params,
            known,
            chosen,
            mask,
            rho=rho,
            alpha=alpha,
            normalize=normalize,
            aux_from=aux_from,
            axis_name=axis_name,
        )

    return penalized


def check_mask(who: str, mask: Any, layers: Layers) -> None:
    """Raises unless a mask has one bool for each layer: an index too large is clamped."""
    if mask is None:
        return
    dtype, shape = getattr(mask, "dtype", type(mask).__name__), jnp.shape(mask)
    if dtype != jnp.bool_ or shape != (len(layers),):
        remedy = "Take the mask of a state that was made for these parameters."
        expected = f"bool[{len(layers)}], one for each layer"
        raise ValueError(
            _checks.message(who, "mask", expected, f"{dtype}{list(shape)}", remedy)
        )


def _plain(
    loss: Callable[[Any], Any], params: Any, layers: Layers, axis_name: Any
) -> LayerwiseGrad:
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    value, grads = _mean((value, grads), axis_name)
    return LayerwiseGrad(value, aux, grads, layers.norms(grads), value)


def _penalized(
    loss: Callable[[Any], Any],
    params: Any,
    layers: Layers,
    chosen: Sequence[int],
    mask: Any,
    *,
    rho: Any,
    alpha: Any,
    normalize: str,
    aux_from: str,
    axis_name: Any,
) -> tuple[LayerwiseGrad, Passes]:
    leaves, treedef = jax.tree.flatten(params)
    selected = [i for i, layer in enumerate(layers.leaf_layer) if layer in set(chosen)]
    others = [i for i in range(len(leaves)) if i not in set(selected)]
    active = [None if mask is None else mask[layers.leaf_layer[i]] for i in selected]
    weights = [leaves[i] for i in selected]
    parts = _split.split(_split.trace_loss(loss, params), selected)

    residuals, pull_rest, constants = jax.vjp(
        parts.prefix, [leaves[i] for i in others], has_aux=True
    )
    run = functools.partial(_run_suffix, parts.suffix, constants)

    whole: Sequence[jax.Array] = ()
    if normalize == "full":
        value, clean, ascent, residual_grads = run(weights, residuals, True)
        ascent, rest = _mean((ascent, pull_rest(residual_grads)[0]), axis_name)
        whole = [*ascent, *rest]
    else:
        value, clean, ascent, _ = run(weights, residuals, False)
        ascent = _mean(ascent, axis_name)

    scale = _perturbation.radius_scale(normalize, rho, ascent, active, whole)
    moved = _perturbation.perturb(weights, ascent, scale, active)

    perturbed_value, perturbed, descent, residual_grads = run(moved, residuals, True)
    (rest,) = pull_rest(residual_grads)
    value, perturbed_value, descent, rest = _mean(
        (value, perturbed_value, descent, rest), axis_name
    )
    combined = _perturbation.combine(ascent, descent, alpha, active)

    def assemble(of_selected):
        flat = dict(zip(selected, of_selected, strict=True))
        flat.update(zip(others, rest, strict=True))
        return jax.tree.unflatten(treedef, [flat[i] for i in range(len(leaves))])

    outputs = clean if aux_from == "clean" else perturbed
    _, aux = jax.tree.unflatten(parts.out_tree, [value, *outputs])
    norms = layers.norms(assemble(descent))
    out = LayerwiseGrad(value, aux, assemble(combined), norms, perturbed_value)
    return out, Passes(selected, ascent, descent)


def _run_suffix(
    suffix: Callable[..., Any],
    constants: Sequence[Any],
    weights: Sequence[jax.Array],
    residuals: Sequence[jax.Array],
    through_residuals: bool,
) -> tuple[jax.Array, Any, Any, Any]:
    """Returns value, other outputs, and gradients by the weights and the residuals."""
    if through_residuals:
        run = lambda w, r: suffix(w, r, constants)
        value, pull, others = jax.vjp(run, weights, residuals, has_aux=True)
        return value, others, *pull(jnp.ones_like(value))
    run = lambda w: suffix(w, residuals, constants)
    value, pull, others = jax.vjp(run, weights, has_aux=True)
    return value, others, pull(jnp.ones_like(value))[0], None


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
            raise TypeError(
                _checks.message(
                    who, argument, "a function to (scalar, aux)", got, remedy
                )
            )
        value, aux = output if has_aux else (output, None)
        if isinstance(value, (tuple, list, dict)) or value is None:
            remedy = "Return a scalar; pass has_aux=True for (scalar, aux)."
            got = f"a {type(value).__name__}"
            raise TypeError(
                _checks.message(who, argument, "a function to a scalar", got, remedy)
            )
        value = jnp.asarray(value)
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            got = f"{value.dtype}{list(value.shape)}"
            remedy = "Reduce it, for instance with jnp.mean, and take its real part."
            raise TypeError(
                _checks.message(
                    who, argument, "a function to a real scalar", got, remedy
                )
            )
        return value, aux

    return wrapped


def _refuse_integers(who: str, params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            got = f"{dtype or type(leaf).__name__} at {jax.tree_util.keystr(path)}"
            remedy = (
                "Take it out of params and pass it to the loss as another argument."
            )
            raise TypeError(
                _checks.message(
                    who, "params", "of float or complex arrays", got, remedy
                )
            )


def _varying(tree: Any, axis_name: Any) -> Any:
    """Casts to device-varying, so that gradients are not summed behind our back.

    `shard_map` with `check_vma` sums the gradients of replicated values by itself; a mean
    after that is too large by the number of devices.
    """
    if axis_name is None:
        return tree
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)

    def cast(x):
        missing = tuple(a for a in axes if a not in _varying_axes(x))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        return jax.lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]

    return jax.tree.map(cast, tree)


def _local(
    loss: Callable[[Any], Any], params: Any, axis_name: Any
) -> Callable[[Any], Any]:
    """Casts the value of a loss that averages itself to device-varying, too.

    Else, with `check_vma`, the devices would share one cotangent, and the mean over them
    would be too small by their number. Without it values carry no such type.
    """
    if axis_name is None or not any(map(_varying_axes, jax.tree.leaves(params))):
        return loss

    def local(p):
        value, aux = loss(p)
        return _varying(value, axis_name), aux

    return local


def _varying_axes(x: Any) -> frozenset[Any]:
    """Returns the mesh axes over which a value's type says that it differs."""
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):  # from JAX 0.10 on
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", ()))


def _mean(tree: Any, axis_name: Any) -> Any:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
