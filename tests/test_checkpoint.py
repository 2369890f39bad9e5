"""A run that is saved by Orbax and restored goes on bit for bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import lwsam_jax as lwsam
import nets
from plain import take_step


CASE = nets.mlp()
LOSS = lambda p: CASE.loss(p, *CASE.args)[0]


@pytest.fixture
def round_trip(tmp_path):
    """Saves a tree and restores it from disk into its abstract shape."""
    ocp = pytest.importorskip("orbax.checkpoint")

    def run(tree):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "saved", tree)
            checkpointer.wait_until_finished()
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            return checkpointer.restore(tmp_path / "saved", abstract)

    return run


@pytest.mark.filterwarnings("ignore")  # Orbax's own
def test_the_optimizer_state_survives_a_round_trip(round_trip):
    tx = optax.chain(
        lwsam.layerwise_sam(k=1, rho=0.3, alpha=0.7), optax.sgd(0.1, momentum=0.9)
    )

    @functools.partial(jax.jit, static_argnames="selection")
    def step(params, opt_state, selection):
        return take_step(tx, LOSS, params, opt_state, selection=selection)

    def train(params, opt_state, steps):
        for _ in range(steps):
            selection = lwsam.selection(opt_state, cover="depth")
            params, opt_state = step(params, opt_state, selection)
        return params, opt_state

    half = train(CASE.params, tx.init(CASE.params), 2)
    restored = round_trip(half)
    chex.assert_trees_all_equal_structs(restored, half)
    chex.assert_trees_all_equal(restored, half)
    assert lwsam.selection(restored) == lwsam.selection(half)
    chex.assert_trees_all_equal(train(*restored, 3), train(*half, 3))


KEEPING = {
    "layers": lambda: lwsam.LayerwiseSAM(k=1, rho=0.3, alpha=0.7),
    "a gate": lambda: lwsam.ae_sam(0.3, 6),
    "a bandit": lambda: lwsam.sl_sam(0.3, 1),
    "elements": lambda: lwsam.sparse_sam(0.3, period=2),
    "subspaces": lambda: lwsam.lorenza(0.3, rank=2, period=2),
    "a delay": lambda: lwsam.async_sam(0.3),
}


@pytest.mark.parametrize("kept", KEEPING)
@pytest.mark.filterwarnings("ignore")
def test_the_train_state_survives_a_round_trip(round_trip, kept):
    """The typed key travels as its data: what Orbax does with keys is its own."""

    def loss(params, model_state, batch, key):
        noise = 0.1 * jax.random.uniform(key)
        value, aux = CASE.loss(params, batch + noise)
        return value, ({"mean": 0.9 * model_state["mean"] + aux["hidden"]}, {})

    def make():
        optimizer = optax.sgd(0.1, momentum=0.9)
        return lwsam.TrainStep(loss, optimizer, KEEPING[kept]())

    def train(step, state, steps):
        for i in range(steps):
            state, _ = step(state, nets.weight(6, 4, seed=i))
        return state

    step = make()
    x = nets.weight(6, 4)
    start = step.init(CASE.params, {"mean": jnp.zeros(())}, x, key=jax.random.key(3))
    half = train(step, start, 3)
    saved = half._replace(key=jax.random.key_data(half.key))
    restored = round_trip(saved)
    chex.assert_trees_all_equal(restored, saved)
    restored = restored._replace(key=jax.random.wrap_key_data(restored.key))
    assert lwsam.selection(restored) == lwsam.selection(half)
    unbroken = train(step, half, 3)
    resumed = train(make(), restored, 3)  # a new process has no executables yet
    strip = lambda state: state._replace(key=jax.random.key_data(state.key))
    chex.assert_trees_all_equal(strip(resumed), strip(unbroken))
