"""TrainStep on a mesh: one device's numbers, whatever is sharded how."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import mesh_task as task
from devices import needs_eight
from plain import enable_x64


pytestmark = needs_eight
STEPS = 20
# Name of the case: mesh, kind of its axes, axes of the batch, specs of the parameters.
CASES = {
    "replicated": ("8", "Auto", None, task.replicated),
    "fully sharded": ("8", "Auto", None, task.fully("data")),
    "tensor parallel": ("4 x 2", "Auto", "data", task.tensors("model")),
    "mixed": ("2 x 2 x 2", "Auto", ("replica", "data"), task.mixed),
    "explicit": ("4 x 2", "Explicit", ("data", "model"), task.fully("data")),
    "explicit, mixed": ("2 x 2 x 2", "Explicit", None, task.mixed),
}


def run(case, method, steps=STEPS):
    shape, kind, axes, specs = CASES[case]
    mesh = task.mesh(shape, kind)
    gather = task.gathered if kind == "Explicit" else lambda w: w
    step = task.make(method, mesh, gather, batch_axes=axes)
    return step, *task.run(step, task.put(mesh, specs), steps)


def assert_same(found, expected, rtol=1e-6):
    """All but keys; the largest difference, in units of the largest element."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        one, other = np.asarray(one), np.asarray(other)
        scale = np.abs(other).max(initial=0) or 1
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * scale)


def assert_as_on_one_device(state, infos, method):
    expected, expected_infos = task.one_device(method, len(infos))
    assert_same(infos, expected_infos)
    assert_same(state._replace(key=jax.random.key_data(state.key)), expected)


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_device(case):
    """Parameters, moments, statistics, selections, values and metrics, in float64."""
    _, state, infos = run(case, "layers")
    assert len({tuple(np.asarray(info.mask)) for info in infos}) > 1
    assert_as_on_one_device(state, infos, "layers")


@pytest.mark.parametrize("method", sorted(set(task.METHODS) - {"layers"}))
@pytest.mark.parametrize("case", ["mixed", "explicit, mixed"])
def test_so_it_is_with_any_method(case, method):
    _, state, infos = run(case, method, 3)
    assert_as_on_one_device(state, infos, method)


@pytest.mark.parametrize("method", ["friendly", "look"])
@pytest.mark.parametrize("case", CASES)
def test_shardings_stay_as_they_came(case, method):
    """Of parameters, of moments, and of what a method remembers of a parameter."""
    specs = CASES[case][3]
    _, state, _ = run(case, method, 2)
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh
    wanted = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    adam = optax.tree_utils.tree_get(state.opt_state, "ScaleByAdamState")
    for tree in (state.params, adam.mu, adam.nu):
        assert jax.tree.map(lambda x: x.sharding, tree) == wanted
    sizes = {x.shape: x.sharding for x in jax.tree.leaves(state.params)}
    kept = jax.tree.leaves(state.method_state.memory)
    assert any(x.shape for x in kept)
    assert all(x.sharding == sizes[x.shape] for x in kept if x.shape)
    others = (adam.count, state.step, state.key, state.model_state, state.hyperparams)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(others))


@pytest.mark.parametrize("method", ["sam", "layers", "look", "momentum"])
@pytest.mark.parametrize("case", ["fully sharded", "explicit, mixed"])
def test_a_nan_that_one_device_sees_is_skipped_by_all(case, method):
    """And the shards stay where they are."""
    shape, kind, axes, specs = CASES[case]
    mesh = task.mesh(shape, kind)
    gather = task.gathered if kind == "Explicit" else lambda w: w
    step = task.make(method, mesh, gather, batch_axes=axes, on_nonfinite="skip")
    broken = {**task.batch(2), "x": task.batch(2)["x"].copy()}
    broken["x"][5, 1] = np.nan
    with enable_x64(True):
        params = task.put(mesh, specs)
        state = step.init(params, task.MODEL_STATE, task.batch(0), key=task.KEY)
        found = []
        for data in (task.batch(0), broken, task.batch(1)):
            state, info = step(state, data)
            what = (state.params, state.opt_state, state.model_state)
            found.append(jax.device_get((what, info.skipped, info.finite)))
            shardings = jax.tree.map(lambda x: x.sharding, state.params)
            assert shardings == jax.tree.map(lambda x: x.sharding, params)
    assert [(int(n), bool(ok)) for _, n, ok in found] == [(0, 1), (1, 0), (1, 1)]
    for a, b in zip(
        jax.tree.leaves(found[0][0]), jax.tree.leaves(found[1][0]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found[2][0]))
