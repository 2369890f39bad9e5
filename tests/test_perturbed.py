"""`perturbed`, `momentum_sam`: equal to the explicit form, with known noise."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import family_reference as family
import lwsam_jax as lwsam
import reference
from chains import PARAMS
from lwsam_jax._axes.noise import normal_like
from perturbed_task import (
    batches,
    CHAIN,
    follow,
    GRADIENT,
    loss_fn,
    precision,
    RATE,
    SEED,
    sgd,
    start,
    STEPS,
)
from plain import assert_close


RTOL = {np.float64: 1e-6, np.float32: 1e-5}
KERNELS = tuple(leaves[0] for leaves in reference.WEIGHTS.values())


def run(tx, dtype=np.float64):
    """Trains in one scan; the unperturbed and the held parameters after each step."""

    def body(carry, batch):
        params, state = carry
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (lwsam.eval_params(state, params), params)

    with precision(dtype):
        params, data = start(dtype), batches(dtype)
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *data)
        loop = jax.jit(functools.partial(jax.lax.scan, body))
        _, both = loop((params, tx.init(params)), stacked)
        return jax.device_get(both)


def noise(params, step, seed=SEED):
    """What `random()` draws for a gradient: nothing for the first."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    drawn = normal_like(params, key)  # tests/test_noise.py has its oracle
    return jax.tree.map(lambda z: jnp.where(step > 0, z, 0), drawn)


def known_noise(dtype):
    with precision(dtype):
        draw = jax.jit(noise)
        params = start(dtype)
        return [jax.device_get(draw(params, t)) for t in range(STEPS[dtype])]


# --- equal to the explicit form -------------------------------------------------------


# The ascent, the shape and the radius; what the oracle calls these.
FORMULAS = {
    "momentum, relative": (
        (lwsam.momentum(), lwsam.relative(), 0.1),
        (family.momentum(), family.relative_to_layers(reference.WEIGHTS)),
    ),
    "plus the momentum, relative per filter": (
        (lwsam.momentum(1), lwsam.relative("filter"), 0.05),
        (family.momentum(1.0), family.relative_to_filters(KERNELS)),
    ),
    "momentum, adaptive": (
        (lwsam.momentum(), lwsam.adaptive(0.05), 0.3),
        (family.momentum(), family.adaptive(0.05)),
    ),
    "previous, normalized": (
        (lwsam.previous(), lwsam.normalized(), 0.3),
        (family.previous(), family.normalized()),
    ),
    "random, relative": (
        (lwsam.random(), lwsam.relative(), 0.2),
        (None, family.relative_to_layers(reference.WEIGHTS)),
    ),
    "random, raw": ((lwsam.random(), lwsam.raw(), 0.05), (None, family.raw())),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, np.float64) for case in FORMULAS),
        ("momentum, relative", np.float32),
        ("random, raw", np.float32),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_it_follows_the_formulas(case, dtype):
    """Every step against NumPy: the unperturbed parameters and those that are held."""
    (ascent, shape, rho), (oracle, oracle_shape) = FORMULAS[case]
    oracle = oracle or family.random(known_noise(dtype))
    tx = lwsam.perturbed(sgd(), rho, ascent=ascent, shape=shape, seed=SEED)
    own, held = run(tx, dtype)
    steps = follow(
        family.perturbed(GRADIENT, oracle, oracle_shape, rho=rho), STEPS[dtype]
    )
    for number, step in enumerate(steps):
        actual = {name: leaf[number] for name, leaf in own.items()}
        expected = {n: x.astype(dtype) for n, x in step.params.items()}
        assert_close(actual, expected, RTOL[dtype])
        if number + 1 < len(steps):
            epsilon = steps[number + 1].move.epsilon
            point = family.added(step.params, 1.0, epsilon)
            assert family.norm_of(epsilon.values()) > 1e-3
            actual = {name: leaf[number] for name, leaf in held.items()}
            expected = {n: x.astype(dtype) for n, x in point.items()}
            assert_close(actual, expected, RTOL[dtype])


class SameNoise(lwsam.Stale):
    """The noise of `perturbed(ascent=random(), seed=SEED)` for a `TrainStep`."""

    def init(self, params, opt_state):
        return jnp.int32(0)

    def direction(self, kept, opt_state, params, key):
        return noise(params, kept)

    def update(self, kept, grads):
        return kept + 1


BASES = {
    "nesterov": (
        lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
        {"shape": lwsam.relative(), "rho": 0.1},
    ),
    "adam": (
        lambda: optax.adam(0.02),
        {"shape": lwsam.normalized(), "rho": 0.3},
    ),
    "adamw": (  # whose decay sees the unperturbed weights
        lambda: optax.adamw(0.02, weight_decay=0.3),
        {"shape": lwsam.relative(), "rho": 0.2},
    ),
    "lion": (
        lambda: optax.lion(0.01),
        {"shape": lwsam.raw(), "rho": 0.3},
    ),
    "lamb": (
        lambda: optax.lamb(0.02),
        {"shape": lwsam.adaptive(), "rho": 0.3},
    ),
    "muon": (
        lambda: optax.contrib.muon(0.02),
        {"shape": lwsam.relative("filter"), "rho": 0.1},
    ),
    "chain with clip": (
        lambda: optax.chain(optax.clip_by_global_norm(0.3), sgd()),
        {"shape": lwsam.normalized(), "rho": 0.3, "ascent": lwsam.momentum(1)},
    ),
    "no moment": (
        lambda: optax.sgd(RATE),
        {"shape": CHAIN, "rho": 0.3},
    ),
    "previous, one layer": (
        sgd,
        {
            "shape": lwsam.normalized(),
            "rho": 0.3,
            "ascent": lwsam.previous(),
            "select": lwsam.named("m_mid"),
        },
    ),
    "noise": (
        lambda: optax.adamw(0.02),
        {"shape": lwsam.relative("filter"), "rho": 0.3, "ascent": lwsam.random()},
    ),
}


