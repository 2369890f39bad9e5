"""`perturbed`, `momentum_sam`: optimizers whose loop holds perturbed parameters."""

import contextlib
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import family_reference as family
import lwsam_jax as lwsam
import reference
from chains import LOSS, PARAMS
from devices import DEVICES, needs_eight
from lwsam_jax._axes.noise import normal_like
from plain import assert_close, enable_x64, global_norm
from test_transform_errors import says


STEPS = {np.float64: 100, np.float32: 20}
RTOL = {np.float64: 1e-6, np.float32: 1e-5}
RATE, MOMENTUM, SEED = 0.3, 0.9, 7
KERNELS = tuple(leaves[0] for leaves in reference.WEIGHTS.values())
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


def distance(one, other):
    gap = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), one, other)
    return float(global_norm(jax.tree.leaves(gap)))


def follow(rule, steps, momentum=MOMENTUM):
    return family.trajectory(
        rule,
        reference.mlp_params(),
        reference.mlp_batches(steps),
        learning_rate=RATE,
        momentum=momentum,
    )


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


# --- parameters below float32 ---------------------------------------------------------


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


# --- eval_params and train_params -----------------------------------------------------


LABELS = {"a_out": "ours", "m_mid": "ours", "z_in": "theirs"}
PLACES = {
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), lwsam.perturbed(sgd(), 0.1)
    ),
    "random": lambda: lwsam.perturbed(sgd(), 0.1, ascent=lwsam.random()),
    "adaptive": lambda: lwsam.perturbed(sgd(), 0.1, shape=lwsam.adaptive()),
    "MultiSteps": lambda: optax.MultiSteps(lwsam.perturbed(sgd(), 0.1), 2),
    "multi_transform, both": lambda: optax.multi_transform(
        {
            "ours": lwsam.perturbed(sgd(), 0.1),
            "theirs": lwsam.momentum_sam(optax.adam(0.1), 0.3),
        },
        LABELS,
    ),
    "multi_transform, one": lambda: optax.multi_transform(
        {"ours": lwsam.perturbed(sgd(), 0.1), "theirs": optax.set_to_zero()}, LABELS
    ),
    "masked": lambda: optax.masked(
        lwsam.perturbed(sgd(), 0.1, ascent=lwsam.previous()),
        {"a_out": True, "m_mid": True, "z_in": False},
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda learning_rate, rho: lwsam.perturbed(
            optax.sgd(learning_rate, momentum=0.9), rho
        )
    )(learning_rate=0.3, rho=0.1),
    "inject_hyperparams of itself": lambda: optax.inject_hyperparams(lwsam.perturbed)(
        sgd(), rho=0.1
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(lwsam.perturbed(sgd(), 0.1), 3),
}


def kernels_apart(one, other):
    """Which layers have weights that differ."""
    return tuple(n for n in one if np.any(one[n]["kernel"] != other[n]["kernel"]))


