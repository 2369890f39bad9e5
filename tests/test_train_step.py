"""TrainStep on one device: state, keys, donation, info, covers, errors."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
import nets
from plain import assert_close, two_gradients
from train_nets import (
    batch,
    KEY,
    KEY_KIND,
    loss_fn,
    make,
    MODEL_STATE,
    PARAMS,
    shared,
    small_loss,
    start,
)


@functools.cache
def recorded(steps=4):
    """The selections, states (copied, since they are donated) and infos of a run."""
    state, record = start(), []
    for i in range(steps):
        before = jax.tree.map(jnp.copy, state)
        state, info = shared()(state, batch(i))
        record.append((lwsam.selection(before), before, info))
    return record, state


@functools.partial(jax.jit, static_argnames="selected")
def plain(params, args, selected):
    return two_gradients(loss_fn, params, args, selected, rho=0.3, alpha=0.7)


def test_each_step_is_two_gradients_with_one_key_of_dropout():
    """The metrics tell which key the loss saw."""
    record, last = recorded()
    states = [before for _, before, _ in record[1:]] + [last]
    velocity = jax.tree.map(jnp.zeros_like, PARAMS)
    for i, ((selected, before, info), after) in enumerate(
        zip(record, states, strict=True)
    ):
        key = jax.random.wrap_key_data(info.metrics["key"], impl=KEY_KIND)
        args = (before.model_state, batch(i), key)
        out = plain(before.params, args, selected)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, out.grads)
        params = jax.tree.map(lambda w, v: w - 0.1 * v, before.params, velocity)
        assert_close(after.params, params, rtol=1e-5)
        assert_close(after.model_state, out.aux[0])
        assert_close(
            (info.value, info.perturbed_value), (out.value, out.perturbed_value)
        )
        assert_close(info.metrics, out.aux[1])
        assert_close(info.norms, out.norms)


def test_keys_and_steps_advance():
    record, last = recorded()
    keys = {tuple(np.asarray(info.metrics["key"])) for _, _, info in record}
    assert len(keys) == len(record)
    assert [int(before.step) for _, before, _ in record] == list(range(4))
    assert int(last.step) == int(last.method_state.step_count) == 4
    assert int(last.model_state["count"]) == 4


def test_the_state_says_what_the_next_step_perturbs_and_info_what_this_one_did():
    record, _ = recorded()
    names = shared().layers.names
    assert names == nets.NAMES
    assert record[0][0] == ("a_out",)  # step 0: the deepest
    for selected, _, info in record:
        assert shared().layers.selected(info.mask) == selected
        assert info.norms.shape == info.mask.shape == (3,)
        assert bool(info.finite)
    for (_, _, info), (selected, _, _) in itertools.pairwise(record):
        assert selected == (names[int(np.argmax(info.norms))],)


def test_the_same_state_and_batch_give_the_same_step_bit_for_bit():
    record, last = recorded()
    _, before, _ = record[-1]
    state, _ = shared()(jax.tree.map(jnp.copy, before), batch(3))
    chex.assert_trees_all_equal(
        jax.tree.map(_plain_key, state), jax.tree.map(_plain_key, last)
    )


def _plain_key(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def test_the_state_keeps_structure_shapes_and_dtypes():
    record, last = recorded()
    chex.assert_trees_all_equal_shapes_and_dtypes(record[0][1], last)
    chex.assert_trees_all_equal_structs(record[0][1], last)
    fields = ("params", "model_state", "opt_state", "method_state")
    fields += ("hyperparams", "key", "step", "skipped")
    assert last._fields[: len(fields)] == fields


def test_init_copies_its_inputs_and_each_step_donates_its_state():
    step = shared()
    params = jax.tree.map(jnp.copy, PARAMS)
    model_state = jax.tree.map(jnp.copy, MODEL_STATE)
    state = step.init(params, model_state, batch(), key=KEY)
    after, _ = step(state, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    jax.block_until_ready((params, model_state, jax.random.key_data(KEY)))
    again = step.init(params, model_state, batch(), key=KEY)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((again, after)))


def test_leaves_that_share_a_buffer_are_donated_safely():
    shared_leaf = jnp.ones((2, 2))
    params = {"one": shared_leaf, "two": shared_leaf}

    def loss(params, model_state, batch, key):
        return jnp.sum((batch @ params["one"] @ params["two"]) ** 2), (model_state, {})

    step = make(loss=loss)
    state = step.init(params, shared_leaf, jnp.ones((4, 2)), key=KEY)
    state, _ = step(state, jnp.ones((4, 2)))
    assert not shared_leaf.is_deleted()
    chex.assert_trees_all_equal(state.model_state, jnp.ones((2, 2)))


def test_numpy_parameters_and_batches_are_taken():
    step = make()
    params = jax.tree.map(np.asarray, PARAMS)
    state = step.init(params, jax.tree.map(np.asarray, MODEL_STATE), batch(), key=KEY)
    numpy_batch = jax.tree.map(np.asarray, batch())
    state, _ = step(state, numpy_batch)
    expected, _ = shared()(start(), batch())
    assert_close(state.params, expected.params)


def test_a_restored_state_needs_no_init():
    """As after a restart: a new TrainStep, the state from a checkpoint."""
    record, last = recorded()
    _, before, _ = record[-1]
    state, _ = make()(jax.tree.map(jnp.copy, before), batch(3))
    assert_close(state.params, last.params)


def test_the_selection_is_a_function_of_the_state_alone():
    """Whoever edits the mask, or hands over another run's, is obeyed."""
    step = make(loss=small_loss, k=None, select=lwsam.named("a_out"))
    state, _ = step(start(step), batch())
    assert lwsam.selection(state) == ("a_out",)
    for picked in (["z_in"], ["m_mid"], []):
        mask = jnp.asarray([name in picked for name in nets.NAMES])
        method_state = state.method_state._replace(mask=mask)
        state, info = step(state._replace(method_state=method_state), batch())
        np.testing.assert_array_equal(info.mask, mask)