def explicit(base, dtype, *, shape, rho, ascent, select):
    """The last parameters of a `TrainStep`, which adds the perturbation in each step."""
    if ascent is lwsam.random():
        ascent = SameNoise()
    rule = None if getattr(shape, "of_layers", False) else lwsam.leaves
    method = lwsam.Method(select, rho=rho, ascent=ascent, shape=shape, rule=rule)

    def loss(params, model_state, batch, key):
        return loss_fn(params, batch), (model_state, {})

    with precision(dtype):
        data = batches(dtype)
        step = lwsam.TrainStep(loss, base, method)
        state = step.init(start(dtype), {}, data[0], key=jax.random.key(0))
        for batch in data:
            state, info = step(state, batch)
        assert float(info.rho) == pytest.approx(rho)
        assert bool(info.finite)
        return jax.device_get(state.params)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, np.float64) for case in BASES),
        ("adamw", np.float32),
        ("noise", np.float32),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_it_is_what_a_train_step_does(case, dtype):
    base, options = BASES[case]
    options = {"ascent": lwsam.momentum(), "select": lwsam.everything(), **options}
    own, held = run(lwsam.perturbed(base(), seed=SEED, **options), dtype)
    last = {name: leaf[-1] for name, leaf in own.items()}
    assert_close(last, explicit(base(), dtype, **options), RTOL[dtype])
    moved = [np.any(held[name][-1] != own[name][-1]) for name in own]
    chosen = KERNELS if getattr(options["shape"], "of_layers", False) else tuple(own)
    if "previous" in case:
        chosen = ("m_mid/kernel", "m_mid/bias")
    assert moved == [name in chosen for name in own]


def test_momentum_sam_is_the_published_one():
    """One norm over all leaves, biases too; 3.0 of it is far at this size."""
    own, held = run(lwsam.momentum_sam(sgd(), 0.3))
    rule = family.perturbed(GRADIENT, family.momentum(), family.normalized(), rho=0.3)
    last = follow(rule, STEPS[np.float64])[-1].params
    assert_close({name: leaf[-1] for name, leaf in own.items()}, last)
    gap = [held[name][-1] - own[name][-1] for name in own]
    np.testing.assert_allclose(family.norm_of(gap), 0.3)


def test_complex_parameters_move_against_what_the_base_steps_along():
    """w - rho v / |v|, with the v of w - lr v, whoever conjugates the gradient."""
    params = {"w": jnp.ones((2, 3), jnp.complex64) * (1 + 2j)}
    grads = {"w": jnp.full((2, 3), 1 - 3j, jnp.complex64)}
    tx = lwsam.perturbed(optax.sgd(0.1, momentum=0.9), 0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    held = optax.apply_updates(params, updates)
    own = lwsam.eval_params(state, held)
    assert_close(own, {"w": params["w"] - 0.1 * grads["w"]})
    size = jnp.linalg.norm(own["w"]) / jnp.linalg.norm(grads["w"])
    assert_close(held, {"w": own["w"] - 0.1 * size * grads["w"]}, 1e-5)


# --- the noise ------------------------------------------------------------------------


def still(**options):
    """An optimizer under which only the perturbation moves, for gradients of 0."""
    return lwsam.perturbed(optax.sgd(0.1), **{"rho": 1.0, **options})


def held_points(tx, steps=3, params=None):
    params = PARAMS if params is None else params
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, update, points = tx.init(params), jax.jit(tx.update), [params]
    for _ in range(steps):
        updates, state = update(zeros, state, points[-1])
        points.append(optax.apply_updates(points[-1], updates))
    return points, state


@functools.cache
def noisy_points(seed=SEED):
    tx = still(ascent=lwsam.random(), shape=lwsam.raw(), seed=seed)
    return held_points(tx)[0]


def test_the_noise_can_be_drawn_again():
    for step, point in enumerate(noisy_points()):
        expected = jax.tree.map(jnp.add, PARAMS, noise(PARAMS, step))
        assert_close(point, expected, rtol=1e-5)


def test_gradient_0_is_where_the_loop_starts_and_no_two_draws_are_equal():
    points = noisy_points()
    chex.assert_trees_all_equal(points[0], PARAMS)
    for one, other in ((0, 1), (1, 2), (2, 3)):
        different = jax.tree.map(
            lambda a, b: bool(jnp.all(a != b)), points[one], points[other]
        )
        assert all(jax.tree.leaves(different))


def test_the_seed_is_the_run():
    tx = still(ascent=lwsam.random(), shape=lwsam.raw(), seed=SEED)
    chex.assert_trees_all_equal(held_points(tx)[0], noisy_points())
    another = noisy_points(SEED + 1)[1]["z_in"]["kernel"]
    assert not np.any(another == noisy_points()[1]["z_in"]["kernel"])
