"""The small network as a loss for TrainStep: dropout, a running mean, metrics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lwsam_jax as lwsam
import nets


PARAMS = nets.mlp_params()
MODEL_STATE = {"mean": jnp.zeros(4), "count": jnp.zeros((), jnp.int32)}
KEY_KIND = "unsafe_rbg"  # compiles fastest
KEY = jax.random.key(5, impl=KEY_KIND)


def batch(seed=0, size=16):
    return {"x": nets.weight(size, 4, seed=seed), "scale": np.float32(2.0)}


def loss_fn(params, model_state, batch, key):
    """A network with dropout, a running mean, and metrics of both kinds."""
    x = batch["x"] * batch["scale"]
    keep = jax.random.bernoulli(key, 0.8, (len(x), 5))
    h = jnp.where(keep, nets.body(params, x), 0.0)
    value, aux = nets.head(params, h)
    new_state = {
        "mean": 0.9 * model_state["mean"] + 0.1 * jnp.mean(h),
        "count": model_state["count"] + 1,
    }
    metrics = {
        "positive": jnp.sum(aux["logits"] > 0),
        "mean": jnp.mean(aux["logits"]),
        "key": jax.random.key_data(key),
    }
    return value, (new_state, metrics)


def small_loss(params, model_state, batch, key):
    """As `loss_fn` without what takes long to compile."""
    del key
    value, _ = nets.head(params, nets.body(params, batch["x"]))
    return value, (model_state, {})


def make(base=None, loss=loss_fn, max_executables=9, **options):
    method = lwsam.LayerwiseSAM(**{"k": 1, "rho": 0.3, "alpha": 0.7, **options})
    optimizer = base or optax.sgd(0.1, momentum=0.9)
    return lwsam.TrainStep(loss, optimizer, method, max_executables=max_executables)


@functools.cache
def shared():
    """One TrainStep for the tests that only look at it."""
    return make()


def start(step=None, **changes):
    step = shared() if step is None else step
    return step.init(PARAMS, MODEL_STATE, batch(), key=KEY)._replace(**changes)
