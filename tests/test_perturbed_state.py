"""The state of `perturbed` in checkpoints, skipped steps and sharded loops."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lwsam_jax as lwsam
from chains import LOSS, PARAMS
from devices import DEVICES, needs_eight
from perturbed_task import jitted, kernels_apart, LOW, sgd, train
from plain import assert_close, global_norm


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
