"""How sharp a loss is at given parameters: curvature, and what moving away costs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .. import _checks, _tree
from .._axes.moments import first_moment
from .._engine.layers import Layers
from .._engine.rules import Rule
from .._loops.functional import refuse_integers, scalar_loss
from .lanczos import largest


_WHO = "lwsam.sharpness"


class Measures(NamedTuple):
    """What is measured of all parameters together, or of each layer by itself.

    Arrays begin with an axis of L layers in the second case. The unit of a gap is that
    of the loss; that of an eigenvalue is the loss's over the square of the parameters'.

    Attributes:
      eigenvalues: f32[..., n], the largest of the Hessian, or of its diagonal block;
        largest first, 0 for those that a layer of few parameters has not.
      residuals: f32[..., n], how far off an eigenvalue may be.
      m_sharpness: f32[...], mean over the groups of m examples of the gap along each
        group's own gradient.
      gradient: f32[...], gap along the gradient of the whole batch.
      momentum: f32[...], gap along minus the momentum; None without one.
      random: f32[...], mean gap along Gaussian directions.
    """

    eigenvalues: jax.Array
    residuals: jax.Array
    m_sharpness: jax.Array
    gradient: jax.Array
    momentum: Any
    random: jax.Array


class Sharpness(NamedTuple):
    """What `lwsam.sharpness` returns.

    Attributes:
      value: f32[], the loss at the parameters.
      whole: `Measures` of all parameters together, those of no layer included.
      layers: `Measures` of each layer alone, the others at rest.
      names: Names of the layers, in pytree order.
    """

    value: jax.Array
    whole: Measures
    layers: Measures
    names: tuple[str, ...]


def sharpness(
    loss_fn: Callable[..., Any],
    params: Any,
    batch: Any,
    *args: Any,
    rho: float = 0.05,
    m: int | None = None,
    eigenvalues: int = 1,
    iterations: int = 32,
    samples: int = 8,
    opt_state: Any = None,
    rule: Rule | None = None,
    key: jax.Array | None = None,
) -> Sharpness:
    r"""Measures how sharp a loss is at its parameters, as a whole and layer by layer.

    A gap along a direction d is $L(w + \rho\,d / \|d\|) - L(w)$; of a layer, with d zero
    outside it and its own norm. The m-sharpness is the mean over the batch in groups of m
    examples,

    $$\frac{m}{n} \sum_g \max_{\|\epsilon\| \le \rho} L_g(w + \epsilon) - L_g(w),$$

    with the maximum taken at SAM's first-order solution
    $\epsilon = \rho\,\nabla L_g(w) / \|\nabla L_g(w)\|$, so from below. The eigenvalues
    are the largest, with their sign, of $\nabla^2 L(w)$ and of its diagonal blocks, by
    Lanczos on Hessian-vector products. It compiles by itself, and runs under `jit` too.

    Args:
      loss_fn: `loss_fn(params, batch, *args)`, a real scalar, a mean over the batch.
        Evaluated as in a test: pass what has no dropout and fixed BatchNorm statistics.
      params: Parameter tree of real float arrays; measured in at least float32.
      batch: Tree of arrays whose first axis is the batch; scalars belong to each group.
      *args: Further arguments of the loss, of no batch.
      rho: Radius of the gaps, > 0, in the unit of the parameters.
      m: Examples in a group, a divisor of the batch; None: the whole batch is one.
      eigenvalues: How many.
      iterations: Lanczos iterations, each of which keeps a vector of all parameters.
      samples: Random directions.
      opt_state: State of the base optimizer, in which the momentum is found.
      rule: What a layer is; `lwsam.weights` by default.
      key: PRNG key of what is drawn; that of seed 0 by default.

    Returns:
      A `Sharpness`.

    Raises:
      ValueError: For numbers out of range; an m that does not divide the batch; an
        optimizer state without a momentum; as `Layers.of`.
      TypeError: For parameters that are not real floats; as `lwsam.value_and_grad`.

    Cost: with L layers, (L + 1) Lanczos runs of `iterations` Hessian-vector products,
    about four plain gradients each, and (L + 1)(n / m + samples + 2) forward passes.

    Examples:
      >>> import jax.numpy as jnp, lwsam_jax as lwsam
      >>> loss = lambda p, x: jnp.mean((x @ p["w"]) ** 2)
      >>> found = lwsam.sharpness(loss, {"w": jnp.ones((2, 1))}, jnp.eye(2), m=1)
      >>> found.whole.eigenvalues.round(3).tolist(), found.names
      ([1.0], ('w',))

    References:
      Foret et al., ICLR 2021, arXiv:2010.01412: the gap along the gradient is Eq. 2;
      m-sharpness and Hessian spectra in its section 4. Lanczos: Golub and Van Loan,
      Matrix Computations, chapter 10.
    """
    _check(rho, m, eigenvalues, iterations, samples)
    remedy = "Pass the loss, loss_fn(params, batch, *args) -> scalar."
    _checks.is_callable(_WHO, "loss_fn", loss_fn, remedy)
    refuse_integers(_WHO, params)
    Layers.of(params, rule)  # refuses what is no parameter before it is traced
    moment = None if opt_state is None else first_moment(opt_state, params)
    if opt_state is not None and moment is None:
        remedy = "Pass that of an optimizer with a momentum, or leave it out."
        expected = "one that holds a first moment"
        raise _checks.value_error(_WHO, "opt_state", expected, "one without", remedy)
    leaves = jax.tree.leaves(params)
    size = sum(x.size for x in leaves)
    if any(jnp.iscomplexobj(x) for x in leaves):
        remedy = "Pass real and imaginary part as two arrays."
        expected = "of real float arrays"
        raise _checks.type_error(_WHO, "params", expected, "complex ones", remedy)
    if eigenvalues > size:
        expected = f"<= {size}, the number of parameters"
        raise _checks.value_error(
            _WHO, "eigenvalues", expected, eigenvalues, "Ask for fewer."
        )
    groups = _in_groups(batch, m)
    loss_fn = scalar_loss(_WHO, "loss_fn", loss_fn, has_aux=False)
    layers = Layers.of(params, rule, loss_fn, batch, *args)
    measure = functools.partial(
        _measure,
        loss_fn,
        layers,
        rho=rho,
        count=eigenvalues,
        iterations=min(max(iterations, eigenvalues), size),
        samples=samples,
    )
    key = jax.random.key(0) if key is None else key
    value, found = jax.jit(measure)(params, batch, groups, args, moment, key)
    whole = jax.tree.map(lambda x: x[0], found)
    return Sharpness(value, whole, jax.tree.map(lambda x: x[1:], found), layers.names)


def _measure(
    loss_fn: Callable[..., Any],
    layers: Layers,
    params: Any,
    batch: Any,
    groups: Any,
    args: tuple[Any, ...],
    moment: Any,
    key: jax.Array,
    *,
    rho: float,
    count: int,
    iterations: int,
    samples: int,
) -> tuple[jax.Array, Measures]:
    """Returns the loss, and the measures with an axis of 1 + L in front."""
    wide = jax.tree.map(lambda x: _tree.wide(jnp.asarray(x)), params)
    point, unravel = ravel_pytree(wide)
    layer_of = _layer_of_elements(layers, wide)
    parts = jnp.arange(-1, len(layers))  # -1 stands for all of them
    only = lambda part: ((part < 0) | (layer_of == part)).astype(point.dtype)
    on = lambda examples: lambda w: loss_fn(unravel(w), examples, *args)[0]
    whole = on(batch)
    value, gradient = jax.value_and_grad(whole)(point)
    _, product = jax.linearize(jax.grad(whole), point)
    keys = jax.random.split(key, 1 + samples)
    backward = None
    if moment is not None:
        backward = -ravel_pytree(moment)[0].astype(point.dtype)

    def gap(loss, clean, direction):
        scale = rho * _tree.reciprocal(_tree.norm([direction]))
        return loss(point + scale * direction) - clean

    def of_group(group):
        loss = on(group)
        clean, own = jax.value_and_grad(loss)(point)
        return jax.lax.map(lambda part: gap(loss, clean, only(part) * own), parts)

    def of_part(part):
        mask = only(part)
        found, residuals = largest(product, mask, count, iterations, keys[0])
        along = lambda d: gap(whole, value, mask * d)
        noise = lambda key: jax.random.normal(key, point.shape, point.dtype)
        drawn = jax.lax.map(lambda key: along(noise(key)), keys[1:])
        stale = None if backward is None else along(backward)
        return found, residuals, along(gradient), stale, jnp.mean(drawn)

    found, residuals, climbed, stale, drawn = jax.lax.map(of_part, parts)
    own = jnp.mean(jax.lax.map(of_group, groups), axis=0)
    return value, Measures(found, residuals, own, climbed, stale, drawn)


def _layer_of_elements(layers: Layers, params: Any) -> jax.Array:
    """Returns int32[n], to which layer each element belongs, or -1."""
    leaves, treedef = jax.tree.flatten(params)
    numbers = jnp.arange(len(layers), dtype=jnp.int32)
    own = [jnp.full(x.shape, -1, jnp.int32) for x in leaves]
    for i in layers.member_leaves:
        own[i] = jnp.broadcast_to(layers.at_leaf(numbers, i), own[i].shape)
    return ravel_pytree(jax.tree.unflatten(treedef, own))[0]


def _in_groups(batch: Any, m: int | None) -> Any:
    """Returns the batch with one more axis in front, of groups of m examples."""
    named = jax.tree_util.tree_leaves_with_path(batch)
    sizes = {jnp.shape(x)[0] for _, x in named if jnp.ndim(x)}
    if len(sizes) != 1:
        remedy = "Pass what is no batch as a further argument of the loss."
        expected = "arrays with one first axis, the examples"
        got = f"first axes of {sorted(sizes)}"
        raise _checks.value_error(_WHO, "batch", expected, got, remedy)
    (n,) = sizes
    size = n if m is None else m
    if size > n or n % size:
        remedy = "Pass a divisor of it, such as 1, or another batch."
        raise _checks.value_error(_WHO, "m", f"a divisor of the batch {n}", m, remedy)
    count = n // size
    group = lambda x: (
        jnp.reshape(x, (count, size, *jnp.shape(x)[1:]))
        if jnp.ndim(x)
        else jnp.broadcast_to(x, (count,))
    )
    return jax.tree.map(group, batch)


def _check(rho: Any, m: Any, eigenvalues: Any, iterations: Any, samples: Any) -> None:
    _checks.rho(_WHO, rho)
    if not _checks.is_number(rho) or rho == 0:
        remedy = "Pass the radius of the gaps, such as 0.05."
        raise _checks.value_error(_WHO, "rho", "a number > 0", repr(rho), remedy)
    numbers = {
        "m": 1 if m is None else m,
        "eigenvalues": eigenvalues,
        "iterations": iterations,
        "samples": samples,
    }
    for name, x in numbers.items():
        remedy = "Pass a number of 1 or more."
        _checks.count(_WHO, name, x, remedy)
        if x < 1:
            raise _checks.value_error(_WHO, name, ">= 1", x, remedy)
