"""`TrainStep(accumulate=n)`: the gradients of the large batch, a cut at a time."""

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
from plain import assert_close, enable_x64


CUTS, SIZE, STEPS = 4, 32, 4
KEY = jax.random.key(3)


def params():
    return jax.tree.map(lambda x: x.astype(jnp.float64), nets.mlp_params())


def batch(seed):
    x = np.asarray(nets.weight(SIZE, 4, seed=seed), np.float64)
    rng = np.random.default_rng(seed)
    return {
        "x": x * np.linspace(0.2, 3.0, SIZE)[:, None],
        "tokens": rng.integers(1, 9, SIZE).astype(np.float64),
        "scale": np.float64(2.0),
    }


def loss_fn(params, model_state, batch, key):
    """A mean over examples, and a running mean that sees one cut after the other."""
    del key
    x = batch["x"] * batch["scale"]
    value, aux = nets.head(params, nets.body(params, x))
    model_state = {
        "mean": 0.9 * model_state["mean"] + 0.1 * jnp.mean(x, axis=0),
        "seen": model_state["seen"] + len(x),
    }
    metrics = {"mean": jnp.mean(aux["logits"]), "positive": jnp.sum(aux["logits"] > 0)}
    return value, (model_state, metrics)


def token_loss(params, model_state, batch, key):
    """A mean over tokens, of which examples have different numbers."""
    del key
    h = nets.body(params, batch["x"])
    each = jax.vmap(lambda row: nets.head(params, row[None])[0])(h)
    return jnp.average(each, weights=batch["tokens"]), (model_state, {})


METHODS = {
    "layer-wise": lambda **o: lwsam.LayerwiseSAM(k=1, rho=0.3, alpha=0.7, **o),
    "SAM": lambda **o: lwsam.sam(0.2, **o),
    "gap": lambda **o: lwsam.gsam(0.2, 0.1, **o),
    "plain": lambda **o: lwsam.sam(0.0, **o),
    "momentum": lambda **o: lwsam.Method(
        lwsam.everything(), rho=0.2, ascent=lwsam.momentum(), **o
    ),
    "random": lambda **o: lwsam.Method(
        lwsam.top_k(2), rho=0.2, ascent=lwsam.random(), shape=lwsam.relative(), **o
    ),
}


def mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("data",))


PARALLEL = {"one device": lambda: None, "pmap": lambda: "pmap", "mesh": mesh}


def run(method, loss=loss_fn, parallel=None, **options):
    """All of a few steps: states and infos, on the host."""
    with enable_x64(True):
        base = optax.sgd(0.1, momentum=0.9)
        step = lwsam.TrainStep(loss, base, method, parallel, **options)
        state = {"mean": jnp.zeros(4), "seen": jnp.int32(0)}
        state = step.init(params(), state, batch(0), key=KEY)
        found = []
        for i in range(STEPS):
            state, info = step(state, batch(i))
            found.append(jax.device_get((state.params, state.model_state, info)))
    return found


@functools.cache
def whole(name):
    return run(METHODS[name]())


CASES = [(name, "one device") for name in METHODS]
CASES += [(name, p) for name in ("layer-wise", "random") for p in ("pmap", "mesh")]


@needs_eight
@pytest.mark.parametrize(("name", "parallel"), CASES)
def test_steps_are_those_of_the_large_batch(name, parallel):
    options = {"accumulate": CUTS, "parallel": PARALLEL[parallel]()}
    for cut, one in zip(run(METHODS[name](), **options), whole(name), strict=True):
        assert_close(cut[0], one[0], rtol=1e-9)
        for field in ("value", "perturbed_value", "norms", "mask", "rho", "metrics"):
            assert_close(getattr(cut[2], field), getattr(one[2], field), rtol=1e-9)
    seen = SIZE // (DEVICES if parallel == "pmap" else 1)
    assert cut[1]["seen"] == STEPS * seen


def test_the_model_state_goes_from_cut_to_cut():
    found = run(METHODS["SAM"](), accumulate=CUTS)
    mean = np.zeros(4)
    for i, (_, state, _) in enumerate(found):
        for rows in np.split(batch(i)["x"] * 2.0, CUTS):
            mean = 0.9 * mean + 0.1 * rows.mean(axis=0)
        np.testing.assert_allclose(state["mean"], mean, rtol=1e-6)


def test_a_mean_over_tokens_has_weights():
    method = METHODS["layer-wise"]
    weight = lambda cut: jnp.sum(cut["tokens"])
    cut = run(method(), token_loss, accumulate=CUTS, weight=weight)
    one = run(method(), token_loss)
    other = run(method(), token_loss, accumulate=CUTS)
    assert_close(cut[-1][0], one[-1][0], rtol=1e-9)
    with pytest.raises(AssertionError):
        assert_close(other[-1][0], one[-1][0], rtol=1e-4)


