"""What people's loops do to parameters and states, and what is right then."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from case_task import KEY, LINEAR, linear_loss, linear_step, X
from nets import weight
from plain import assert_close, says


# --- rho and alpha that a loop sets ---------------------------------------------------


def test_a_loop_sets_rho_between_the_steps_of_a_train_step():
    """As a plateau rule or a sweep does: whatever kind of number, nothing is compiled."""
    traced = []

    def loss(*args):
        traced.append(1)
        return linear_loss(*args)

    method = lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.9, normalize="selected")
    base = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-6)
    step = lwsam.TrainStep(loss, base, method)
    state = step.init(LINEAR, {}, X, key=KEY)
    assert set(state.hyperparams) == {"rho", "alpha"}
    state, info = step(state, X)
    before, gap = len(traced), float(info.perturbed_value - info.value)
    assert float(info.rho) == pytest.approx(0.1)
    assert gap > 0.1
    for rho in (0.1, np.float64(0.1), jnp.float32(0.0), 0, -0.2, jnp.array(0.2)):
        state = state._replace(hyperparams={**state.hyperparams, "rho": rho})
        state, info = step(state, X)
        applied = max(float(rho), 0.0)
        assert float(info.rho) == pytest.approx(applied)
        risen = float(info.perturbed_value - info.value)
        if applied == 0.0:
            assert risen == 0.0
        else:
            assert risen >= 0.99 * gap
        assert float(state.hyperparams["rho"]) == pytest.approx(float(rho))
    assert len(step.executables) == 1
    assert len(traced) == before


def test_a_loop_sets_alpha_too():
    step, state = linear_step(
        lwsam.LayerwiseSAM(k=1, rho=1.0, alpha=0.5), optax.sgd(1.0), donate=False
    )
    moved = {}
    for alpha in (0.0, 0.5, 1.0):
        given = state._replace(hyperparams={**state.hyperparams, "alpha": alpha})
        moved[alpha] = step(given, X)[0].params["w"] - state.params["w"]
    np.testing.assert_allclose(moved[0.5], (moved[0.0] + moved[1.0]) / 2, rtol=1e-5)
    plain = jax.grad(lambda p: linear_loss(p, {}, X, None)[0])(LINEAR)["w"]
    np.testing.assert_allclose(moved[0.0], -plain, rtol=1e-5)


def test_a_name_that_is_not_there_is_refused():
    step, state = linear_step(lwsam.sam(0.1))
    with pytest.raises(ValueError, match="static") as error:
        step(state._replace(hyperparams={"rho": 0.1, "alpha": 0.5}), X)
    says(error, "state.hyperparams", "alpha", "rho")


def test_a_loop_sets_rho_of_the_transformation():
    tx = lwsam.as_optax(lwsam.sam(0.1))
    params = {"w": jnp.zeros((2, 2))}
    grads, state = {"w": jnp.full((2, 2), 0.5)}, tx.init(params)

    @jax.jit
    def point(state):  # the gradient at the perturbed point is the point
        return tx.update(grads, state, params, grad_fn=lambda p: p)

    for rho in (0.1, 0.3, 0.0, -0.4, 0.2):
        new = {**state.hyperparams, "rho": jnp.float32(rho)}
        found, state = point(state._replace(hyperparams=new))
        norm = jnp.linalg.norm(found["w"])
        np.testing.assert_allclose(norm, max(rho, 0.0), rtol=1e-6)
    assert point._cache_size() == 1


@pytest.mark.parametrize("rho", [optax.linear_schedule(-0.1, -0.3, 4), lambda t: -1.0])
def test_a_schedule_below_zero_is_the_base(rho):
    step, state = linear_step(lwsam.sam(rho), optax.sgd(0.1, momentum=0.9))
    plain, plain_state = linear_step(lwsam.sam(0.0), optax.sgd(0.1, momentum=0.9))
    for _ in range(3):
        state, info = step(state, X)
        plain_state, _ = plain(plain_state, X)
        assert float(info.rho) == 0.0
        assert float(info.perturbed_value) == float(info.value)
    assert_close(state.params, plain_state.params)


# --- no inf or NaN of our own ---------------------------------------------------------


DEBUG = """
import jax, jax.numpy as jnp, optax, lwsam_jax as lwsam
jax.config.update("jax_debug_infs", True)
jax.config.update("jax_debug_nans", True)
params = {"v": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}
loss = lambda p: jnp.sum((p["v"] @ p["w"]) ** 2)
base = optax.sgd(0.01, momentum=0.9)
for tx in (
    optax.chain(lwsam.layerwise_sam(k=1, rho=0.1, alpha=0.8), base),
    optax.chain(lwsam.as_optax(lwsam.friendly_sam(0.1)), base),
    lwsam.perturbed(base, 0.1),
    lwsam.momentum_sam(base, 0.1),
    lwsam.perturbed(base, 0.1, shape=lwsam.adaptive(), ascent=lwsam.random(), k=1),
):
    @jax.jit
    def update(p, s):
        extra = {"grad_fn": jax.grad(loss)}
        updates, s = tx.update(jax.grad(loss)(p), s, p, **extra)
        return optax.apply_updates(p, updates), s

    p, s = params, tx.init(params)
    for _ in range(2):
        p, s = update(p, s)
