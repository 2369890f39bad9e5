"""Tiny losses in plain JAX, one for each kind of layer; cases like those of `nets`."""

import jax
import jax.numpy as jnp

from nets import (
    affine,
    body,
    Case,
    data,
    dense,
    DEPTH,
    head,
    mlp_case,
    NAMES,
    weight,
)


CASES = {}


def case(make):
    CASES[make.__name__] = make
    return make


@case
def tied_weights():
    def loss(p, tokens):
        table = p["m_table"]["embedding"]
        h = jnp.tanh(affine(p["z_in"], table[tokens].sum(axis=1)))
        logits = jnp.tanh(affine(p["a_out"], h)) @ table.T
        targets = jax.nn.one_hot(tokens[:, 0], len(table))
        return -jnp.mean(jax.nn.log_softmax(logits) * targets), {"logits": logits}

    params = {
        "a_out": dense(5, 5, 1),
        "m_table": {"embedding": weight(7, 5)},
        "z_in": dense(5, 5),
    }
    names = ("a_out", "m_table/embedding", "z_in")
    depth = ("m_table/embedding", "z_in", "a_out")
    tokens = jnp.arange(12).reshape(6, 2) % 7
    return Case(loss, params, (tokens,), names, depth, ("a_out", "m_table/embedding"))


@case
def tied_weights_that_are_not_perturbed():
    """The table is read before and after the cut: its gradient has two parts."""
    return tied_weights()._replace(selected=("a_out",))


@case
def layer_used_only_in_aux():
    def loss(p, x):
        h = body(p, x)
        value, aux = head(p, h)
        probe = jnp.mean((jax.lax.stop_gradient(h) @ p["probe"]["kernel"]) ** 2)
        return value, {**aux, "probe": probe}

    made = mlp_case(loss, ("a_out", "probe"), probe={"kernel": weight(5, 2)})
    return made._replace(names=(*NAMES[:2], "probe", NAMES[2]), depth=())


@case
def layer_never_used():
    loss = lambda p, x: head(p, body(p, x))
    made = mlp_case(loss, ("a_out", "unused"), unused={"kernel": weight(5, 2)})
    return made._replace(
        names=("a_out", "m_mid", "unused", "z_in"), depth=("unused", *DEPTH)
    )


@case
def penalty_first_in_the_loss():
    def loss(p, x):
        penalty = 1e-2 * sum(jnp.sum(p[name]["kernel"] ** 2) for name in NAMES)
        value, aux = head(p, body(p, x))
        return value + penalty, {**aux, "penalty": penalty}

    return mlp_case(loss)


@case
def cast_first_in_the_loss():
    def loss(p, x):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), p)
        return head(p, body(p, x))

    return mlp_case(loss)


@case
def attention():
    def loss(p, x):
        attend = p["attend"]
        tokens = x[:, None, :] * jnp.arange(1.0, 4.0)[:, None]
        h = jnp.tanh(tokens @ p["z_in"])
        query, key, value = (h @ attend[n] for n in ("query", "key", "value"))
        scores = jax.nn.softmax(query @ key.swapaxes(1, 2) / 5**0.5)
        y = (scores @ value) @ attend["out"]
        return jnp.mean(y**2), {"scores": scores}

    params = {
        "attend": {
            n: weight(5, 5, seed=i)
            for i, n in enumerate(("query", "key", "value", "out"))
        },
        "z_in": weight(4, 5),
    }
    part = "attend/{}".format
    names = (part("key"), part("out"), part("query"), part("value"), "z_in")
    depth = ("z_in", part("query"), part("key"), part("value"), part("out"))
    return Case(loss, params, (data(),), names, depth, (part("out"), part("value")))


@case
def batch_norm_and_residual():
    def loss(p, running, x):
        h = jnp.tanh(affine(p["z_in"], x))
        y = affine(p["m_mid"], h)
        mean, var = jnp.mean(y, axis=0), jnp.var(y, axis=0)
        y = (y - mean) * jax.lax.rsqrt(var + 1e-3) * p["norm"]["scale"]
        new = {"mean": 0.9 * running["mean"] + 0.1 * mean, "var": var}
        value, aux = head(p, h + jnp.tanh(y))
        return value, {**aux, "running": new}

    running = {"mean": jnp.zeros(5), "var": jnp.ones(5)}
    made = mlp_case(loss, args=(running, data()), norm={"scale": jnp.ones(5)})
    return made._replace(selected=("a_out",))


@case
def list_of_convolutions():
    def loss(p, images):
        h = images
        for kernel in p["blocks"]:
            h = jnp.tanh(
                jax.lax.conv_general_dilated(
                    h,
                    kernel,
                    (1, 1),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
            )
        y = h.mean(axis=(1, 2)) @ p["a_out"]["kernel"]
        return jnp.mean(y**2), {"pooled": y}

    blocks = [weight(3, 3, fan_in, 3, seed=fan_in) for fan_in in (2, *(10 * [3]))]
    params = {"a_out": {"kernel": weight(3, 2)}, "blocks": blocks}
    paths = tuple(f"blocks/{i}" for i in range(11))  # "10" after "9", not after "1"
    images = weight(2, 4, 4, 2)
    return Case(
        loss, params, (images,), ("a_out", *paths), (*paths, "a_out"), ("blocks/10",)
    )


@case
def frozen_part():
    def loss(p, x):
        frozen = jax.lax.stop_gradient(p["z_in"])
        return head(p, body({**p, "z_in": frozen}, x))

    return mlp_case(loss, ("m_mid", "z_in"))
