"""BatchNorm statistics at the unperturbed weights: forward only, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import lwsam_jax as lwsam
from devices import DEVICES, needs_eight


RNG = np.random.default_rng(0)
BATCHES = [
    {"x": RNG.normal(size=(16, 3)).astype(np.float32), "scale": np.float32(2.0)}
    for _ in range(4)
]
PARAMS = {"kernel": RNG.normal(size=(3, 2)).astype(np.float32)}
STATE = {
    "mean": np.array([0.5, -0.5], np.float32),
    "drawn": np.float32(0.0),
    "count": np.int32(7),
}
KEY = jax.random.key(5)
PARALLEL = {
    "one device": lambda: None,
    "pmap": lambda: "pmap",
    "mesh": lambda: Mesh(np.array(jax.devices()[:DEVICES]), ("data",)),
    "mesh of two axes": lambda: Mesh(
        np.array(jax.devices()[:DEVICES]).reshape(4, 2), ("one", "two")
    ),
}
EVERYWHERE = [
    name if name == "one device" else pytest.param(name, marks=needs_eight)
    for name in PARALLEL
]


def loss_fn(params, model_state, batch, key):
    """A running average of the outputs, and what the key gives."""
    out = batch["x"] @ params["kernel"] * batch["scale"]
    model_state = {
        "mean": 0.9 * model_state["mean"] + 0.1 * jnp.mean(out, axis=0),
        "drawn": jax.random.uniform(key),
        "count": model_state["count"] + 1,
    }
    return jnp.mean(out**2), (model_state, {"mean": jnp.mean(out)})


def averaged(mean, kernel, batches):
    """The running average, continued."""
    for batch in batches:
        out = batch["x"] @ kernel * batch["scale"]
        mean = 0.9 * mean + 0.1 * out.mean(axis=0)
    return mean


def make(parallel="one device", loss=loss_fn, **options):
    """A step whose gradients are taken far from its weights."""
    method = lwsam.Method(
        lwsam.everything(), rho=0.5, ascent=lwsam.random(), shape=lwsam.relative()
    )
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = lwsam.TrainStep(loss, optimizer, method, PARALLEL[parallel](), **options)
    return step, step.init(PARAMS, STATE, BATCHES[0], key=KEY)


def arrays(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("parallel", EVERYWHERE)
def test_statistics_are_continued_at_the_weights_that_are_used(parallel):
    step, state = make(parallel)
    for batch in BATCHES[:2]:
        state, _ = step(state, batch)
    before = arrays(state)
    refreshed = step.refresh(state, BATCHES[2:])
    kernel, mean = before.params["kernel"], before.model_state["mean"]
    expected = averaged(mean, kernel, BATCHES[2:])
    np.testing.assert_allclose(refreshed.model_state["mean"], expected, rtol=1e-5)
    assert int(refreshed.model_state["count"]) == 7 + 2 + 2
    # Those of the run were not: its gradients are taken elsewhere.
    at_rest = averaged(
        averaged(STATE["mean"], PARAMS["kernel"], BATCHES[:1]), kernel, []
    )
    assert not np.allclose(mean, at_rest, rtol=1e-2)
    # Nothing but the model state is another, and the run goes on from it.
    assert_same(
        arrays(refreshed._replace(model_state=0)), before._replace(model_state=0)
    )
    onward, info = step(refreshed, BATCHES[0])
    assert int(onward.step) == 3
    assert bool(info.finite)


@pytest.mark.parametrize("parallel", EVERYWHERE)
def test_it_donates_nothing_and_changes_nothing_in_place(parallel):
    step, state = make(parallel)
    state, _ = step(state, BATCHES[0])
    before = arrays(state)
    one, other = step.refresh(state, BATCHES), step.refresh(state, BATCHES)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
    assert_same(arrays(state), before)
    assert_same(one.model_state, other.model_state)
    state, _ = step(state, BATCHES[1])  # which does donate it


@pytest.mark.parametrize("parallel", EVERYWHERE)
def test_the_function_gives_what_the_step_gives(parallel):
    """With the key of the run; devices draw for themselves, so but for what is drawn."""
    step, state = make(parallel)
    ours = step.refresh(state, BATCHES).model_state
    theirs = lwsam.refresh(
        loss_fn, state.params, state.model_state, iter(BATCHES), key=KEY
    )
    names = ["mean", "count"] + ["drawn"] * (parallel == "one device")
    for name in names:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)


def test_each_batch_has_a_key_of_its_own():
    drawn = [
        float(lwsam.refresh(loss_fn, PARAMS, STATE, BATCHES[:n], key=KEY)["drawn"])
        for n in (1, 2, 3)
    ]
    expected = [float(jax.random.uniform(jax.random.fold_in(KEY, i))) for i in range(3)]
    assert drawn == pytest.approx(expected)
    assert len(set(drawn)) == 3
    other = lwsam.refresh(loss_fn, PARAMS, STATE, BATCHES[:1], key=jax.random.key(6))
    assert float(other["drawn"]) != drawn[0]
    lwsam.refresh(loss_fn, PARAMS, STATE, BATCHES[:1])  # a key need not be given


@needs_eight
@pytest.mark.parametrize("parallel", ["pmap", "mesh"])
def test_devices_of_pmap_draw_for_themselves_those_of_a_mesh_together(parallel):
    step, state = make(parallel)
    drawn = step.refresh(state, BATCHES[:1]).model_state["drawn"]
    key = jax.random.fold_in(KEY, 0)
    each = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(DEVICES)]
    expected = np.mean(each) if parallel == "pmap" else jax.random.uniform(key)
    np.testing.assert_allclose(drawn, expected, rtol=1e-5)


@pytest.mark.parametrize("parallel", EVERYWHERE)
def test_it_runs_no_backward_pass_and_compiles_once(parallel):
    backward, traced = [], []

    @jax.custom_vjp
    def watched(x):
        return x

    def forward(x):
        backward.append(x)
        return x, None

    watched.defvjp(forward, lambda _, g: (g,))

    def loss(params, model_state, batch, key):
        value, rest = loss_fn(params, model_state, batch, key)
        traced.append(value)
        return watched(value), rest

    step, state = make(parallel, loss)
    backward.clear()
    traced.clear()
    for _ in range(2):  # jax.pmap traces again for a state that it made itself
        state = step.refresh(state, BATCHES[:1])
    assert not backward
    once = len(traced)
    step.refresh(state, BATCHES)
    assert len(traced) == once
    step(state, BATCHES[0])
    assert backward


def test_a_state_that_came_from_elsewhere_needs_no_init():
    step, state = make()
    other = make()[0]
    expected = step.refresh(state, BATCHES).model_state
    fresh = lwsam.TrainStep(loss_fn, optax.sgd(0.1, momentum=0.9), other._method)
    assert_same(fresh.refresh(state, BATCHES).model_state, expected)


def test_no_batch_raises():
    with pytest.raises(ValueError, match="`batches` to be at least one.*Pass some"):
        lwsam.refresh(loss_fn, PARAMS, STATE, [])
    step, state = make()
    with pytest.raises(ValueError, match="`batches` to be at least one.*Pass some"):
        step.refresh(state, iter([]))


def test_what_is_no_loss_raises():
    with pytest.raises(TypeError, match="`loss_fn`"):
        lwsam.refresh(None, PARAMS, STATE, BATCHES)


@needs_eight
@pytest.mark.parametrize("parallel", ["pmap", "mesh"])
def test_a_batch_that_does_not_divide_raises(parallel):
    step, state = make(parallel)
    odd = {**BATCHES[0], "x": BATCHES[0]["x"][:12]}
    with pytest.raises(ValueError, match=r"`batch`.*8.*12"):
        step.refresh(state, [odd])


def test_a_state_that_was_donated_raises():
    step, state = make()
    step(state, BATCHES[0])
    with pytest.raises(ValueError, match="`state`.*donated"):
        step.refresh(state, BATCHES)


def test_the_weights_under_perturbed_are_refreshed_where_they_rest():
    """A loop of one's own, whose parameters are the perturbed ones."""
    tx = lwsam.perturbed(
        optax.sgd(0.1, momentum=0.9),
        0.3,
        ascent=lwsam.random(),
        select=lwsam.everything(),
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    opt_state = tx.init(params)
    grad = jax.grad(lambda p: loss_fn(p, STATE, BATCHES[0], KEY)[0])
    for _ in range(2):
        updates, opt_state = tx.update(grad(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    rest = lwsam.eval_params(opt_state, params)
    assert not np.allclose(rest["kernel"], params["kernel"], rtol=1e-2)
    found = lwsam.refresh(loss_fn, rest, STATE, BATCHES)
    expected = averaged(STATE["mean"], np.asarray(rest["kernel"]), BATCHES)
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-4)
