"""TrainStep over eight devices equals one device on the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import lwsam_jax as lwsam
import nets
from devices import DEVICES, needs_eight
from plain import assert_close


STEPS = 3
PARAMS = nets.mlp_params()
MODEL_STATE = {
    "mean": jnp.zeros(4),
    "steps": jnp.zeros((), jnp.int32),
    "device": jnp.zeros(()),
}
KEY = jax.random.key(5)


def devices():
    return np.array(jax.devices()[:DEVICES])


PARALLEL = {
    "pmap": lambda: "pmap",
    "mesh": lambda: Mesh(devices(), ("data",)),
    "mesh of two axes": lambda: Mesh(devices().reshape(4, 2), ("replica", "data")),
    "make_mesh": lambda: jax.make_mesh((DEVICES,), ("batch",)),
}


@functools.cache
def batch(seed):
    # Rows of unequal size, so that a mean of wrong weights would show.
    scale = jnp.linspace(0.2, 3.0, 16)[:, None]
    return {"x": nets.weight(16, 4, seed=seed) * scale, "scale": jnp.float32(2.0)}


def loss_fn(params, model_state, batch, key):
    """No BatchNorm and no dropout: the mean over devices is that of the batch."""
    del key
    x = batch["x"] * batch["scale"]
    value, aux = nets.head(params, nets.body(params, x))
    model_state = {
        "mean": 0.9 * model_state["mean"] + 0.1 * jnp.mean(x, axis=0),
        "steps": model_state["steps"] + 1,
        "device": model_state["device"],
    }
    logits = aux["logits"]
    return value, (
        model_state,
        {"mean": jnp.mean(logits), "positive": jnp.sum(logits > 0)},
    )


def make(parallel, loss=loss_fn, **options):
    method = lwsam.LayerwiseSAM(**{"k": 1, "rho": 0.3, "alpha": 0.7, **options})
    return lwsam.TrainStep(loss, optax.sgd(0.1, momentum=0.9), method, parallel)


@functools.cache
def one_device(normalize="none", steps=STEPS):
    return run(make(None, normalize=normalize), steps)


def run(step, steps):
    state = step.init(PARAMS, MODEL_STATE, batch(0), key=KEY)
    infos = []
    for i in range(steps):
        state, info = step(state, batch(i))
        infos.append(info)
    return state, infos


@needs_eight
@pytest.mark.parametrize("name", PARALLEL)
def test_eight_devices_are_one_device(name):
    """Parameters, model state, optimizer state, selections, values and metrics."""
    state, infos = run(make(PARALLEL[name]()), STEPS)
    expected, expected_infos = one_device()
    for info, wanted in zip(infos, expected_infos, strict=True):
        np.testing.assert_array_equal(info.mask, wanted.mask)
        assert int(info.metrics["positive"]) == int(wanted.metrics["positive"])
        assert_close(
            (info.value, info.perturbed_value, info.norms, info.metrics["mean"]),
            (
                wanted.value,
                wanted.perturbed_value,
                wanted.norms,
                wanted.metrics["mean"],
            ),
            rtol=3e-6,
        )
    masks = {tuple(np.asarray(info.mask)) for info in infos}
    assert len(masks) > 1, "the selection never changes"
    assert_close(state.params, expected.params, rtol=3e-6)
    assert_close(state.model_state, expected.model_state, rtol=3e-6)
    assert_close(state.opt_state, expected.opt_state, rtol=3e-5)
    # No leaf has a device axis.
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(state)]
    assert shapes == [jnp.shape(leaf) for leaf in jax.tree.leaves(expected)]
    assert lwsam.selection(state) == lwsam.selection(expected)


@needs_eight
@pytest.mark.parametrize("name", ["pmap", "mesh"])
def test_so_it_is_with_a_normalized_perturbation(name):
    """The norm is that of the mean gradient, not the mean of eight norms."""
    state, _ = run(make(PARALLEL[name](), normalize="selected"), 2)
    expected, _ = one_device("selected", 2)
    assert_close(state.params, expected.params, rtol=3e-6)


@needs_eight
def test_devices_of_pmap_draw_for_themselves_and_share_their_statistics():
    """The loss sees a key of its own on each device, and may use the axis by name."""

    def loss(params, model_state, batch, key):
        value, (model_state, _) = loss_fn(params, model_state, batch, key)
        index = jax.lax.axis_index(step.axis_name)
        drawn = jax.random.uniform(key)
        model_state = {**model_state, "device": index.astype(jnp.float32)}
        metrics = {
            "drawn": jnp.zeros(DEVICES).at[index].set(DEVICES * drawn),
            "rows": len(batch["x"]),
        }
        return value, (model_state, metrics)

    step = make("pmap", loss)
    state, (info,) = run(step, 1)
    assert len(set(np.asarray(info.metrics["drawn"]))) == DEVICES
    assert int(info.metrics["rows"]) == 16
    assert float(state.model_state["device"]) == np.mean(range(DEVICES))
    assert int(state.model_state["steps"]) == 1


@needs_eight
@pytest.mark.parametrize("name", PARALLEL)
def test_a_batch_that_does_not_divide_raises(name):
    step = make(PARALLEL[name]())
    odd = {**batch(0), "x": batch(0)["x"][:12]}
    with pytest.raises(ValueError, match=r"`batch`.*8.*12"):
        step.init(PARAMS, MODEL_STATE, odd, key=KEY)
    state = step.init(PARAMS, MODEL_STATE, batch(0), key=KEY)
    with pytest.raises(ValueError, match=r"`batch`.*8.*12"):
        step(state, odd)
    assert not state.step.is_deleted()


@needs_eight
@pytest.mark.parametrize("name", ["pmap", "mesh"])
def test_inputs_stay_usable_and_the_state_can_be_read_back(name):
    step = make(PARALLEL[name]())
    params = jax.tree.map(jnp.copy, PARAMS)
    state = step.init(params, MODEL_STATE, batch(0), key=KEY)
    state, _ = step(state, batch(0))
    jax.block_until_ready((params, MODEL_STATE))
    # As a checkpoint would: to the host and back, into a new step of another kind.
    keyless = jax.device_get(state._replace(key=jax.random.key_data(state.key)))
    host = jax.tree.map(jnp.asarray, keyless)
    host = host._replace(key=jax.random.wrap_key_data(host.key))
    state, _ = make(None)(host, batch(1))
    expected, _ = run(make(None), 2)
    assert_close(state.params, expected.params, rtol=3e-6)


@needs_eight
@pytest.mark.parametrize("name", ["pmap", "mesh"])
def test_a_call_under_jit_raises(name):
    step = make(PARALLEL[name]())
    state = step.init(PARAMS, MODEL_STATE, batch(0), key=KEY)
    with pytest.raises(TypeError, match=r"`state`.*jit"):
        jax.jit(step)(state, batch(0))