@pytest.mark.parametrize("place", PLACES)
def test_eval_params_finds_the_state_and_train_params_goes_back(place):
    params, state = train(PLACES[place]())
    own = lwsam.eval_params(state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(own, params)
    moved = ("a_out", "m_mid", "z_in")
    if place in ("multi_transform, one", "masked"):
        moved = moved[:2]
    assert kernels_apart(own, params) == moved
    # Relative to the weights, a tenth of each layer but for the other's optimizer.
    for name in moved:
        if (place, name) != ("multi_transform, both", "z_in"):
            gap = jnp.linalg.norm(own[name]["kernel"] - params[name]["kernel"])
            size = jnp.linalg.norm(own[name]["kernel"])
            if place != "adaptive":
                np.testing.assert_allclose(gap, 0.1 * size, rtol=1e-4)
    assert_close(lwsam.train_params(state, own), params)
    under_jit = jax.jit(lwsam.eval_params)(state, params)
    assert_close(under_jit, own)


def test_inside_multi_transform_each_part_is_that_of_its_own_tree():
    """MaskedNodes pass through: as if the others' leaves were not there."""
    grads = jax.grad(LOSS)(PARAMS)
    tx = PLACES["multi_transform, both"]()
    state, params = tx.init(PARAMS), PARAMS
    alone = lwsam.momentum_sam(optax.adam(0.1), 0.3)
    part = {"z_in": PARAMS["z_in"]}
    part_state = alone.init(part)
    update, update_alone = jax.jit(tx.update), jax.jit(alone.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, part_state = update_alone({"z_in": grads["z_in"]}, part_state, part)
        part = optax.apply_updates(part, updates)
    assert_close(params["z_in"], part["z_in"])
    own = lwsam.eval_params(state, params)
    assert_close(own["z_in"], lwsam.eval_params(part_state, part)["z_in"])


def test_multi_steps_around_it_is_the_mean_gradient_at_the_held_point():
    params, state = train(PLACES["MultiSteps"](), 4)
    expected, expected_state = train(lwsam.perturbed(sgd(), 0.1), 2)
    assert_close(params, expected, 1e-5)
    own = lwsam.eval_params(state, params)
    assert_close(own, lwsam.eval_params(expected_state, expected), 1e-5)


def test_an_optimizer_that_is_made_anew_in_each_update_compiles_once():
    """`inject_hyperparams` calls the factory at init and in each update."""
    tx = PLACES["inject_hyperparams"]()
    params, state, step = PARAMS, tx.init(PARAMS), jitted(tx)
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1
    body = lambda carry, _: (step(*carry), None)
    (again, _), _ = jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), length=3)
    assert_close(again, params)


def test_an_injected_radius_is_that_of_the_next_step():
    tx = PLACES["inject_hyperparams"]()
    params, state = train(tx, 2)
    state.hyperparams["rho"] = jnp.float32(0.0)
    params, state = train(tx, 1, params, state)
    chex.assert_trees_all_equal(lwsam.eval_params(state, params), params)


@pytest.mark.parametrize("read", [lwsam.eval_params, lwsam.train_params])
def test_none_or_two_of_one_leaf_or_other_parameters_raise(read):
    state = lwsam.perturbed(sgd(), 0.1).init(PARAMS)
    for tree, params, got in (
        (sgd().init(PARAMS), PARAMS, "none"),
        ({}, PARAMS, "none"),
        ((state, state), PARAMS, "two"),
        (state, {"other": jnp.ones((2, 2))}, "others"),
        (state, PARAMS["z_in"], "others"),
    ):
        with pytest.raises(ValueError, match="perturb|parameters") as error:
            read(tree, params)
        says(error, "opt_state", got)


