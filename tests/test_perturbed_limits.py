"""`perturbed` without a radius, with one that jumps, and below float32."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import family_reference as family
import lwsam_jax as lwsam
from chains import LOSS, PARAMS
from perturbed_task import (
    batches,
    follow,
    GRADIENT,
    jitted,
    kernels_apart,
    loss_fn,
    LOW,
    sgd,
    start,
    train,
)
from plain import assert_close, enable_x64, global_norm


def distance(one, other):
    gap = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), one, other)
    return float(global_norm(jax.tree.leaves(gap)))


# --- parameters below float32 ---------------------------------------------------------


def stepper(tx):
    @jax.jit
    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("bfloat16", {"rho": 0.1}),
        ("bfloat16", {"rho": 0.3, "shape": lwsam.adaptive()}),
        ("float16", {"rho": 0.1, "ascent": lwsam.random()}),
        ("mixed", {"rho": 0.3, "shape": lwsam.normalized()}),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x),
)
def test_below_float32_the_unperturbed_parameters_are_those_of_the_base(
    precision, options
):
    """The base alone, fed with the same gradients, gives the same bits."""
    base = optax.sgd(0.1, momentum=0.9)
    tx = lwsam.perturbed(base, **options)
    params = own = LOW[precision]
    state, base_state = tx.init(params), base.init(own)
    grad, ours, bases = jax.jit(jax.grad(LOSS)), stepper(tx), stepper(base)
    apart = 0.0
    for _ in range(5):
        grads = grad(params)
        params, state = ours(grads, params, state)
        own, base_state = bases(grads, own, base_state)
        found = lwsam.eval_params(state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, own)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
            if a.dtype == jnp.float32:
                assert_close(a, b, 1e-6)
            else:
                np.testing.assert_array_equal(a, b)
        apart = distance(params, own)
        chex.assert_trees_all_equal_shapes_and_dtypes(params, own)
    assert apart > 1e-2
    # The way back is not exact, but no farther off than one rounding.
    assert_close(lwsam.train_params(state, found), params, 4e-3)


# --- limits ---------------------------------------------------------------------------


@functools.cache
def of_the_base():
    return train(sgd())


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 0},
        {"rho": 0.0, "ascent": lwsam.random(), "shape": lwsam.adaptive()},
        {"rho": 0.1, "k": 0},
        {"rho": lambda step: 0.1, "select": lwsam.nothing()},
    ],
    ids=["rho 0", "rho 0, random, adaptive", "k 0", "nothing"],
)
def test_without_a_radius_or_a_layer_it_is_the_base_bit_for_bit(options):
    params, state = train(lwsam.perturbed(sgd(), **options))
    chex.assert_trees_all_equal(params, of_the_base()[0])
    chex.assert_trees_all_equal(state.base, of_the_base()[1])
    chex.assert_trees_all_equal(lwsam.eval_params(state, params), params)
    chex.assert_trees_all_equal(lwsam.train_params(state, params), params)


@pytest.mark.parametrize(
    ("rho", "shape"),
    [
        (lambda step: 0.0, lwsam.relative()),
        (lambda step: -0.5 + 0.0 * step, lwsam.adaptive()),
        (optax.linear_schedule(-0.1, -0.2, 4), lwsam.normalized()),
    ],
    ids=["a schedule of 0", "below 0, adaptive", "below 0, normalized"],
)
def test_a_schedule_that_is_0_or_below_is_the_base(rho, shape):
    params, state = train(lwsam.perturbed(sgd(), rho, shape=shape))
    assert_close(params, of_the_base()[0])
    chex.assert_trees_all_equal(lwsam.eval_params(state, params), params)


def test_a_selector_that_finds_nothing_at_run_time_is_the_base():
    nothing = lambda norms, key: norms > 1e9
    params, _ = train(lwsam.perturbed(sgd(), 0.3, select=nothing))
    assert_close(params, of_the_base()[0])


# --- the radius over time -------------------------------------------------------------


RADII = (0.7, 0.0, 0.3, 0.3, 0.05, 0.0, 0.0, 0.4)  # the first has no momentum yet


def of_radii(shape):
    def rule(number, *rest):
        options = {"rho": RADII[number]}
        return family.perturbed(GRADIENT, family.momentum(), shape, **options)(
            number, *rest
        )

    return follow(rule, len(RADII))


@pytest.mark.parametrize("how", ["a schedule", "the loop"])
def test_a_radius_that_jumps_takes_away_what_was_added(how):
    """rho(t) is the radius of gradient t; the published code takes away the new one."""
    with enable_x64(True):
        by_schedule = how == "a schedule"
        table = jnp.asarray(RADII)
        rho = (lambda t: table[jnp.minimum(t, len(RADII) - 1)]) if by_schedule else 0.9
        tx = lwsam.perturbed(sgd(), rho, shape=lwsam.normalized())
        params = start(np.float64)
        state = tx.init(params)
        assert set(state.hyperparams) == {"rho"}

        @jax.jit
        def step(params, state, batch):
            grads = jax.grad(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return params, state, lwsam.eval_params(state, params)

        oracle = of_radii(family.normalized())
        for number, batch in enumerate(batches(np.float64, len(RADII))):
            coming = RADII[min(number + 1, len(RADII) - 1)]
            if not by_schedule:  # of the same dtype, as a plateau rule would set it
                state = state._replace(hyperparams={"rho": jnp.float64(coming)})
                before = lwsam.eval_params(state, params)  # not moved by that
                expected = oracle[number - 1].params if number else start(np.float64)
                assert_close(before, expected, 1e-9, same_dtypes=False)
            params, state, own = step(params, state, batch)
            assert_close(own, oracle[number].params, 1e-9, same_dtypes=False)
            np.testing.assert_allclose(distance(params, own), coming, atol=1e-12)
            if coming == 0.0:
                chex.assert_trees_all_equal(params, own)
        assert step._cache_size() == 1


def test_a_loop_may_set_the_radius_to_a_number_or_below_0():
    tx = lwsam.perturbed(sgd(), 0.3)
    params, state = train(tx, 2)
    state = state._replace(hyperparams={"rho": -0.3})
    params, state = train(tx, 1, params, state)
    chex.assert_trees_all_equal(lwsam.eval_params(state, params), params)


# --- a few layers ---------------------------------------------------------------------


@pytest.mark.parametrize("ascent", [lwsam.momentum(), lwsam.random()])
def test_k_perturbs_the_layers_of_the_largest_gradient_norm(ascent):
    """The norms are those of the gradient that the loop hands over."""
    tx = lwsam.perturbed(optax.sgd(0.01, momentum=0.9), 0.2, ascent=ascent, k=1)
    layers, params, state = lwsam.Layers.of(PARAMS), PARAMS, tx.init(PARAMS)
    step = stepper(tx)
    for chosen in (*layers.names, *layers.names):
        grads = jax.tree.map(lambda x: jnp.full_like(x, 0.1), PARAMS)
        grads[chosen] = jax.tree.map(lambda g: 3.0 * g, grads[chosen])
        params, state = step(grads, params, state)
        own = lwsam.eval_params(state, params)
        assert kernels_apart(own, params) == (chosen,)
        assert layers.selected(state.mask) == (chosen,)
        gap = jnp.linalg.norm(own[chosen]["kernel"] - params[chosen]["kernel"])
        size = jnp.linalg.norm(own[chosen]["kernel"])
        np.testing.assert_allclose(gap, 0.2 * size, rtol=1e-3)
        np.testing.assert_array_equal(own[chosen]["bias"], params[chosen]["bias"])


def test_a_selector_of_ones_own_sees_the_norms_and_a_new_key_each_time():
    seen = lambda norms, key: jax.random.bernoulli(key, 0.5, norms.shape)
    tx = lwsam.perturbed(sgd(), 0.1, select=seen)
    params, state, step = PARAMS, tx.init(PARAMS), jitted(tx)
    masks = set()
    for _ in range(8):
        params, state = step(params, state)
        own = lwsam.eval_params(state, params)
        masks.add(kernels_apart(own, params))
    assert len(masks) > 2
