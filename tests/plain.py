"""The plain two-gradient form of the method in JAX, and how trees are compared.

What the library is measured against wherever NumPy cannot go (Flax, scan, attention):
two calls of `jax.value_and_grad`, nothing split, nothing shared with the library.
"""

import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lwsam_jax as lwsam


def enable_x64(new_value):
    """The context manager, which moved between JAX 0.7 and 0.10."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(new_value)
    from jax.experimental import enable_x64 as older

    return older(new_value)


class Plain(NamedTuple):
    value: Any
    aux: Any
    grads: Any
    norms: Any
    perturbed_value: Any
    perturbed_aux: Any


_NOT_WEIGHTS = ("bias", "b", "scale", "offset", "gamma", "beta")


def layer_of_leaves(params, stack=None) -> list[str | tuple[str, ...] | None]:
    """The layer of each leaf under the default rule, leaf by leaf.

    Those of each index where `stack`, a regular expression, is found in the path.
    """
    names = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [k for k in path if getattr(k, "name", None) != "value"]
        words = [
            str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))))
            for k in keys
        ]
        is_stack = stack is not None and re.search(stack, "/".join(words))
        if leaf.ndim - bool(is_stack) < 2 or words[-1] in _NOT_WEIGHTS:
            names.append(None)
            continue
        name = "/".join(words[:-1] if words[-1] == "kernel" else words)
        slices = tuple(f"{name}/{i}" for i in range(leaf.shape[0]))
        names.append(slices if is_stack else name)
    return names


def _parts(leaf, name):
    """The leaf with its name, or the slices of a stack with theirs."""
    return list(zip(name, leaf, strict=True)) if type(name) is tuple else [(name, leaf)]


def _where(name, selected, leaf):
    """Where a leaf is selected, to broadcast to it."""
    if type(name) is not tuple:
        return name is not None and name in selected
    on = np.array([own in selected for own in name])
    return on.reshape(-1, *[1] * (leaf.ndim - 1))


def global_norm(leaves):
    return jnp.sqrt(sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in leaves))


def two_gradients(
    loss_fn,
    params,
    args=(),
    selected=(),
    *,
    rho=0.1,
    alpha=0.8,
    normalize="none",
    has_aux=True,
    leaf_layers=None,
) -> Plain:
    """Lines 5 to 7 of Algorithm 1 with two whole gradients."""
    names = layer_of_leaves(params) if leaf_layers is None else leaf_layers
    listed = [n if type(n) is tuple else (n,) for n in names if n is not None]
    order = list(dict.fromkeys(name for own in listed for name in own))
    grad_fn = jax.value_and_grad(loss_fn, has_aux=has_aux)
    value, ascent = grad_fn(params, *args)
    value, aux = value if has_aux else (value, None)
    flat, treedef = jax.tree.flatten(params)
    ascent = treedef.flatten_up_to(ascent)
    chosen = [_where(n, selected, w) for n, w in zip(names, flat, strict=True)]
    picked = [
        jnp.where(on, g, 0) for g, on in zip(ascent, chosen, strict=True) if np.any(on)
    ]
    radius = rho
    if normalize != "none" and picked:
        norm = global_norm(picked if normalize == "selected" else ascent)
        radius = jnp.where(norm > 0, rho / norm, 0)  # a gradient of 0 moves nothing
    moved = [
        jnp.where(on, w + radius * g, w) if np.any(on) else w
        for w, g, on in zip(flat, ascent, chosen, strict=True)
    ]
    perturbed_value, descent = grad_fn(treedef.unflatten(moved), *args)
    perturbed_value, perturbed_aux = (
        perturbed_value if has_aux else (perturbed_value, None)
    )
    descent = treedef.flatten_up_to(descent)
    mixed = [
        jnp.where(on, (1 - alpha) * g + alpha * d, d) if np.any(on) else d
        for g, d, on in zip(ascent, descent, chosen, strict=True)
    ]
    slices = [x for d, of in zip(descent, names, strict=True) for x in _parts(d, of)]
    norms = [global_norm([d for of, d in slices if of == name]) for name in order]
    return Plain(
        value,
        aux,
        treedef.unflatten(mixed),
        jnp.stack(norms).astype(jnp.float32),
        perturbed_value,
        perturbed_aux,
    )


def _numeric(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    leaf = np.asarray(leaf)
    if leaf.dtype.kind in "biu" or leaf.dtype.kind == "c":
        return leaf
    return leaf.astype(np.float64)


def assert_close(actual, expected, rtol=1e-6, same_dtypes=True):
    """Equal structures, shapes and dtypes, and each leaf equal to `rtol` in norm.

    Relative to the leaf's norm, or to a tenth of the tree's where that is larger: the
    gradient of a bias under a BatchNorm is rounding and nothing else.
    """
    chex.assert_trees_all_equal_structs(actual, expected)
    if same_dtypes:
        chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    pairs = [
        (jax.tree_util.keystr(path), _numeric(a), _numeric(b))
        for (path, a), b in zip(
            jax.tree_util.tree_flatten_with_path(actual)[0],
            jax.tree.leaves(expected),
            strict=True,
        )
    ]
    floats = [b for _, _, b in pairs if b.dtype.kind in "fc"]
    tree = np.sqrt(sum(np.sum(np.abs(b) ** 2) for b in floats)) if floats else 0.0
    for path, a, b in pairs:
        if b.dtype.kind in "biu":
            np.testing.assert_array_equal(a, b, err_msg=path)
            continue
        scale = max(np.linalg.norm(b.ravel()), 0.1 * tree)
        error = np.linalg.norm((a - b).ravel())
        assert error <= rtol * scale, f"{path}: {error} > {rtol} * {scale}"


def depth_order(params, layers) -> tuple[str, ...]:
    """Layer names from the input to the output, seen from outside.

    At step 0 all norms are 0 and ties go to the deepest layers, so that top-k names the
    k deepest.
    """
    order: list[str] = []
    for k in range(1, len(layers) + 1):
        tx = lwsam.layerwise_sam(k=k, rho=0.1, alpha=0.8, layers=layers)
        names = lwsam.selection(tx.init(params))
        order.extend(name for name in names if name not in order)
    return tuple(reversed(order))


def take_step(tx, loss_fn, params, opt_state, *, form="value_fn", selection=None, **kw):
    """One step of an Optax chain around `layerwise_sam`, in either of its forms."""
    grads = jax.grad(loss_fn)(params)
    extra = {form: jax.grad(loss_fn) if form == "grad_fn" else loss_fn}
    updates, opt_state = tx.update(
        grads, opt_state, params, selection=selection, **extra, **kw
    )
    return optax.apply_updates(params, updates), opt_state


def says(error, argument, *words):
    """The message names the argument in backticks, what came, and then advises."""
    text = str(error.value)
    assert f"`{argument}`" in text, text
    for word in words:
        assert word in text, text
    advice = re.search(r"\bgot .*?\. (?P<advice>[A-Z0-9].*)", text, re.DOTALL)
    assert advice, text
    assert len(advice["advice"].split()) >= 4, text