# --- covers ---------------------------------------------------------------------------


def test_a_run_compiles_no_more_than_it_may():
    traces = []

    def loss(params, model_state, batch, key):
        traces.append(None)
        return small_loss(params, model_state, batch, key)

    step = make(
        loss=loss,
        max_executables=4,
        k=None,
        select=lambda norms, key: jax.random.bernoulli(key, 0.4, norms.shape),
    )
    state = start(step)
    selected = set()
    for i in range(16):
        selected.add(lwsam.selection(state))
        if i == 10:
            traced = len(traces)
            covers = step.executables
        state, _ = step(state, batch(i))
    assert len(selected) > 4
    assert all(isinstance(cover, lwsam.Cover) for cover in step.executables)
    assert len(set(step.executables)) == len(step.executables) <= 4
    if step.executables == covers:
        assert len(traces) == traced


@pytest.mark.parametrize("options", [{"k": 0}, {"rho": 0.0}])
def test_no_layer_or_no_radius_is_the_base_optimizer_bit_for_bit(options):
    step = make(**options)
    state = start(step)
    base = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def plain(params, model_state, opt_state, x, key):
        (value, (model_state, _)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, model_state, x, key
        )
        updates, opt_state = base.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), model_state, opt_state, value

    params, model_state, opt_state = PARAMS, MODEL_STATE, base.init(PARAMS)
    for i in range(3):
        state, info = step(state, batch(i))
        key = jax.random.wrap_key_data(info.metrics["key"], impl=KEY_KIND)
        params, model_state, opt_state, value = plain(
            params, model_state, opt_state, batch(i), key
        )
        chex.assert_trees_all_equal(info.value, value)
        chex.assert_trees_all_equal(info.perturbed_value, value)
        assert not np.any(info.mask)
        assert float(info.overhead) == 0.0
    chex.assert_trees_all_equal(state.params, params)
    chex.assert_trees_all_equal(state.model_state, model_state)
    assert len(step.executables) <= 2  # rho=0 selects, and still perturbs nothing


def test_when_runs_the_other_steps_plain():
    step = make(loss=small_loss, when=lwsam.every(2))
    state = start(step)
    masks, overheads = [], []
    for i in range(4):
        state, info = step(state, batch(i))
        masks.append(bool(np.any(info.mask)))
        overheads.append(float(info.overhead))
    assert masks == [True, False, True, False]
    assert [o > 0 for o in overheads] == masks
    assert lwsam.Cover(()) in step.executables


def test_the_lowered_step_is_of_the_selection_that_is_asked_for():
    step = make(loss=small_loss)
    state = start(step)
    flops = [
        step.lower(state, batch(), selection).compile().cost_analysis()["flops"]
        for selection in ((), ("a_out",), lwsam.Cover(nets.NAMES))
    ]
    assert flops == sorted(flops)
    assert flops[0] < flops[-1]
    assert not state.step.is_deleted()


def test_a_budget_keeps_every_step_below_it():
    bound = 0.5
    step = make(loss=small_loss, k=2, max_overhead=bound)
    state = start(step)
    for i in range(4):
        state, info = step(state, batch(i))
        assert 0 < float(info.overhead) <= bound
        assert not bool(info.mask[nets.NAMES.index("z_in")])


def test_a_budget_below_every_layer_warns_and_runs_plain():
    step = make(loss=small_loss, k=2, max_overhead=0.0)
    with pytest.warns(UserWarning, match=r"`max_overhead`=0\.0.*a_out"):
        state = start(step)
    _, info = step(state, batch())
    assert not np.any(info.mask)


def test_the_base_optimizer_gets_the_clean_loss():
    """`reduce_on_plateau` and its kin ask for `value`."""
    base = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    step = make(base, small_loss)
    state, _ = step(start(step), batch())
    assert int(state.step) == 1


# --- numbers that are none ------------------------------------------------------------


def test_info_says_when_a_step_is_not_finite_and_the_selection_never_sees_it():
    step = shared()
    bad = {**batch(), "x": batch()["x"].at[0, 0].set(jnp.nan)}
    state, info = step(start(), bad)
    assert not bool(info.finite)
    assert lwsam.selection(state) == ()
    _, info = step(start(), batch())
    assert bool(info.finite)


def test_a_bad_step_under_apply_if_finite_is_as_if_it_never_was():
    base = optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=9)
    step = make(base, small_loss)
    state = start(step)
    bad = {**batch(), "x": jnp.full_like(batch()["x"], jnp.nan)}
    state, _ = step(state, bad)
    chex.assert_trees_all_equal(state.params, PARAMS)
    state, _ = step(state, batch(1))
    state, info = step(state, batch(2))
    assert bool(info.finite)
    assert np.any(info.mask)
