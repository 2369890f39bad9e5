"""What a TrainStep does after something went wrong, and when it begins once more."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from test_budget import loss_fn, make_batches, make_params, make_step


BATCHES = [jax.tree.map(lambda x, i=i: x[i], make_batches(5)) for i in range(5)]
KEY = jax.random.key(3)


def start(step, batch=BATCHES[0]):
    return step.init(make_params(), {}, batch, key=KEY)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_batch_that_is_refused_costs_nothing(lag):
    """The state was not donated yet: the run goes on as if nothing had happened."""
    whole, broken = make_step(lag=lag), make_step(lag=lag)
    expected, state = start(whole), start(broken)
    for i, batch in enumerate(BATCHES):
        expected, want = whole(expected, batch)
        if i in (1, 3):
            other = state.method_state._replace(mask=~state.method_state.mask)
            for tried in (state, state._replace(method_state=other)):
                with pytest.raises(KeyError, match="y"):
                    broken(tried, {"x": batch["x"]})
        state, info = broken(state, batch)
        np.testing.assert_array_equal(info.mask, want.mask)
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_warning_that_is_an_error_leaves_a_step_that_works():
    step = make_step(max_overhead=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="every step is plain"):
            start(step)
        warnings.simplefilter("ignore")
        state = start(step)
    _, info = step(state, BATCHES[0])
    assert not np.asarray(info.mask).any()


def test_a_second_run_scans_its_own_network():
    """Another size of batch or network has other prices."""
    step = make_step(max_overhead=0.6)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *BATCHES)
    half = jax.tree.map(lambda x: x[:, :1], stacked)
    first = jax.tree.map(lambda x: x[0], half)
    step.scan(start(step, first), half, covers=2)
    again, fresh = step, make_step(max_overhead=0.6)
    _, infos = again.scan(start(again), stacked, covers=2)
    _, want = fresh.scan(start(fresh), stacked, covers=2)
    np.testing.assert_array_equal(infos.overhead, want.overhead)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"selection_lag": -1},
            r"`selection_lag` to be >= 0, got -1\. Pass by how many",
        ),
        ({"max_executables": 2.5}, r"`max_executables` to be an integer, got 2\.5"),
        ({"max_executables": 1}, r"`max_executables` to be >= 2, got 1\. .*the plain"),
    ],
)
def test_counts_have_remedies_of_their_own(arguments, message):
    method = lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8)
    with pytest.raises((TypeError, ValueError), match=message):
        lwsam.TrainStep(loss_fn, optax.sgd(0.1), method, **arguments)


@pytest.mark.parametrize("name", ["max_overhead", "mean_overhead"])
@pytest.mark.parametrize("value", [optax.constant_schedule(0.1), "0.1", True])
def test_a_budget_is_a_number(name, value):
    with pytest.raises(TypeError, match=rf"`{name}` to be a number or None"):
        lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8, **{name: value})


def test_scan_refuses_what_has_no_axis_of_steps():
    step = make_step()
    with pytest.raises(
        ValueError, match=r"`batches` to be arrays with an axis of steps"
    ):
        step.scan(start(step), {"x": BATCHES[0]["x"], "y": 1.0})


def test_step_cost_refuses_the_layers_of_another_tree():
    layers = lwsam.Layers.of({"a": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="`params`"):
        lwsam.step_cost(loss_fn, make_params(), {}, BATCHES[0], KEY, layers=layers)


def test_a_layer_is_as_deep_as_its_first_leaf_that_meets_data():
    """Whichever leaf comes first: one that the loss leaves out has no depth."""
    params = {
        "in": {"w": jnp.ones((3, 3))},
        "out": {"a_unused": jnp.ones((3, 3)), "w": jnp.ones((3, 3))},
    }
    loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["in"]["w"]) @ p["out"]["w"])
    layers = lwsam.Layers.of(params, lwsam.modules, loss, jnp.ones((2, 3)))
    assert layers.from_depth(1) == ("out",)