step_loss = lambda p, m, b, k: (loss(p), (m, {}))
for method, more in (
    (lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8, max_overhead=0.9), {}),
    (
        lwsam.Method(
            lwsam.top_k(1), rho=0.1, ascent=lwsam.momentum(), mean_overhead=0.5
        ),
        {"on_nonfinite": "skip"},
    ),
    (lwsam.gsam(0.1, 0.4), {"loss_scale": lwsam.DynamicLossScale(2.0**9, period=1)}),
):
    step = lwsam.TrainStep(step_loss, base, method, **more)
    state = step.init(params, {}, jnp.ones(2), key=jax.random.key(0))
    for _ in range(2):
        state, info = step(state, jnp.ones(2))
print("finite", float(info.value))
"""


def in_a_fresh_process(program):
    """What a program prints; debug flags act on what is made and compiled after them."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_jax_debug_infs_finds_nothing_of_ours_in_a_fresh_process():
    assert in_a_fresh_process(DEBUG).startswith("finite")


# --- the line of a NaN ----------------------------------------------------------------


LINE = """
import jax, jax.numpy as jnp, optax, traceback, lwsam_jax as lwsam
params = {"w1": jnp.eye(1, 4), "w2": jnp.ones((4, 1))}
x = jnp.linspace(-1.0, 1.0, 8)[:, None]
def loss(p):
    h = x @ p["w1"]
    h = jnp.sqrt(h)
    return jnp.mean((h @ p["w2"]) ** 2)
def step_loss(p, model_state, batch, key):
    return loss(p), (model_state, {})
jax.config.update("jax_debug_nans", True)
tx = lwsam.layerwise_sam(k=1, rho=0.1, alpha=1.0)
state = tx.init(params)
step = lwsam.TrainStep(step_loss, optax.sgd(0.1), lwsam.sam(0.1))
train_state = step.init(params, {}, x, key=jax.random.key(0))
for run in (
    jax.jit(lwsam.value_and_grad(loss, ("w2",), rho=0.1, alpha=1.0)),
    jax.jit(lambda p: tx.update(p, state, p, value_fn=loss, selection=("w2",))),
    lambda p: step(train_state, x),
):
    try:
        run(params)
        print("nothing raised")
    except FloatingPointError as error:
        own = [t for t in traceback.extract_tb(error.__traceback__) if t.name == "loss"]
        print(own[-1].lineno, "sqrt" in str(error))
"""


def test_jax_debug_nans_names_the_line_of_the_user():
    """Whose square root has a negative argument; the split runs it from a jaxpr."""
    lines = in_a_fresh_process(LINE).splitlines()
    found = [line for line in lines if not line.startswith("Invalid nan")]  # JAX's own
    culprit = 1 + LINE.splitlines().index("    h = jnp.sqrt(h)")
    assert found == [f"{culprit} True"] * 3


# --- what a loop keeps ----------------------------------------------------------------


def test_the_best_parameters_of_a_run_can_be_kept():
    """The run diverges, so that the best ones are the first."""
    method = lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8)
    step, state = linear_step(method, optax.sgd(3.0), donate=False)
    first, best, best_value = state, state.params, float("inf")
    for _ in range(6):
        before = state.params
        state, info = step(state, X)
        if info.value < best_value:
            best, best_value = before, float(info.value)
    np.testing.assert_array_equal(best["w"], LINEAR["w"])
    again, _ = step(first, X)  # the same state, once more
    assert np.all(np.isfinite(again.params["w"]))
    assert float(info.value) > best_value


