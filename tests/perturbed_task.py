"""The problem on which tests of `perturbed` train, and the loops that do."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import family_reference as family
import lwsam_jax as lwsam
import reference
from chains import LOSS, PARAMS
from plain import enable_x64


STEPS = {np.float64: 100, np.float32: 20}
RATE, MOMENTUM, SEED = 0.3, 0.9, 7
GRADIENT = family.gradient_of(reference.mlp_value_and_grad)
# A shape of one's own whose state is still 0 after the 0 that `TrainStep` gives it.
CHAIN = optax.chain(optax.ema(0.5, debias=False), lwsam.normalized())


def sgd():
    return optax.sgd(RATE, momentum=MOMENTUM)


def loss_fn(params, batch):
    """That of `reference.mlp_value_and_grad`, on the same flat dictionary."""
    h, labels = batch
    for name in reference.MLP_LAYERS:
        h = h @ params[f"{name}/kernel"] + params[f"{name}/bias"]
        h = jnp.tanh(h) if name != reference.MLP_LAYERS[-1] else h
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(h, labels))


def precision(dtype):
    return enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def start(dtype):
    params = reference.mlp_params()
    return {name: jnp.asarray(leaf, dtype) for name, leaf in params.items()}


def batches(dtype, steps=None):
    steps = STEPS[dtype] if steps is None else steps
    return [(x.astype(dtype), y) for x, y in reference.mlp_batches(steps)]


def follow(rule, steps, momentum=MOMENTUM):
    return family.trajectory(
        rule,
        reference.mlp_params(),
        reference.mlp_batches(steps),
        learning_rate=RATE,
        momentum=momentum,
    )


def low(*dtypes):
    """The small net, its layers in these precisions."""
    return {
        name: jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), PARAMS[name])
        for name, dtype in zip(PARAMS, dtypes, strict=True)
    }


LOW = {
    "bfloat16": low(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    "float16": low(jnp.float16, jnp.float16, jnp.float16),
    "mixed": low(jnp.bfloat16, jnp.float32, jnp.float16),
}


def jitted(tx):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(LOSS)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, steps=4, params=PARAMS, state=None):
    state, step = tx.init(params) if state is None else state, jitted(tx)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def kernels_apart(one, other):
    """Which layers have weights that differ."""
    return tuple(n for n in one if np.any(one[n]["kernel"] != other[n]["kernel"]))
