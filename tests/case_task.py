"""A linear loss that anybody's loop can step on."""

import jax
import jax.numpy as jnp
import optax

import lwsam_jax as lwsam


X = jax.random.normal(jax.random.key(0), (32, 8))
KEY = jax.random.key(0)


def linear_loss(params, model_state, batch, key):
    del key
    return jnp.mean((batch @ params["w"] - batch[:, :1]) ** 2), (model_state, {})


LINEAR = {"w": jnp.full((8, 1), 0.1, jnp.float32)}  # a weak type is traced again


def linear_step(method, base=None, **options):
    base = optax.sgd(1e-6) if base is None else base
    step = lwsam.TrainStep(linear_loss, base, method, **options)
    return step, step.init(LINEAR, {}, X, key=KEY)