@pytest.mark.parametrize("method", [lwsam.sam(0.1), lwsam.sam(0.0)])
def test_a_donated_state_that_is_used_twice_raises_with_the_remedy(method):
    step, state = linear_step(method)
    after, _ = step(state, X)
    for use in (lambda: step(state, X), lambda: step.refresh(state, [X])):
        with pytest.raises(ValueError, match="donate") as error:
            use()
        says(error, "state", "donate=False")
    step(after, X)  # and that goes on


# --- matrices named a and b -----------------------------------------------------------


def test_adapters_named_a_and_b_are_layers():
    """LoRA: b starts at 0, so that the first gradient of a is 0."""
    frozen = {"up": weight(8, 16), "out": weight(16, 3)}
    params = {
        name: {"a": weight(w.shape[0], 2), "b": jnp.zeros((2, w.shape[1]))}
        for name, w in frozen.items()
    }

    def loss(p, model_state, batch, key):
        w = {n: frozen[n] + p[n]["a"] @ p[n]["b"] for n in frozen}
        y = jnp.tanh(batch @ w["up"]) @ w["out"]
        return jnp.mean((y - batch[:, :3]) ** 2), (model_state, {})

    assert set(lwsam.Layers.of(params).names) == {"up/a", "up/b", "out/a", "out/b"}
    method = lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=1.0, normalize="selected")
    step = lwsam.TrainStep(loss, optax.adam(1e-2), method)
    state = step.init(params, {}, X, key=KEY)
    for _ in range(3):
        state, info = step(state, X)
        assert int(info.mask.sum()) == 1
        assert float(info.perturbed_value) > float(info.value)
    # What is a bias stays none, whatever its name.
    vectors = {"w": jnp.ones((3, 3)), "b": jnp.ones(3), "a": jnp.ones(3)}
    assert lwsam.Layers.of(vectors).names == ("w",)


# --- derivatives through a step -------------------------------------------------------


SHAPES = {
    "raw": lwsam.raw,
    "normalized": lwsam.normalized,
    "normalized over all": lambda: lwsam.normalized("all"),
    "adaptive": lwsam.adaptive,
    "adaptive, eta 0": lambda: lwsam.adaptive(0.0),
    "relative": lwsam.relative,
    "relative per filter": lambda: lwsam.relative("filter"),
}
# Weights of 0, or a loss of 0, whose parameters and combinations are those of each shape.
ZEROS = [
    *((0.0, shape, lwsam.descend()) for shape in SHAPES),
    *((0.3, shape, lwsam.descend()) for shape in SHAPES),
    (0.0, "normalized", lwsam.mix(0.5)),
    (0.3, "relative", lwsam.mix(0.5)),
    (0.0, "normalized", lwsam.surrogate_gap(0.5)),
    (0.3, "adaptive", lwsam.surrogate_gap(0.5)),
]


@pytest.mark.parametrize(("at", "shape", "combine"), ZEROS)
def test_a_step_can_be_differentiated_where_the_gradient_is_zero(at, shape, combine):
    """Learned learning rates, hypergradients: a norm has no derivative at 0."""
    params = {"v": jnp.full((2, 3), at), "w": jnp.full((3, 1), at)}
    method = lwsam.Method(
        lwsam.everything(), rho=0.1, shape=SHAPES[shape](), combine=combine
    )

    def loss(p, scale):
        return scale * jnp.mean((X[:4, :2] @ p["v"] @ p["w"]) ** 2)

    def after(params, scale, rho):
        step = lwsam.value_and_grad(loss, ("v", "w"), method=method, rho=rho)
        out = step(params, scale)
        new = jax.tree.map(lambda w, g: w - 0.1 * g, params, out.grads)
        return loss(new, 1.0) + jnp.sum(out.norms), out.grads

    scale = 1.0 if at == 0.0 else 0.0
    differentiated = jax.jit(jax.grad(after, argnums=(0, 1, 2), has_aux=True))
    found, grads = differentiated(params, scale, 0.1)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


def test_perturbed_can_be_differentiated_at_a_moment_of_zero():
    """In its first steps the moment is 0 where the gradient is."""
    params = {"v": jnp.zeros((2, 3)), "w": jnp.ones((3, 1))}
    loss = lambda p: jnp.mean((X[:4, :2] @ p["v"] @ p["w"]) ** 2)

    def after(params, rho):
        tx = lwsam.perturbed(optax.sgd(0.1, momentum=0.9), rho)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return loss(params)

    found = jax.jit(jax.grad(after, argnums=(0, 1)))(params, 0.1)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))
