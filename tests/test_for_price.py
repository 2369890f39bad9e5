"""The choice of a method by its price."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lwsam_jax as lwsam


SIZE = 8


def loss(params, x):
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return jnp.mean(x**2)


PARAMS = {f"w{i}": 0.3 * jnp.ones((SIZE, SIZE)) for i in range(4)}
BATCH = jnp.ones((100, SIZE))
COST = lwsam.step_cost(loss, PARAMS, BATCH)


@pytest.mark.parametrize("price", [1.0, 1.01, 1.04, 1.07, 1.08, 1.1, 1.25, 2.0])
@pytest.mark.parametrize("total_steps", [None, 50])
def test_the_choice_is_within_the_price_and_says_so(price, total_steps):
    chosen = lwsam.for_price(price, COST, total_steps=total_steps)
    assert 1.0 <= chosen.price <= price + 1e-9
    assert f"{chosen.price:.2f}" in chosen.why or chosen.price == 1.0
    assert isinstance(chosen.method, lwsam.Method)


@pytest.mark.parametrize(
    ("price", "total_steps", "words"),
    [
        (1.0, None, "momentum, which costs nothing"),
        (1.1, None, "10 of 100 examples and perturbs all layers"),
        (2.0, None, "25 of 100 examples and perturbs all layers"),
        (1.075, None, "8 of 100 examples and perturbs the"),
        (1.02, 50, "8 of 100 examples in the last"),
        (1.02, None, "momentum"),
    ],
)
def test_what_is_chosen(price, total_steps, words):
    assert words in lwsam.for_price(price, COST, total_steps=total_steps).why


@pytest.mark.parametrize("price", [1.0, 1.05, 1.075, 1.1])
def test_the_chosen_method_runs_at_its_price(price):
    chosen = lwsam.for_price(price, COST, total_steps=8, rho=0.05)
    fn = lambda params, model_state, batch, key: (
        loss(params, batch),
        (model_state, {}),
    )
    step = lwsam.TrainStep(fn, optax.sgd(0.1, momentum=0.9), chosen.method)
    state = step.init(PARAMS, {}, BATCH, key=jax.random.key(0))
    for _ in range(8):
        state, info = step(state, BATCH)
    assert float(info.mean_overhead) <= price - 1 + 1e-6
    assert bool(info.finite)


def test_parts_of_the_callers_own_replace_those_chosen():
    chosen = lwsam.for_price(1.1, COST, rho=0.2, shape=lwsam.normalized())
    assert chosen.method.rho == 0.2
    state = lwsam.as_optax(chosen.method).init(PARAMS)
    assert float(state.hyperparams["rho"]) == pytest.approx(0.2)


@pytest.mark.parametrize("price", [0.9, float("nan"), None, "cheap"])
def test_a_price_below_a_plain_gradient_is_refused(price):
    with pytest.raises(ValueError, match=r"`price`.*plain gradients"):
        lwsam.for_price(price, COST)


def test_a_cost_without_a_batch_is_refused():
    cost = lwsam.step_cost(lambda p: loss(p, BATCH), PARAMS)
    with pytest.raises(ValueError, match=r"`cost`.*as an argument"):
        lwsam.for_price(1.1, cost)
