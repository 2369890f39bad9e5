"""SAF, MESA and DAS, which perturb nothing, against their formulas in float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from plain import enable_x64


RNG = np.random.default_rng(0)
EXAMPLES, CLASSES, BATCH = 6, 3, 3


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(new, old, tau):
    """tau^2 KL(softmax(old / tau) || softmax(new / tau)), the mean over examples."""
    p, q = softmax(old / tau), softmax(new / tau)
    return tau**2 * np.mean(np.sum(p * np.log(p / q), axis=-1))


def numeric_gradient(function, x, step=1e-6):
    found = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[place] = step
        found[place] = (function(x + shift) - function(x - shift)) / (2 * step)
    return found


# --- SAF ------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_saf_compares_with_the_same_example_some_epochs_ago(delay):
    with enable_x64(True):
        term: Any = lwsam.saf(0.3, 5.0, delay, start=1, stop=6)
        memory = term.init(EXAMPLES, CLASSES, jnp.float64)
        assert memory.shape == (delay + 1, EXAMPLES, CLASSES)
        call = jax.jit(term)
        history = []
        for epoch in range(8):
            logits = RNG.normal(size=(EXAMPLES, CLASSES)) * 3
            history.append(logits)
            order = RNG.permutation(EXAMPLES)
            for rows in (order[:BATCH], order[BATCH:]):
                value, memory = call(memory, logits[rows], rows, epoch)
                if 1 < epoch < 6:
                    old = history[epoch - delay][rows] if epoch >= delay else 0
                    old = np.zeros_like(logits[rows]) if epoch < delay else old
                    expected = 0.3 * divergence(logits[rows], old, 5.0)
                    np.testing.assert_allclose(value, expected, rtol=1e-10)
                else:
                    assert value == 0


def test_the_gradient_of_saf_goes_to_the_new_logits_alone():
    with enable_x64(True):
        term: Any = lwsam.saf(0.3, 2.0, 1, start=0)
        rows = np.arange(BATCH)
        old, new = (RNG.normal(size=(BATCH, CLASSES)) for _ in range(2))
        _, memory = term(term.init(EXAMPLES, CLASSES, jnp.float64), old, rows, 0)
        found = jax.grad(lambda x: term(memory, x, rows, 1)[0])(jnp.asarray(new))
        expected = numeric_gradient(lambda x: 0.3 * divergence(x, old, 2.0), new)
        np.testing.assert_allclose(found, expected, atol=1e-8)
        none = jax.grad(lambda m: term(m, new, rows, 1)[0])(memory)
        assert not np.any(none)
        written = lambda x: jnp.sum(term(memory, x, rows, 1)[1] ** 2)
        assert not np.any(jax.grad(written)(jnp.asarray(new)))


def saf_loss(term):
    def loss_fn(params, memory, batch, key):
        del key
        logits = batch["x"] @ params["w"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        extra, memory = term(memory, logits, batch["rows"], batch["epoch"])
        return losses.mean() + extra, (memory, {"term": extra})

    return loss_fn


def saf_run(parallel=None, method=None):
    axis_name = "data" if parallel == "pmap" else None
    term = lwsam.saf(0.5, 2.0, 1, start=0, axis_name=axis_name)
    rng = np.random.default_rng(1)
    batch = {
        "x": rng.normal(size=(8, 4)).astype(np.float32),
        "y": rng.integers(0, CLASSES, 8),
        "rows": np.arange(8),
        "epoch": np.int32(0),
    }
    method = lwsam.sam(0.0) if method is None else method
    step = lwsam.TrainStep(saf_loss(term), optax.sgd(0.5), method, parallel)
    params = {"w": jnp.zeros((4, CLASSES))}
    memory = term.init(8, CLASSES)
    state = step.init(params, memory, batch, key=jax.random.key(0))
    terms = []
    for epoch in range(5):
        state, info = step(state, {**batch, "epoch": np.int32(epoch)})
        terms.append(float(info.metrics["term"]))
    return state, terms


def test_a_train_step_carries_the_memory():
    state, terms = saf_run()
    assert terms[:1] == [0.0]
    assert all(term > 0 for term in terms[1:])
    assert np.abs(state.model_state).max() > 0
    _, with_sam = saf_run(method=lwsam.sam(0.1))
    assert with_sam[1] > 0


@pytest.mark.parametrize("where", ["pmap", "mesh"])
def test_the_memory_is_whole_on_several_devices(where):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    alone, terms = saf_run()
    spread, of_mesh = saf_run(mesh if where == "mesh" else where)
    np.testing.assert_allclose(of_mesh, terms, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        spread.model_state, alone.model_state, rtol=1e-4, atol=1e-6
    )


# --- MESA -----------------------------------------------------------------------------


def test_mesa_compares_with_an_average_of_the_weights():
    with enable_x64(True):
        term: Any = lwsam.mesa(0.8, 5.0, 0.9, start=0, stop=10)
        weights = [RNG.normal(size=(4, CLASSES)) for _ in range(4)]
        x = RNG.normal(size=(BATCH, 4))
        average = term.init({"w": jnp.asarray(weights[0])})
        expected = weights[0]
        for w in weights[1:]:
            value = term(x @ w, x @ average["w"], 3)
            reference = 0.8 * divergence(x @ w, x @ expected, 5.0)
            np.testing.assert_allclose(value, reference, rtol=1e-10)
            average = term.update(average, {"w": jnp.asarray(w)})
            expected = 0.9 * expected + 0.1 * w
            np.testing.assert_allclose(average["w"], expected)
        assert term(x @ w, x @ average["w"], 0) == 0
        assert term(x @ w, x @ average["w"], 10) == 0
        to_old = jax.grad(lambda old: term(x @ w, old, 3))(x @ average["w"])
        assert not np.any(to_old)


def test_equal_outputs_have_no_term_and_no_weight_has_none():
    logits = jnp.asarray(RNG.normal(size=(BATCH, CLASSES)), jnp.float32)
    assert float(lwsam.mesa(start=0)(logits, logits, 1)) == pytest.approx(0, abs=1e-6)
    assert float(lwsam.mesa(0.0, start=0)(logits, -logits, 1)) == 0
    far = 1e4 * logits  # no overflow, and no NaN where a probability is 0
    assert np.isfinite(lwsam.mesa(start=0)(far, -far, 1))


# --- DAS ------------------------------------------------------------------------------


TREE = {"a": (3, 2), "b": (2, 4), "c": (4, 2), "free": (2,), "alone": (2, 2)}
LAYER = {"a": "one", "b": "one", "c": "one", "alone": "two"}


def rule(path, leaf):
    del leaf
    return LAYER.get(path[0].key)


def das_oracle(params, grads, rate, alpha, momentum, velocity, sign=1):
    cores = ("a", "b", "c")
    square = {n: np.sum(grads[n] ** 2) for n in cores}
    total = sum(square.values())
    scaled = dict(params)
    for n in cores:
        size = np.sum(params[n] ** 2) * np.sqrt(total) + 1e-8
        gap = square[n] - total / len(cores)
        scaled[n] = params[n] * (1 + sign * alpha * rate * gap / size)
    velocity = {n: momentum * velocity[n] + g for n, g in grads.items()}
    return {n: w - rate * velocity[n] for n, w in scaled.items()}, velocity


def das_grads(params):
    """Of a loss that binds them all."""
    return {n: np.sin(3 * w) + 0.1 * np.sum(w) for n, w in params.items()}


@pytest.mark.parametrize("sign", [1, -1])
def test_das_scales_the_cores_of_a_layer(sign):
    alpha: Any = optax.linear_schedule(0.2, 0.0, 10)
    rate: Any = optax.cosine_decay_schedule(0.1, 20)
    with enable_x64(True):
        base = optax.sgd(rate, momentum=0.9)
        tx = lwsam.das(base, rate, rule, alpha, sign=sign)
        params = {n: RNG.normal(size=shape) for n, shape in TREE.items()}
        ours: Any = jax.tree.map(jnp.asarray, params)
        state = tx.init(ours)
        velocity = {n: np.zeros_like(w) for n, w in params.items()}
        update = jax.jit(tx.update)
        for step in range(20):
            grads = das_grads(params)
            updates, state = update(das_grads(ours), state, ours)
            ours = optax.apply_updates(ours, updates)
            now = float(rate(step)), float(alpha(step))
            params, velocity = das_oracle(params, grads, *now, 0.9, velocity, sign)
            for n, w in params.items():
                np.testing.assert_allclose(ours[n], w, rtol=1e-6)


def test_das_lets_the_base_see_the_scaled_cores():
    """Weight decay acts on these."""
    params = {n: jnp.ones(shape) for n, shape in TREE.items()}
    grads = {n: (i + 1.0) * w for i, (n, w) in enumerate(params.items())}
    decay = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    tx = lwsam.das(decay, 0.1, rule, 1.0)
    updates: Any = tx.update(grads, tx.init(params), params)[0]
    plain = lwsam.das(optax.sgd(0.1), 0.1, rule, 1.0)
    bare: Any = plain.update(grads, plain.init(params), params)[0]
    for n, w in params.items():
        scaled = w + bare[n] + 0.1 * grads[n]
        expected = bare[n] - 0.1 * 0.5 * scaled
        np.testing.assert_allclose(updates[n], expected, rtol=1e-5)


def test_das_is_the_base_optimizer_without_a_weight_and_without_gradients():
    params = {n: jnp.asarray(RNG.normal(size=s), jnp.float32) for n, s in TREE.items()}
    base = optax.adam(0.1)
    tx = lwsam.das(base, 0.1, rule, 0.0)
    grads = das_grads(params)
    ours, _ = tx.update(grads, tx.init(params), params)
    theirs, _ = base.update(grads, base.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    zero = jax.tree.map(jnp.zeros_like, params)
    still = lwsam.das(optax.sgd(0.1), 0.1, rule)
    updates: Any = still.update(zero, still.init(params), params)[0]
    assert not any(np.any(u) for u in updates.values())


def test_das_runs_in_a_train_step_and_in_a_chain():
    def loss_fn(params, model_state, batch, key):
        product = params["a"] @ params["b"] @ params["c"]
        return jnp.mean((batch @ product - 1) ** 2), (model_state, {})

    base = optax.chain(optax.clip(1.0), lwsam.das(optax.sgd(0.05), 0.05, rule))
    step = lwsam.TrainStep(loss_fn, base, lwsam.sam(0.05))
    params = {n: jnp.full(s, 0.3) for n, s in TREE.items() if n in "abc"}
    state = step.init(params, {}, jnp.ones((2, 3)), key=jax.random.key(0))
    values = []
    for _ in range(5):
        state, info = step(state, jnp.ones((2, 3)))
        values.append(float(info.value))
    assert values[-1] < values[0]


# --- what is refused ------------------------------------------------------------------


WRONG: Any = 1.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lwsam.saf(weight=-1), ("saf", "`weight`")),
        (lambda: lwsam.saf(temperature=0), ("saf", "`temperature`", "above 0")),
        (lambda: lwsam.saf(delay=0), ("saf", "`delay`")),
        (lambda: lwsam.saf(start=WRONG), ("saf", "`start`")),
        (lambda: lwsam.mesa(decay=2.0), ("mesa", "`decay`")),
        (lambda: lwsam.mesa(stop=-1), ("mesa", "`stop`")),
        (lambda: lwsam.das(WRONG, 0.1, rule), ("das", "`base`")),
        (lambda: lwsam.das(optax.sgd(0.1), 0.1, WRONG), ("das", "`rule`")),
        (lambda: lwsam.das(optax.sgd(0.1), 0.1, rule, -1), ("das", "`alpha`")),
        (lambda: lwsam.das(optax.sgd(0.1), 0.1, rule, sign=0), ("das", "`sign`")),
        (
            lambda: lwsam.das(optax.sgd(0.1), 0.1, lwsam.leaves).init(
                {"w": np.ones(2)}
            ),
            ("das", "`rule`", "two leaves"),
        ),
    ],
)
def test_what_is_wrong_is_refused(call, words):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    for word in words:
        assert word in str(error.value), str(error.value)
