"""layerwise_sam inside the wrappers of Optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import lwsam_jax as lwsam
from chains import chained, HYPER, jitted_step, LOSS, PARAMS, trained
from plain import assert_close, take_step


# --- Optax's wrappers -----------------------------------------------------------------


def test_hyperparameters_can_be_injected():
    make = lambda k, rho, alpha: chained(k=k, rho=rho, alpha=alpha)
    tx = optax.inject_hyperparams(make)(k=1, rho=0.1, alpha=1.0)
    opt_state = tx.init(PARAMS)
    for name, value in HYPER.items():
        given = opt_state.hyperparams[name]
        opt_state.hyperparams[name] = jnp.asarray(value, given.dtype)
    step = jitted_step(tx)
    params = PARAMS
    for i in range(3):
        params, opt_state = step(params, opt_state, () if i == 0 else None)
    expected_tx = chained()
    expected, expected_state = PARAMS, expected_tx.init(PARAMS)
    expected_step = jitted_step(expected_tx)
    for i in range(3):
        selection = () if i == 0 else None
        expected, expected_state = expected_step(expected, expected_state, selection)
    assert_close(params, expected, rtol=1e-5)
    assert lwsam.selection(opt_state) == lwsam.selection(expected_state)


def test_schedules_can_be_injected():
    make = optax.inject_hyperparams(lwsam.layerwise_sam)
    schedule = lambda step: 0.1 * (step + 1)
    tx = make(k=2, rho=schedule, alpha=1.0)
    assert radii(tx) == pytest.approx([0.1, 0.2, 0.3])


def test_a_rule_is_a_static_argument_of_inject_hyperparams():
    """Else Optax takes the callable for a schedule."""
    make = optax.inject_hyperparams(
        lwsam.layerwise_sam, static_args=("rule", "normalize", "select")
    )
    tx = make(k=2, rho=0.3, alpha=1.0, rule=lwsam.leaves, normalize="selected")
    assert len(lwsam.selection(tx.init(PARAMS))) == 2
    assert set(lwsam.selection(tx.init(PARAMS))) == {"z_in", "z_in/bias"}
    tx = make(select=lwsam.named("m_"), rho=0.3, alpha=1.0)
    assert lwsam.selection(tx.init(PARAMS)) == ("m_mid",)


def radii(tx, steps=3):
    """The radius of each step, from a grad_fn that returns the point it is given."""
    params = {"w": jnp.zeros((2, 2))}
    grads = {"w": jnp.full((2, 2), 0.5)}  # of norm 1
    state = tx.init(params) if _takes(tx, params) else None
    found = []
    update = jax.jit(functools.partial(tx.update, grad_fn=lambda p: p))
    for _ in range(steps):
        point, state = update(grads, state, params)
        found.append(float(jnp.linalg.norm(point["w"])))
    return found


def _takes(tx, params):
    try:
        tx.init(params)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("argument", ["rho", "alpha"])
def test_schedules_advance_with_the_steps(argument):
    """Optax's own SAM resets them (style: 0.01, 0.01, 0.01)."""
    schedule = optax.linear_schedule(0.1, 0.4, 3)
    tx = lwsam.layerwise_sam(**{"k": 1, "rho": 1.0, "alpha": 1.0, argument: schedule})
    found = radii(tx)
    if argument == "alpha":  # the point is g, its gradient w + g: (1 - alpha) + alpha
        zero = {"w": jnp.zeros((2, 2))}
        state, found = tx.init(zero), []
        for _ in range(3):
            mixed, state = tx.update(
                {"w": jnp.full((2, 2), 0.5)}, state, zero, grad_fn=lambda p: zero
            )
            found.append(1.0 - float(jnp.linalg.norm(mixed["w"])))
    assert found == pytest.approx([0.1, 0.2, 0.3], rel=1e-5)


def test_apply_if_finite_skips_a_bad_step_whole():
    tx = optax.apply_if_finite(chained(), max_consecutive_errors=3)
    opt_state = tx.init(PARAMS)

    @jax.jit
    def step(params, opt_state, scale):
        loss = lambda p: scale * LOSS(p)
        return take_step(tx, loss, params, opt_state)

    good, good_state = step(PARAMS, opt_state, 1.0)
    bad, bad_state = step(good, good_state, jnp.nan)
    chex.assert_trees_all_equal(bad, good)
    chex.assert_trees_all_equal(bad_state.inner_state, good_state.inner_state)
    params, opt_state = bad, bad_state
    for _ in range(2):
        params, opt_state = step(params, opt_state, 1.0)
    assert_close(params, trained()[0], rtol=1e-5)


def test_map_params_leaves_our_state_alone():
    """It holds nothing that is shaped like the parameters."""
    tx = chained()
    _, opt_state = trained()
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, opt_state)
    chex.assert_trees_all_equal(doubled[0], opt_state[0])
    trace = optax.tree.get(opt_state, "trace")
    expected = jax.tree.map(lambda x: 2 * x, trace)
    chex.assert_trees_all_equal(optax.tree.get(doubled, "trace"), expected)
    assert lwsam.selection(doubled) == lwsam.selection(opt_state)


def test_unknown_extra_arguments_are_ignored():
    tx = chained()
    grads = jax.grad(LOSS)(PARAMS)
    tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=LOSS, selection=(), unheard_of=3)


def test_a_line_search_after_it_gets_its_own_extra_arguments():
    """`value_fn` is the name that Optax's line searches use too."""
    tx = chained(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8))
    grads, value = jax.grad(LOSS)(PARAMS), LOSS(PARAMS)

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(
            grads, opt_state, params, value=value, grad=grads, value_fn=LOSS
        )
        return optax.apply_updates(params, updates), opt_state

    params, _ = step(PARAMS, tx.init(PARAMS))
    assert float(LOSS(params)) < float(value)
