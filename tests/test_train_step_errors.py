"""What TrainStep refuses, and how it says so."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lwsam_jax as lwsam
from train_nets import (
    batch,
    KEY,
    loss_fn,
    make,
    MODEL_STATE,
    PARAMS,
    shared,
    start,
)


METHOD = lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((3, optax.sgd(0.1), METHOD), "loss_fn"),
        ((loss_fn, optax.sgd, METHOD), "base_optimizer"),
        ((loss_fn, optax.sgd(0.1), "lwsam"), "method"),
        ((loss_fn, optax.sgd(0.1), METHOD, "pjit"), "parallel"),
        ((loss_fn, optax.sgd(0.1), METHOD, 8), "parallel"),
        ((loss_fn, optax.sgd(0.1), METHOD, True), "parallel"),
    ],
)
def test_arguments_of_the_wrong_kind_raise(arguments, name):
    with pytest.raises((TypeError, ValueError), match=rf"`{name}`.*got .*\. [A-Z]"):
        lwsam.TrainStep(*arguments)


def test_a_layerwise_sam_inside_the_base_optimizer_raises():
    base = optax.chain(lwsam.layerwise_sam(1, rho=0.1, alpha=0.8), optax.sgd(0.1))
    with pytest.raises(ValueError, match="`base_optimizer`"):
        start(make(base))


def test_a_call_under_jit_raises():
    with pytest.raises(TypeError, match=r"`state`.*jit"):
        jax.jit(shared())(start(), batch())


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, s, b, k: jnp.sum(p["a_out"]["kernel"]),
        lambda p, s, b, k: (jnp.sum(p["a_out"]["kernel"]), s),
        lambda p, s, b, k: (p["a_out"]["kernel"], (s, {})),
        lambda p, s, b, k: (jnp.sum(p["a_out"]["kernel"]), ({}, {})),
        lambda p, s, b, k: (jnp.sum(p["a_out"]["kernel"]), ({**s, "mean": 0.0}, {})),
    ],
    ids=[
        "no aux",
        "no metrics",
        "no scalar",
        "model state lost",
        "model state reshaped",
    ],
)
def test_a_loss_that_returns_something_else_raises(loss):
    step = make(loss=loss)
    with pytest.raises(TypeError, match="`loss_fn`"):
        step(step.init(PARAMS, MODEL_STATE, batch(), key=KEY), batch())


def test_more_layers_than_there_are_raises_at_init():
    with pytest.raises(ValueError, match=r"`k`.*got 4"):
        start(make(k=4))


def test_unknown_names_raise_in_lower():
    with pytest.raises(ValueError, match=r"`selection`.*elsewhere.*a_out, m_mid, z_in"):
        shared().lower(start(), batch(), ("elsewhere",))


@pytest.mark.parametrize("bound", [-0.1, float("nan"), "10%"])
def test_a_budget_that_is_none_raises(bound):
    with pytest.raises((TypeError, ValueError), match="`max_overhead`"):
        make(max_overhead=bound)


def test_an_axis_name_belongs_to_the_step():
    with pytest.raises(ValueError, match="axis_name"):
        make(axis_name="data")