def test_a_shape_with_a_state_has_no_way_back():
    params, state = train(lwsam.perturbed(sgd(), 0.3, shape=CHAIN), 2)
    own = lwsam.eval_params(state, params)
    with pytest.raises(ValueError, match="Keep the parameters") as error:
        lwsam.train_params(state, own)
    says(error, "opt_state")


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "argument", "words"),
    [
        ({"ascent": lwsam.whole_batch()}, ValueError, "ascent", "TrainStep"),
        ({"ascent": lwsam.micro_batch(0.1)}, ValueError, "ascent", "momentum()"),
        ({"ascent": lambda batch, key: batch}, ValueError, "ascent", "TrainStep"),
        ({"k": 1, "select": lwsam.top_k(1)}, ValueError, "k", "both"),
        ({"k": -1}, ValueError, "k", "-1"),
        ({"k": 1.0}, TypeError, "k", "1.0"),
        ({"rho": -0.1}, ValueError, "rho", "-0.1"),
        ({"rho": float("nan")}, ValueError, "rho", "nan"),
        ({"rho": "0.1"}, TypeError, "rho", "'0.1'"),
        ({"rho": None}, TypeError, "rho", "None"),
        ({"base": 0.1}, TypeError, "base", "0.1"),
        ({"base": optax.sgd}, TypeError, "base", "optax.sgd(0.1, momentum=0.9)"),
        ({"shape": "relative"}, TypeError, "shape", "'relative'"),
        ({"shape": lwsam.relative}, TypeError, "shape", "relative()"),
        ({"ascent": "momentum"}, TypeError, "ascent", "'momentum'"),
        ({"select": "a_out"}, TypeError, "select", "'a_out'"),
        ({"rule": "weights"}, TypeError, "rule", "'weights'"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_right_is_refused_with_the_remedy(
    options, kind, argument, words
):
    options = {"base": sgd(), "rho": 0.1, **options}
    with pytest.raises(kind) as error:
        lwsam.perturbed(**options).init(PARAMS)
    says(error, argument, words)


def test_missing_parameters_raise():
    for rho in (0.1, 0):
        tx = lwsam.perturbed(sgd(), rho)
        with pytest.raises(ValueError, match=r"tx\.update") as error:
            tx.update(PARAMS, tx.init(PARAMS))
        says(error, "params", "None")


def test_more_layers_than_there_are_raises():
    tx = lwsam.perturbed(sgd(), 0.1, k=9)
    with pytest.raises(ValueError, match="a_out") as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    says(error, "k", "9")


@pytest.mark.parametrize("inner", [lwsam.perturbed(sgd(), 0.1), lwsam.sam(0.1)])
def test_a_train_step_does_not_perturb_twice(inner):
    if isinstance(inner, lwsam.Method):
        inner = lwsam.as_optax(inner)
    loss = lambda params, model_state, batch, key: (LOSS(params), (model_state, {}))
    step = lwsam.TrainStep(loss, optax.chain(inner, sgd()), lwsam.sam(0.1))
    with pytest.raises(ValueError, match="TrainStep") as error:
        step.init(PARAMS, {}, jnp.zeros(2), key=jax.random.key(0))
    says(error, "base_optimizer")


def test_gradients_of_another_structure_raise():
    tx = lwsam.perturbed(sgd(), 0.1)
    with pytest.raises(ValueError, match="structure") as error:
        tx.update(PARAMS["z_in"], tx.init(PARAMS), PARAMS)
    says(error, "updates")


# --- keywords -------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.1, 0], ids=["rho 0.1", "rho 0"])
def test_unknown_keywords_are_ignored(rho):
    """Levanter always passes the first three; NNX users pass `value`."""
    tx = lwsam.perturbed(sgd(), rho)
    grads, state = jax.grad(LOSS)(PARAMS), tx.init(PARAMS)
    update = lambda **extra: tx.update(grads, state, PARAMS, **extra)
    extra = {"obj_fn": LOSS, "loss": 1.0, "grams": None, "value": 1.0, "unheard_of": 3}
    chex.assert_trees_all_equal(update(**extra)[0], update()[0])


def test_the_value_reaches_a_base_that_wants_it():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    tx = lwsam.perturbed(optax.chain(sgd(), plateau), 0.1)
    grads, state = jax.grad(LOSS)(PARAMS), tx.init(PARAMS)
    update = jax.jit(lambda state, value: tx.update(grads, state, PARAMS, value=value))
    for _ in range(5):
        _, state = update(state, 1.0)
    assert float(optax.tree.get(state, "scale")) < 1.0


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


# --- checkpoints ----------------------------------------------------------------------


SAVED = {
    "momentum": lambda: lwsam.perturbed(sgd(), 0.1),
    "random, k": lambda: lwsam.perturbed(sgd(), 0.1, ascent=lwsam.random(), k=1),
    "adaptive, in a chain": lambda: optax.chain(
        optax.clip(1.0),
        lwsam.perturbed(optax.sgd(0.1), lambda t: 0.1, shape=lwsam.adaptive()),
    ),
    "mixed": lambda: lwsam.perturbed(sgd(), 0.1, ascent=lwsam.previous()),
}


@pytest.mark.filterwarnings("ignore")  # Orbax's own
@pytest.mark.parametrize("name", SAVED)
def test_a_run_that_was_saved_goes_on_bit_for_bit(name, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    serialization = pytest.importorskip("flax.serialization")
    tx = SAVED[name]()
    params = LOW["mixed"] if name == "mixed" else PARAMS
    step = jitted(tx)

    def go_on(params, state):
        for _ in range(3):
            params, state = step(params, state)
        return params, state

    half = go_on(params, tx.init(params))
    unbroken = go_on(*half)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", half)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, half)
        restored = checkpointer.restore(tmp_path / "saved", abstract)
    chex.assert_trees_all_equal_structs(restored, half)
    chex.assert_trees_all_equal(go_on(*restored), unbroken)
    # A new process has an optimizer and a state of its own making, and the bytes.
    tx = SAVED[name]()
    step = jitted(tx)
    target = (params, tx.init(params))
    restored = serialization.from_bytes(target, serialization.to_bytes(half))
    restored = jax.tree.map(jnp.asarray, restored)
    chex.assert_trees_all_equal_structs(restored, target)
    resumed = go_on(*restored)
    for ours, theirs in zip(
        jax.tree.leaves(resumed), jax.tree.leaves(unbroken), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_map_params_maps_what_is_shaped_like_the_parameters():
    """How trainers shard a state: the moment, and the copies that are kept."""
    for options in ({}, {"shape": lwsam.adaptive()}, {"ascent": lwsam.previous()}):
        tx = lwsam.perturbed(sgd(), 0.1, **options)
        state = tx.init(PARAMS)
        doubled = optax.tree.map_params(tx, lambda x: 2 * x + 1, state)
        trace = optax.tree.get(doubled, "trace")
        chex.assert_trees_all_equal(trace, jax.tree.map(jnp.ones_like, PARAMS))
        chex.assert_trees_all_equal(doubled.step_count, state.step_count)
        chex.assert_trees_all_equal(doubled.factors, state.factors)
        if options:
            kept = doubled.kept if "shape" in options else doubled.ascent
            before = state.kept if "shape" in options else state.ascent
            twice = jax.tree.map(lambda x: 2 * x + 1, before)
            chex.assert_trees_all_equal(kept, twice)


def test_map_params_maps_a_state_of_mixed_precision():
    """It keeps the parameters below float32, and no others."""
    tx = lwsam.perturbed(sgd(), 0.1)
    state = tx.init(LOW["mixed"])
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    expected = jax.tree.map(lambda x: 2 * x, state.kept)
    assert jax.tree.leaves(expected)
    chex.assert_trees_all_equal(doubled.kept, expected)


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        (None, {}),
        ("bfloat16", {}),
        (None, {"shape": lwsam.adaptive()}),
        (None, {"ascent": lwsam.previous()}),
    ],
    ids=["float32", "bfloat16", "adaptive", "previous"],
)
def test_parameters_and_state_can_be_donated(precision, options):
    """They never share a buffer, the kept copy neither."""
    tx = lwsam.perturbed(sgd(), 0.1, **options)
    params = jax.tree.map(jnp.copy, LOW[precision] if precision else PARAMS)
    expected, _ = train(tx, 2, params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(jax.grad(LOSS)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state)
    assert_close(params, expected)


# --- steps that are skipped -----------------------------------------------------------


@pytest.mark.parametrize("how", ["apply_if_finite", "the loop"])
def test_a_step_that_is_skipped_leaves_all_as_it_was(how):
    inner = lwsam.perturbed(sgd(), 0.1, ascent=lwsam.random())
    tx = optax.apply_if_finite(inner, 5) if how == "apply_if_finite" else inner

    @jax.jit
    def step(params, state, scale):
        grads = jax.grad(lambda p: scale * LOSS(p))(params)

        def take(params, state):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        if tx is not inner:
            return take(params, state)
        finite = jnp.isfinite(global_norm(jax.tree.leaves(grads)))
        return jax.lax.cond(finite, take, lambda *old: old, params, state)

    expected, expected_state = train(inner, 4)
    params, state = PARAMS, tx.init(PARAMS)
    for scale in (1.0, 1.0, jnp.nan, 1.0, jnp.inf, 1.0):
        before = params, lwsam.eval_params(state, params)
        params, state = step(params, state, scale)
        if not np.isfinite(scale):
            own = lwsam.eval_params(state, params)
            chex.assert_trees_all_equal((params, own), before)
    assert_close(params, expected)
    own = lwsam.eval_params(state, params)
    assert_close(own, lwsam.eval_params(expected_state, expected))


def test_a_layer_whose_gradient_is_not_finite_is_not_perturbed():
    """And what was added before is still taken away."""
    base = optax.chain(optax.zero_nans(), optax.adam(0.1))
    tx = lwsam.perturbed(base, 0.1, k=3)
    params, state = train(tx, 2)
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    grads["z_in"]["kernel"] = jnp.full_like(grads["z_in"]["kernel"], jnp.nan)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    own = lwsam.eval_params(state, params)
    assert kernels_apart(own, params) == ("a_out", "m_mid")
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((params, own)))
    chex.assert_trees_all_equal_shapes_and_dtypes(own, PARAMS)


# --- sharded parameters ---------------------------------------------------------------


def sharded_problem():
    """Weights cut over eight devices by their first axis, biases whole, batch cut."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    cut, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("data",), ()))
    rng = np.random.default_rng(0)
    sizes = {"a": (16, 24), "b": (24, 16), "c": (16, 8)}
    params = {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape) / 4, jnp.float32),
            "bias": jnp.zeros(shape[1]),
        }
        for name, shape in sizes.items()
    }
    place = lambda x: jax.device_put(x, cut if x.ndim == 2 else whole)
    x = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)

    def loss(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return jnp.mean(x**2)

    return loss, params, jax.tree.map(place, params), x, jax.device_put(x, cut)


def sharded_step(tx, loss):
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return step


@needs_eight
@pytest.mark.parametrize(
    "options",
    [{}, {"ascent": lwsam.random(), "shape": lwsam.adaptive()}],
    ids=["momentum, relative", "random, adaptive"],
)
def test_sharded_parameters_keep_their_shardings(options):
    loss, params, placed, x, placed_x = sharded_problem()
    tx = lwsam.perturbed(sgd(), 0.1, **options)
    step = jax.jit(sharded_step(tx, loss))
    expected, state = params, jax.jit(tx.init)(placed)
    expected_state = tx.init(params)
    held = placed
    for _ in range(3):
        held, state = step(held, state, placed_x)
        expected, expected_state = step(expected, expected_state, x)
    is_kept = lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim)
    own = jax.jit(lwsam.eval_params)(state, held)
    shaped = [held, own, optax.tree.get(state, "trace")]
    shaped += [state.kept] if jax.tree.leaves(state.kept) else []
    for tree in shaped:
        assert all(jax.tree.leaves(jax.tree.map(is_kept, tree, placed)))
    assert_close(held, expected, 1e-5)
    assert_close(own, lwsam.eval_params(expected_state, expected), 1e-5)


def reduced(step, *args):
    """The shapes that the compiled step reduces over the devices, and how it moves."""
    text = jax.jit(step).lower(*args).compile().as_text()
    shapes = []
    for line in re.findall(r"= (.*?) all-reduce(?:-start)?\(", text):
        shapes += re.findall(r"\w+\[[\d,]*\]", line)
    others = re.findall(r" (all-gather|all-to-all|collective-permute)\S*\(", text)
    return sorted(shapes), sorted(others)


@needs_eight
@pytest.mark.parametrize("cut", [False, True], ids=["whole weights", "cut weights"])
def test_momentum_sam_adds_the_reduction_of_one_norm_and_nothing_else(cut):
    """One scalar for each weight that is cut, all of them independent; else none."""
    loss, _, placed, _, x = sharded_problem()
    if not cut:
        whole = NamedSharding(x.sharding.mesh, PartitionSpec())
        placed = jax.device_put(placed, whole)
    found = []
    for tx in (sgd(), lwsam.momentum_sam(sgd(), 0.3)):
        state = jax.jit(tx.init)(placed)
        found.append(reduced(sharded_step(tx, loss), placed, state, x))
    (base, base_others), (ours, others) = found
    assert others == base_others
    assert len(base) == 6
    assert [s for s in ours if s != "f32[]"] == base
    assert ours.count("f32[]") <= (3 if cut else 0)
