"""Losses over a stack of blocks, in every way that people write it, and their FLOPs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval


LENGTH, WIDTH = 4, 3
HYPER = {"rho": 0.3, "alpha": 0.7}


def flops(fn, *args):
    """FLOPs of the matrix products of a function, those in a scan times its length."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _products(needed)


def _products(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
            total += 2 * eqn.outvars[0].aval.size * inner
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                body = getattr(item, "jaxpr", item)
                if hasattr(body, "eqns"):
                    total += times * _products(body)
    return total


def mlp_body(x, w):
    h = jnp.tanh(x @ w["up"] + w["bias"])
    return x + h @ w["down"], jnp.mean(h)


def run(x, blocks, **options):
    return jax.lax.scan(mlp_body, x, blocks, **options)


def finish(params, x, *more):
    return jnp.mean((x @ params["head"]) ** 2), more


LOSSES = {}


def loss_of(make):
    LOSSES[make.__name__] = make
    return make


@loss_of
def with_outputs_of_each(params, x):
    """The outputs of each index reach aux and value."""
    x, means = run(x @ params["stem"], params["blocks"])
    value, _ = finish(params, x)
    return value + jnp.sum(means * jnp.arange(LENGTH)), means


@loss_of
def reverse(params, x):
    x, means = run(x @ params["stem"], params["blocks"], reverse=True)
    return finish(params, x, means)


@loss_of
def unrolled_in_pairs(params, x):
    return finish(params, run(x @ params["stem"], params["blocks"], unroll=2)[0])


@loss_of
def remat_of_each(params, x):
    body = jax.checkpoint(mlp_body)
    return finish(params, jax.lax.scan(body, x @ params["stem"], params["blocks"])[0])


@loss_of
def jitted_blocks_with_dropout(params, x):
    """The slices of what is no parameter: keys, and numbers of the loss itself."""
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), LENGTH)

    def body(x, inputs):
        w, key, scale = inputs
        y, _ = jax.jit(mlp_body)(x, w)
        return jnp.where(jax.random.bernoulli(key, 0.8, y.shape), y * scale, x), None

    inputs = (params["blocks"], keys, jnp.linspace(0.5, 1.0, LENGTH))
    return finish(params, jax.lax.scan(body, x @ params["stem"], inputs)[0])


@loss_of
def views_of_the_stack(params, x):
    """A cast, a scale, and a factor for each output."""
    blocks = dict(params["blocks"])
    blocks["up"] = (2.0 * blocks["up"]).astype(x.dtype) * params["stem"][0, 0]
    blocks["down"] = blocks["down"] * (1.0 + blocks["bias"])[:, None, :]
    return finish(params, run(x @ params["stem"], blocks)[0])


@loss_of
def two_towers(params, x):
    """Two scans over one stack, neither behind the other."""
    one, _ = run(x @ params["stem"], params["blocks"])
    two, _ = run(jnp.sin(x), params["blocks"])
    return finish(params, one * two)


@loss_of
def twice_through_the_stack(params, x):
    """What comes to the second scan depends on the first."""
    x, _ = run(x @ params["stem"], params["blocks"])
    return finish(params, run(x, params["blocks"], reverse=True)[0])


@loss_of
def penalty_on_the_whole_stack(params, x):
    x, _ = run(x @ params["stem"], params["blocks"])
    value, _ = finish(params, x)
    return value + 0.1 * jnp.sum(params["blocks"]["up"] ** 2), ()


@loss_of
def remat_around_the_scan(params, x):
    """It stays whole; right, if dearer."""
    through = jax.checkpoint(lambda x, blocks: run(x, blocks)[0])
    return finish(params, through(x @ params["stem"], params["blocks"]))


@loss_of
def accumulated(params, x):
    """A scan over micro-batches around it stays whole."""
    micro = lambda total, x: (total + with_outputs_of_each(params, x)[0], None)
    batches = jnp.stack([x, jnp.sin(x)])
    return jax.lax.scan(micro, jnp.zeros((), x.dtype), batches)[0], ()


@loss_of
def in_a_branch(params, x):
    """A scan inside a `cond` is not looked for."""
    through = lambda x, blocks: run(x, blocks)[0]
    x = x @ params["stem"]
    args = x, params["blocks"]
    return finish(params, jax.lax.cond(x[0, 0] < 9, through, lambda x, _: x, *args))


@loss_of
def no_view(params, x):
    """Each slice depends on the whole stack."""
    blocks = jax.tree.map(lambda w: w / jnp.linalg.norm(w), params["blocks"])
    return finish(params, run(x @ params["stem"], blocks)[0])


def mlp_params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / WIDTH**0.5)
    stack = {"up": draw(LENGTH, WIDTH, WIDTH), "down": draw(LENGTH, WIDTH, WIDTH)}
    stack["bias"] = draw(LENGTH, WIDTH)
    return {"stem": draw(WIDTH, WIDTH), "blocks": stack, "head": draw(WIDTH, 2)}
