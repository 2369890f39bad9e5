"""Tiny losses in plain JAX, one for each thing a traced loss may contain.

A case is a loss `loss(params, *args) -> (value, aux)` with its layer names in pytree
order, the same from the input to the output, and the layers to perturb.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    loss: Callable[..., Any]
    params: Any
    args: tuple
    names: tuple[str, ...]  # in pytree order
    depth: tuple[str, ...]  # from the input to the output
    selected: tuple[str, ...]
    stack: str | None = None  # found in the paths of stacked leaves


CASES: dict[str, Callable[[], Case]] = {}
# The names run against the alphabet: pytree order is the reverse of depth.
NAMES = ("a_out", "m_mid", "z_in")
DEPTH = ("z_in", "m_mid", "a_out")


def case(make):
    CASES[make.__name__] = make
    return make


def weight(*shape, seed=0):
    scale = max(shape[-2], 1) ** -0.5
    values = np.random.default_rng([seed, *shape]).normal(size=shape) * scale
    return jnp.asarray(values, jnp.float32)


def dense(fan_in, fan_out, seed=0):
    bias = jnp.full(fan_out, 0.1, jnp.float32)  # a weak type would trace again
    return {"kernel": weight(fan_in, fan_out, seed=seed), "bias": bias}


def affine(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def data(size=6, features=4):
    return weight(size, features, seed=7)


def mlp_params():
    return {"z_in": dense(4, 5), "m_mid": dense(5, 5, 1), "a_out": dense(5, 3)}


def body1(params, x):
    return jnp.tanh(affine(params["z_in"], x))


def body(params, x):
    return jnp.tanh(affine(params["m_mid"], body1(params, x)))


def head(params, h):
    y = affine(params["a_out"], h)
    return jnp.mean(y**2), {"logits": y, "hidden": jnp.mean(h)}


def mlp_case(loss, selected=("m_mid",), args=None, params=None, **extra):
    params = {**(mlp_params() if params is None else params), **extra}
    return Case(
        loss, params, (data(),) if args is None else args, NAMES, DEPTH, selected
    )


@case
def mlp():
    return mlp_case(lambda p, x: head(p, body(p, x)))


@case
def jitted_blocks():
    layer = jax.jit(lambda w, x: jnp.tanh(affine(w, x)))

    @jax.jit
    def loss(p, x):
        return head(p, layer(p["m_mid"], layer(p["z_in"], x)))

    return mlp_case(loss)


@case
def one_jit_called_twice():
    twice = jax.jit(lambda w, x: jnp.tanh(affine(w, x)))

    def loss(p, x):
        h = twice(p["m_mid"], jnp.tanh(affine(p["z_in"], x)))
        return head(p, twice(p["m_mid"], h))

    return mlp_case(loss, ("a_out", "m_mid"))


@case
def remat_of_blocks():
    block = jax.checkpoint(lambda w, x: jnp.tanh(affine(w, x)))

    def loss(p, x):
        return head(p, block(p["m_mid"], block(p["z_in"], x)))

    return mlp_case(loss)


@case
def remat_of_the_whole_net():
    return mlp_case(jax.checkpoint(lambda p, x: head(p, body(p, x))))


@case
def remat_around_a_jitted_net():
    whole = jax.checkpoint(jax.jit(body))
    return mlp_case(lambda p, x: head(p, whole(p, x)))


@case
def scan_over_stacked_layers():
    def loss(p, x):
        h = jnp.tanh(affine(p["z_in"], x))
        step = lambda h, w: (jnp.tanh(affine(w, h)), jnp.mean(h))
        h, means = jax.lax.scan(step, h, p["m_mid"])
        value, aux = head(p, h)
        return value, {**aux, "means": means}

    stack = {"kernel": weight(3, 5, 5), "bias": jnp.zeros((3, 5))}
    made = mlp_case(loss, ("m_mid/1",), m_mid=stack)
    blocks = tuple(f"m_mid/{i}" for i in range(3))
    return made._replace(
        names=("a_out", *blocks, "z_in"),
        depth=("z_in", *blocks, "a_out"),
        stack="m_mid",
    )


@case
def scan_over_time_with_shared_weights():
    def loss(p, x):
        w_in, w_mid = p["z_in"], p["m_mid"]

        def cell(h, x_t):
            h = jnp.tanh(affine(w_in, x_t) + affine(w_mid, h))
            return h, h

        h, _ = jax.lax.scan(cell, jnp.zeros((6, 5)), jnp.stack([x, -x, 2 * x]))
        return head(p, h)

    # Both weights of the cell meet data in the same equation, the scan: the natural
    # order of their names decides.
    made = mlp_case(loss, ("a_out",))
    return made._replace(depth=("m_mid", "z_in", "a_out"))


@case
def while_loop_in_the_prefix():
    def loss(p, x):
        h = jnp.tanh(affine(p["z_in"], x))
        frozen = jax.lax.stop_gradient(h)
        below_one = lambda s: jnp.sum(s * jnp.abs(frozen)) < 40.0
        scale = jax.lax.while_loop(below_one, lambda s: s * 1.5, jnp.float32(1.0))
        return head(p, jnp.tanh(affine(p["m_mid"], h * scale)))

    return mlp_case(loss)


@case
def while_loop_on_a_perturbed_weight():
    """Spectral normalization: power iteration under stop_gradient."""

    def loss(p, x):
        w = p["m_mid"]["kernel"]
        frozen = jax.lax.stop_gradient(w)

        def iterate(state):
            count, v = state
            v = frozen.T @ (frozen @ v)
            return count + 1, v / jnp.linalg.norm(v)

        start = (0, jnp.full(5, 5**-0.5))
        _, v = jax.lax.while_loop(lambda state: state[0] < 8, iterate, start)
        sigma = jnp.linalg.norm(w @ v)
        return head(p, jnp.tanh(body1(p, x) @ (w / sigma) + p["m_mid"]["bias"]))

    return mlp_case(loss)


@case
def while_loop_whose_gradient_a_block_drops():
    """Into the loop no gradient may be asked for: JAX has none."""

    scaled = lambda w, h, scale: jnp.tanh(h @ w) * scale
    block = jax.custom_jvp(scaled)

    @block.defjvp
    def _(primals, tangents):
        frozen = lambda w, h: scaled(w, h, primals[2])
        return jax.jvp(frozen, primals[:2], tangents[:2])

    def loss(p, x):
        h = body1(p, x)
        grow = lambda s: s * 1.5
        scale = jax.lax.while_loop(lambda s: jnp.sum(s) < 40.0, grow, jnp.abs(h))
        return head(p, block(p["m_mid"]["kernel"], h, scale))

    return mlp_case(loss)


@case
def cond_over_two_layers():
    def loss(p, x):
        h = jnp.tanh(affine(p["z_in"], x))
        h = jax.lax.cond(
            jnp.sum(x) > 100.0,
            lambda h: jnp.tanh(affine(p["m_mid"], h)),
            lambda h: jnp.sin(h @ p["m_mid"]["kernel"]),
            h,
        )
        return head(p, h)

    return mlp_case(loss)


@case
def custom_vjp_rule():
    @jax.custom_vjp
    def clipped(h):
        return h

    def forward(h):
        return h, h

    def backward(h, g):
        return (jnp.clip(g, -0.01, 0.01) + 0.001 * h,)

    clipped.defvjp(forward, backward)
    loss = lambda p, x: head(
        p, clipped(jnp.tanh(affine(p["m_mid"], clipped(body1(p, x)))))
    )
    return mlp_case(loss)


@case
def custom_vjp_around_a_perturbed_weight():
    @jax.custom_vjp
    def scaled(w, x):
        return x @ w

    scaled.defvjp(
        lambda w, x: (x @ w, (w, x)),
        lambda kept, g: (kept[1].T @ g, 0.5 * g @ kept[0].T),
    )
    return mlp_case(
        lambda p, x: head(p, jnp.tanh(scaled(p["m_mid"]["kernel"], body1(p, x))))
    )


@case
def custom_jvp_rule():
    loss = lambda p, x: head(
        p, jax.nn.silu(affine(p["m_mid"], jax.nn.relu(body1(p, x))))
    )
    return mlp_case(loss)


@case
def fft_with_complex_residuals():
    def loss(p, x):
        spectrum = jnp.fft.fft(body1(p, x), axis=-1) * jnp.complex64(1 + 0.5j)
        mixed = jnp.fft.ifft(spectrum @ p["m_mid"]["kernel"], axis=-1)
        return head(p, jnp.real(mixed) + jnp.imag(mixed))

    return mlp_case(loss)


@case
def dropout_with_typed_keys():
    def loss(p, x, key):
        key, first = jax.random.split(key)
        keep = jax.random.bernoulli(first, 0.7, (6, 5))
        h = jnp.where(keep, body1(p, x), 0.0) / 0.7
        h = jnp.tanh(affine(p["m_mid"], h))
        keep = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.7, h.shape)
        value, aux = head(p, jnp.where(keep, h, 0.0))
        return value, {**aux, "key": key}

    return mlp_case(loss, args=(data(), jax.random.key(3)))


@case
def aux_with_odd_contents():
    """Parameters, inputs, constants, integers, None and one value twice."""

    def loss(p, x):
        value, aux = head(p, body(p, x))
        odd = {
            "weight": p["m_mid"]["kernel"],
            "other": p["z_in"]["bias"],
            "input": x,
            "constant": jnp.float32(3.0),
            "count": jnp.sum(aux["logits"] > 0),
            "none": None,
            "value": value,
            "again": (value, aux["logits"]),
        }
        return value, {**aux, **odd}

    return mlp_case(loss)


@case
def closed_over_data():
    x = data()
    return mlp_case(lambda p: head(p, body(p, x)), args=())
