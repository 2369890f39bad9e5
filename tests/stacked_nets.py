"""A decoder whose blocks are stacked and scanned, and its twin with a list of blocks.

Both compute the same numbers; layer `blocks/query/3` of the one is `blocks/3/query` of
the other.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np


WEIGHTS = ("query", "key", "value", "out")


def rms_norm(scale, x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def block(w, x):
    """RMSNorm, causal attention with two heads, RMSNorm, and an MLP if there is one."""
    h = rms_norm(w["norm"], x)
    heads = lambda name: (h @ w[name]).reshape(*h.shape[:2], 2, -1)
    # Not by jax.nn.dot_product_attention, whose softmax is in float32.
    scores = jnp.einsum("bqhd,bkhd->bhqk", heads("query"), heads("key"))
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jax.nn.softmax(jnp.where(causal, scores / 2.0, -1e9))
    y = jnp.einsum("bhqk,bkhd->bqhd", scores, heads("value"))
    x = x + y.reshape(x.shape) @ w["out"]
    if "up" in w:
        x = x + jax.nn.silu(rms_norm(w["norm2"], x) @ w["up"]) @ w["down"]
    return x


def loss_of(run, params, tokens):
    """Next-token loss of a decoder with tied embeddings; `run(blocks, x)`."""
    table = params["embed"]
    x = run(params["blocks"], table[tokens])
    logits = rms_norm(params["norm"], x) @ params["head"]
    logits = jax.nn.log_softmax(logits[:, :-1])
    hits = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)
    return -jnp.mean(hits)


def scanned(remat=False, cast=None, **options):
    """The loss with its blocks in a scan."""

    def body(x, w):
        return block(w, x), None

    def run(blocks, x):
        if cast is not None:
            blocks = jax.tree.map(lambda w: w.astype(cast), blocks)
        step = jax.checkpoint(body) if remat else body
        return jax.lax.scan(step, x, blocks, **options)[0]

    return lambda params, tokens: loss_of(run, params, tokens)


def twin(params, tokens, remat=False):
    """The loss with its blocks in a list."""

    def run(blocks, x):
        step = jax.checkpoint(block) if remat else block
        for w in blocks:
            x = step(w, x)
        return x

    return loss_of(run, params, tokens)


def make_params(layers, width=8, vocabulary=7, mlp=True):
    rng = np.random.default_rng(layers)
    dtype = jnp.ones(()).dtype  # float64 where that is enabled
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, dtype)
    shapes = {name: (width, width) for name in WEIGHTS}
    if mlp:
        shapes |= {"up": (width, 2 * width), "down": (2 * width, width)}
    blocks = {name: draw(layers, *shape) for name, shape in shapes.items()}
    norms = ("norm", "norm2") if mlp else ("norm",)
    blocks |= {n: 1 + 0.1 * draw(1, layers, width)[0] for n in norms}
    return {
        "embed": draw(vocabulary, width),
        "blocks": blocks,
        "norm": jnp.ones(width, dtype),
        "head": draw(width, vocabulary),
    }


def make_tokens(examples=2, length=5, vocabulary=7):
    return jnp.asarray(
        np.random.default_rng(3).integers(vocabulary, size=(examples, length))
    )


def unstack(params):
    """The parameters, or gradients, of the twin."""
    blocks = params["blocks"]
    count = len(jax.tree.leaves(blocks)[0])
    at = lambda i: jax.tree.map(lambda w: w[i], blocks)
    return {**params, "blocks": [at(i) for i in range(count)]}


def names_of_twin(names):
    return tuple(re.sub(r"^blocks/(.*)/(\d+)$", r"blocks/\2/\1", n) for n in names)