@needs_eight
@pytest.mark.parametrize("parallel", ["one device", "mesh"])
def test_a_micro_batch_is_of_the_first_cut(parallel):
    devices = 1 if parallel == "one device" else DEVICES
    share = SIZE // devices

    def first(batch, key):
        del key
        rows = np.arange(SIZE).reshape(devices, share)[:, : share // CUTS].ravel()
        return {**batch, "x": batch["x"][rows], "tokens": batch["tokens"][rows]}

    options = {"accumulate": CUTS, "parallel": PARALLEL[parallel]()}
    found = run(METHODS["SAM"](ascent=lwsam.micro_batch(1 / CUTS)), **options)
    expected = run(METHODS["SAM"](ascent=first))
    for cut, one in zip(found, expected, strict=True):
        assert_close(cut[0], one[0], rtol=1e-9)
        assert_close(cut[2].ascent_value, one[2].ascent_value, rtol=1e-9)


def test_cuts_draw_from_keys_of_their_own_and_both_passes_from_one():
    def noisy(params, model_state, batch, key):
        noise = jax.random.normal(key, ())
        value, (model_state, _) = loss_fn(params, model_state, batch, key)
        return value + noise, (model_state, {"noise": noise})

    *_, info = run(METHODS["SAM"](), noisy, accumulate=CUTS)[-1]
    step_key = jax.random.fold_in(KEY, STEPS - 1)
    with enable_x64(True):
        keys = [jax.random.fold_in(step_key, i) for i in range(CUTS)]
        drawn = [jax.random.normal(key, ()) for key in keys]
    np.testing.assert_allclose(info.metrics["noise"], np.mean(drawn), rtol=1e-9)
    clean = run(METHODS["SAM"](), accumulate=CUTS)[-1][2]
    gap = lambda info: info.perturbed_value - info.value
    np.testing.assert_allclose(gap(info), gap(clean), rtol=1e-6)


def test_low_precision_is_summed_in_float32():
    """Of 256 gradients, each 1 / 256 of the last: in bfloat16 most would be lost."""
    w = {"w": jnp.ones((2, 2), jnp.bfloat16)}

    def loss(params, model_state, batch, key):
        del key
        return jnp.mean(batch @ params["w"]).astype(jnp.float32), (model_state, {})

    x = jnp.ones((256, 2), jnp.bfloat16)
    grads = {}
    for cuts in (1, 256):
        step = lwsam.TrainStep(loss, optax.sgd(1.0), lwsam.sam(0.0), accumulate=cuts)
        state, _ = step(step.init(w, {}, x, key=KEY), x)
        assert state.params["w"].dtype == jnp.bfloat16
        grads[cuts] = np.asarray(w["w"] - state.params["w"], np.float32)
    np.testing.assert_array_equal(grads[1], grads[256])


def deep(params, model_state, batch, key):
    """Much to keep for a backward pass."""
    del key
    h = batch
    for _ in range(12):
        h = jnp.tanh(h @ params["w"])
    return jnp.mean(h**2), (model_state, {})


@pytest.mark.parametrize("ascent", [lwsam.whole_batch(), lwsam.micro_batch(1 / 8)])
def test_memory_is_that_of_a_cut(ascent):
    w, x = {"w": jnp.eye(32)}, jnp.ones((4096, 32))
    temp = {}
    for cuts in (1, 8):
        method = lwsam.sam(0.1, ascent=ascent)
        step = lwsam.TrainStep(deep, optax.sgd(0.1), method, accumulate=cuts)
        state = step.init(w, {}, x, key=KEY)
        compiled = step.lower(state, x, step.layers.names).compile()
        temp[cuts] = compiled.memory_analysis().temp_size_in_bytes
    assert temp[8] < 0.25 * temp[1]


def test_the_price_has_the_prefix_twice():
    small = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch(0))
    model_state = {"mean": jnp.zeros(4), "seen": jnp.int32(0)}
    overhead = {}
    for cuts in (1, CUTS):
        method = lwsam.sam(0.1, select=lwsam.named("^a_out$"))
        step = lwsam.TrainStep(loss_fn, optax.sgd(0.1), method, accumulate=cuts)
        state = step.init(nets.mlp_params(), model_state, small, key=KEY)
        _, info = step(state, small)
        chosen = step.layers.selected(info.mask)
        ratio = step.cost.ratio(chosen, 1.0, shared=cuts == 1)
        np.testing.assert_allclose(info.overhead, ratio - 1, rtol=1e-5)
        overhead[cuts] = float(info.overhead)
    assert overhead[CUTS] > overhead[1] + 0.1


def test_a_cut_that_is_not_finite_skips_the_step():
    method = METHODS["SAM"]()
    step = lwsam.TrainStep(
        loss_fn,
        optax.sgd(0.1),
        method,
        accumulate=CUTS,
        on_nonfinite="skip",
        loss_scale=lwsam.DynamicLossScale(),
    )
    small = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch(0))
    model_state = {"mean": jnp.zeros(4), "seen": jnp.int32(0)}
    state = step.init(nets.mlp_params(), model_state, small, key=KEY)
    state, info = step(state, small)
    before = jax.device_get(state.params)
    assert bool(info.finite)
    assert int(info.skipped) == 0
    bad = {**small, "x": small["x"].at[SIZE // 2].set(jnp.nan)}
    state, info = step(state, bad)
    assert not bool(info.finite)
    assert int(info.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
    assert float(state.loss_scale.scale) == 2.0**14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": 2.5}, "accumulate"),
        ({"accumulate": True}, "accumulate"),
        ({"weight": lambda cut: 1.0}, "weight"),
        ({"accumulate": 2, "weight": 3.0}, "weight"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=f"`{message}`"):
        lwsam.TrainStep(loss_fn, optax.sgd(0.1), METHODS["SAM"](), **options)


def test_a_batch_that_does_not_divide_is_named():
    step = lwsam.TrainStep(loss_fn, optax.sgd(0.1), METHODS["SAM"](), accumulate=5)
    state = {"mean": jnp.zeros(4), "seen": jnp.int32(0)}
    with pytest.raises(ValueError, match=r"divisible by the 5 cuts.*32"):
        step.init(nets.mlp_params(), state, batch(0), key=KEY)


def test_what_needs_every_example_at_once_is_refused():
    with pytest.raises(ValueError, match="accumulate"):
        lwsam.TrainStep(loss_fn, optax.sgd(0.1), lwsam.esam(0.1), accumulate=2)
