"""float16 with a loss scale that looks at both passes, in TrainStep and by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from devices import needs_eight
from plain import assert_close


KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 8))
Y = jnp.stack([X[:, 0] * X[:, 1], jnp.sin(X[:, 2])], 1)
PARAMS = {
    "first": 0.3 * jax.random.normal(jax.random.key(1), (8, 16)),
    "last": 0.3 * jax.random.normal(jax.random.key(2), (16, 2)),
}
# Powers of two, so that a gradient in float16 is the same times the scale.
SCALER = lwsam.DynamicLossScale(initial=2.0**8, period=3)


def loss_of(params, x, y, dtype=jnp.float16, factor=1.0):
    """The network in one precision, the loss in float32."""
    low = jax.tree.map(lambda w: w.astype(dtype), params)
    out = jnp.tanh(x.astype(dtype) @ low["first"]) @ low["last"]
    return factor * jnp.mean((out.astype(jnp.float32) - y) ** 2)


def step_loss(params, model_state, batch, key):
    del key
    return loss_of(params, batch["x"], batch["y"], factor=batch["factor"]), (
        model_state,
        {},
    )


def data(factor=1.0):
    return {"x": X, "y": Y, "factor": jnp.float32(factor)}


def make(method=None, loss_scale=SCALER, loss=step_loss, **options):
    method = lwsam.sam(0.05) if method is None else method
    base = optax.sgd(0.1, momentum=0.9)
    return lwsam.TrainStep(loss, base, method, loss_scale=loss_scale, **options)


def start(step):
    return step.init(PARAMS, {}, data(), key=KEY)


# --- the scale itself -------------------------------------------------------------------


def test_it_halves_on_overflow_grows_after_a_period_and_stays_above_the_minimum():
    scaler = lwsam.DynamicLossScale(initial=16.0, factor=4.0, period=2, minimum=2.0)
    state, found = scaler.init(), []
    for finite in (True, False, False, True, False, True, True, True, True, True):
        state = scaler.update(state, jnp.asarray(finite))
        found.append((float(state.scale), int(state.good_steps)))
    assert found == [
        (16.0, 1),
        (4.0, 0),
        (2.0, 0),
        (2.0, 1),
        (2.0, 0),
        (2.0, 1),
        (8.0, 0),
        (8.0, 1),
        (32.0, 0),
        (32.0, 1),
    ]


def test_it_never_grows_to_infinity():
    scaler = lwsam.DynamicLossScale(initial=2.0**126, period=1)
    state = scaler.init()
    for _ in range(4):
        state = scaler.update(state, jnp.asarray(True))
    assert float(state.scale) == 2.0**127


@pytest.mark.parametrize(
    ("arguments", "kind", "name"),
    [
        ({"initial": 0.0}, ValueError, "initial"),
        ({"initial": float("inf")}, ValueError, "initial"),
        ({"factor": 1.0}, ValueError, "factor"),
        ({"period": 0}, ValueError, "period"),
        ({"period": 1.5}, TypeError, "period"),
        ({"minimum": -1.0}, ValueError, "minimum"),
        ({"initial": "large"}, TypeError, "initial"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, kind, name):
    with pytest.raises(kind, match=rf"DynamicLossScale: expected `{name}`"):
        lwsam.DynamicLossScale(**arguments)


@pytest.mark.parametrize("value", ["dynamic", True, optax.sgd(0.1)])
def test_a_loss_scale_is_one_or_a_number(value):
    with pytest.raises(TypeError, match="`loss_scale` to be a loss scale"):
        make(loss_scale=value)
    with pytest.raises(ValueError, match="`loss_scale` to be finite and > 0"):
        make(loss_scale=0.0)


# --- gradients --------------------------------------------------------------------------

FORMS = {
    "plain": ((), {}),
    "one layer": (("last",), {"rho": 0.1, "alpha": 0.8}),
    "both": (("first", "last"), {"rho": 0.1, "alpha": 0.8, "normalize": "selected"}),
    "all": (("last",), {"rho": 0.1, "alpha": 0.8, "normalize": "full"}),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("part", [None, slice(8)])
def test_in_float32_the_scale_changes_nothing(name, part):
    """But what a compiler rounds otherwise that does not know the cotangent."""
    selection, options = FORMS[name]
    options = {"rho": 0.1, "alpha": 1.0, **options}
    loss = functools.partial(loss_of, dtype=jnp.float32)
    form = lwsam.value_and_grad(loss, selection, **options)
    ascent = None if part is None else (X[part], Y[part])
    run = jax.jit(
        lambda scale: form(PARAMS, X, Y, ascent_args=ascent, loss_scale=scale)
    )
    bare = jax.jit(lambda: form(PARAMS, X, Y, ascent_args=ascent))()
    found = run(jnp.float32(2.0**10))
    assert_close(found, bare, 1e-5)


def test_what_float16_would_lose_is_kept():
    """Gradients below its smallest number: 0 without the scale, right with it."""
    tiny = functools.partial(loss_of, factor=1e-7)
    form = jax.jit(lwsam.value_and_grad(tiny, ("last",), rho=1e6, alpha=0.8))
    exact = functools.partial(loss_of, dtype=jnp.float32, factor=1e-7)
    expected = lwsam.value_and_grad(exact, ("last",), rho=1e6, alpha=0.8)(PARAMS, X, Y)
    lost = form(PARAMS, X, Y)
    kept = form(PARAMS, X, Y, loss_scale=2.0**15)
    distance = lambda a: np.linalg.norm(a.grads["first"] - expected.grads["first"])
    size = np.linalg.norm(expected.grads["first"])
    assert distance(lost) > 0.3 * size
    assert distance(kept) < 0.01 * size
    np.testing.assert_allclose(kept.norms, expected.norms, rtol=0.01)
    np.testing.assert_allclose(kept.value, expected.value, rtol=0.01)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_parameters_below_float32_are_perturbed_from_unscaled_float32(dtype):
    """The direction keeps what the dtype of the parameters would round away."""
    params = {"w": jnp.full((64, 64), 0.5, dtype)}
    # The gradient, 1e-8, is 0 in float16; scaled it is not.
    loss = lambda p: 1e-8 * jnp.sum(p["w"].astype(jnp.float32))
    form = lwsam.value_and_grad(loss, ("w",), rho=16.0, alpha=1.0, normalize="selected")
    out = form(params, loss_scale=2.0**15)
    np.testing.assert_allclose(out.perturbation_norm, 16.0, rtol=0.01)
    np.testing.assert_allclose(out.norms[0], 64e-8, rtol=0.01)
    assert out.grads["w"].dtype == dtype


# --- TrainStep --------------------------------------------------------------------------


def what_stays(state):
    return state.params, state.opt_state, state.method_state.norms


@pytest.mark.parametrize(
    "method",
    [
        lambda: lwsam.sam(0.05),
        lambda: lwsam.LayerwiseSAM(k=1, rho=0.05, alpha=0.8),
        lambda: lwsam.Method(
            lwsam.everything(), rho=0.05, ascent=lwsam.micro_batch(0.25)
        ),
        lambda: lwsam.Method(lwsam.everything(), rho=0.05, ascent=lwsam.momentum()),
        lambda: lwsam.sam(0.0),
    ],
    ids=["sam", "layerwise", "micro", "momentum", "plain"],
)
def test_an_overflow_halves_the_scale_and_skips_the_step(method):
    step = make(method(), loss_scale=lwsam.DynamicLossScale(initial=2.0**24))
    state, skipped = start(step), 0
    for _ in range(20):
        before = jax.tree.map(jnp.copy, state)
        state, info = step(state, data())
        assert float(info.loss_scale) == float(before.loss_scale.scale)
        if not info.finite:
            skipped += 1
            assert float(state.loss_scale.scale) == float(info.loss_scale) / 2
            chex.assert_trees_all_equal(what_stays(state), what_stays(before))
        else:
            assert float(state.loss_scale.scale) == float(info.loss_scale)
        assert int(info.skipped) == int(state.skipped) == skipped
    assert 0 < skipped < 12
    assert float(info.value) < float(loss_of(PARAMS, X, Y))
    chex.assert_tree_all_finite(state.params)


def test_the_second_pass_is_looked_at_too():
    """At this scale the clean gradient is finite, the one at the perturbed point not."""
    method = lwsam.LayerwiseSAM(k=1, rho=3.0, alpha=1.0, normalize="selected")

    def loss(params, model_state, batch, key):
        del key
        w = params["w"].astype(jnp.float16)
        out = (batch.astype(jnp.float16) @ w - 1.0).astype(jnp.float32)
        return jnp.mean(out**2), (model_state, {})

    params = {"w": 0.1 * jnp.ones((8, 1))}
    form = lwsam.value_and_grad(
        lambda p: loss(p, {}, X, KEY)[0],
        ("w",),
        rho=3.0,
        alpha=1.0,
        normalize="selected",
    )
    clean = lambda scale: lwsam.value_and_grad(
        lambda p: loss(p, {}, X, KEY)[0], (), rho=0.0, alpha=1.0
    )(params, loss_scale=scale)
    only_second = [
        k
        for k in range(10, 20)
        if clean(2.0**k).finite and not form(params, loss_scale=2.0**k).finite
    ]
    assert only_second
    scaler = lwsam.DynamicLossScale(initial=2.0 ** only_second[-1])
    base = optax.sgd(0.01)
    step = lwsam.TrainStep(loss, base, method, loss_scale=scaler)
    state = step.init(params, {}, X, key=KEY)
    state, info = step(state, X)
    assert int(info.skipped) == 1
    np.testing.assert_array_equal(state.params["w"], params["w"])
    for _ in range(len(only_second)):
        state, info = step(state, X)
    assert bool(info.finite)
    assert np.any(state.params["w"] != params["w"])


def test_the_scale_grows_again_and_a_scan_does_the_same():
    step = make()
    state, scales = start(step), []
    for _ in range(7):
        state, info = step(state, data())
        scales.append(float(info.loss_scale))
    assert scales == [2.0**8] * 3 + [2.0**9] * 3 + [2.0**10]
    again = make()
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 7), data())
    end, infos = again.scan(start(again), stacked)
    np.testing.assert_array_equal(infos.loss_scale, scales)
    chex.assert_trees_all_equal(end.loss_scale, state.loss_scale)
    assert_close(end.params, state.params, 1e-2)


def test_a_constant_scale_stays_and_skips():
    step = make(loss_scale=1024)
    state, info = step(start(step), data())
    assert bool(info.finite)
    state, info = step(state, data(jnp.inf))
    assert int(info.skipped) == 1
    assert float(state.loss_scale.scale) == float(info.loss_scale) == 1024
    chex.assert_tree_all_finite(state.params)


@needs_eight
def test_devices_agree_on_an_overflow_that_one_of_them_has():
    """One example of 32 has a large weight in the loss."""

    def loss(params, model_state, batch, key):
        del key
        low = jax.tree.map(lambda w: w.astype(jnp.float16), params)
        out = jnp.tanh(batch["x"].astype(jnp.float16) @ low["first"]) @ low["last"]
        error = jnp.sum((out.astype(jnp.float32) - batch["y"]) ** 2, 1)
        return jnp.mean(batch["weight"] * error), (model_state, {})

    scaler = lwsam.DynamicLossScale(initial=2.0**8, period=3)
    step = make(loss=loss, loss_scale=scaler, parallel="pmap")
    given = lambda large: {"x": X, "y": Y, "weight": jnp.ones(32).at[17].set(large)}
    state = step.init(PARAMS, {}, given(1.0), key=KEY)
    scales, finite = [], []
    for large in (1.0, 1e6, 1.0, 1.0):
        state, info = step(state, given(large))
        scales.append(float(info.loss_scale))
        finite.append(bool(info.finite))
    assert finite == [True, False, True, True]
    assert scales == [2.0**8, 2.0**8, 2.0**7, 2.0**7]


@pytest.mark.filterwarnings("ignore")  # Orbax's own
def test_a_checkpoint_holds_the_scale(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    step = make()
    state = start(step)
    for factor in (1.0, jnp.inf, 1.0):
        state, _ = step(state, data(factor))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "saved", abstract)
    assert float(restored.loss_scale.scale) == 2.0**7
    assert int(restored.loss_scale.good_steps) == 1
    assert int(restored.skipped) == 1
    again, _ = make()(restored, data())
    state, _ = step(state, data())
    chex.assert_trees_all_equal(what_stays(again), what_stays(state))


# --- by hand ----------------------------------------------------------------------------


def test_by_hand_with_value_and_grad():
    """The loop of the documentation: `out.finite` is that of both passes."""
    form = lwsam.value_and_grad(loss_of, ("first", "last"), method=lwsam.sam(0.05))
    tx, scaler = optax.sgd(0.1, momentum=0.9), lwsam.DynamicLossScale(2.0**24)

    @jax.jit
    def step(params, opt_state, scale):
        out = form(params, X, Y, loss_scale=scale.scale)
        updates, new_state = tx.update(out.grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_state
        keep = lambda a, b: jnp.where(out.finite, a, b)
        params, opt_state = jax.tree.map(keep, new, (params, opt_state))
        return params, opt_state, scaler.update(scale, out.finite), out.finite

    ours = make(lwsam.sam(0.05, rule=None), loss_scale=scaler)
    state = start(ours)
    params, opt_state, scale = PARAMS, tx.init(PARAMS), scaler.init()
    seen = []
    for _ in range(16):
        params, opt_state, scale, finite = step(params, opt_state, scale)
        state, info = ours(state, data())
        seen.append((bool(finite), float(scale.scale)))
        assert seen[-1] == (bool(info.finite), float(state.loss_scale.scale))
    assert {finite for finite, _ in seen} == {True, False}
    assert_close(params, state.params, 1e-2)


def test_by_hand_with_the_dynamic_scale_of_flax():
    """The scaler's own finite is that of the first pass: the updates have the other."""
    dynamic_scale = pytest.importorskip("flax.training.dynamic_scale")
    tx = optax.chain(
        lwsam.layerwise_sam(k=1, rho=3.0, alpha=1.0, normalize="selected"),
        optax.sgd(0.01),
    )

    def loss(p):
        out = X.astype(jnp.float16) @ p["w"].astype(jnp.float16) - 1.0
        return jnp.mean(out.astype(jnp.float32) ** 2)

    @jax.jit
    def step(params, opt_state, scale):
        grown, first, _, grads = scale.value_and_grad(loss)(params)
        second = {}

        def grad_fn(p):
            second["scale"], second["finite"], _, found = scale.value_and_grad(loss)(p)
            return found

        updates, new_state = tx.update(
            grads, opt_state, params, grad_fn=grad_fn, selection=("w",)
        )
        finite = first & second["finite"]
        # Both have grown, or the one that has not is smaller.
        pick = lambda a, b: jnp.where(first, b, a)
        scale = jax.tree.map(pick, grown, second["scale"])
        new = optax.apply_updates(params, updates), new_state
        keep = lambda a, b: jnp.where(finite, a, b)
        params, opt_state = jax.tree.map(keep, new, (params, opt_state))
        return params, opt_state, scale, first, second["finite"]

    params = {"w": 0.1 * jnp.ones((8, 1))}
    opt_state = tx.init(params)
    scale = dynamic_scale.DynamicScale(scale=jnp.float32(2.0**19))
    seen = set()
    for _ in range(10):
        before, was = params, float(scale.scale)
        params, opt_state, scale, first, second = step(params, opt_state, scale)
        seen.add((bool(first), bool(second)))
        if not (first and second):
            np.testing.assert_array_equal(params["w"], before["w"])
            assert float(scale.scale) == was / 2
        assert np.all(np.isfinite(params["w"]))
    # The case that was reported: finite, then not.
    assert {(True, False), (True, True)} <= seen
