"""What people's loops do to parameters, states and optimizers, and what is right then."""

import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from chains import chained, HYPER, jitted_step, LOSS, PARAMS
from framework_nets import nnx_merge
from nets import weight
from plain import assert_close, take_step
from test_transform_errors import says


X = jax.random.normal(jax.random.key(0), (32, 8))
KEY = jax.random.key(0)


def linear_loss(params, model_state, batch, key):
    del key
    return jnp.mean((batch @ params["w"] - batch[:, :1]) ** 2), (model_state, {})


LINEAR = {"w": jnp.full((8, 1), 0.1, jnp.float32)}  # a weak type is traced again


def linear_step(method, base=None, **options):
    base = optax.sgd(1e-6) if base is None else base
    step = lwsam.TrainStep(linear_loss, base, method, **options)
    return step, step.init(LINEAR, {}, X, key=KEY)


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


# --- Optax's wrappers -----------------------------------------------------------------


def multi(base, steps=2):
    return optax.MultiSteps(base, steps).gradient_transformation()


def test_multi_steps_behind_it_takes_the_mean_of_penalized_gradients():
    base = optax.sgd(0.1, momentum=0.9)
    tx, step = chained(multi(base)), jitted_step(chained(multi(base)))
    bare = lwsam.layerwise_sam(**HYPER)
    params, opt_state = PARAMS, tx.init(PARAMS)
    expected, state, base_state = PARAMS, bare.init(PARAMS), base.init(PARAMS)
    penalize = jax.jit(lambda p, s: bare.update(jax.grad(LOSS)(p), s, p, value_fn=LOSS))
    for _ in range(2):
        found = []
        for _ in range(2):
            assert lwsam.selection(opt_state) == lwsam.selection(state)
            params, opt_state = step(params, opt_state)
            grads, state = penalize(expected, state)
            found.append(grads)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *found)
        updates, base_state = base.update(mean, base_state, expected)
        expected = optax.apply_updates(expected, updates)
        assert_close(params, expected, 1e-5)


@pytest.mark.parametrize("transformation", [True, False])
def test_multi_steps_is_a_base_optimizer_of_a_train_step(transformation):
    base = optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2)
    base = base.gradient_transformation() if transformation else base
    step, state = linear_step(lwsam.sam(0.1), base, donate=False)
    point = np.asarray(state.params["w"])
    state, _ = step(state, X)
    np.testing.assert_array_equal(state.params["w"], point)
    state, _ = step(state, X)
    other, other_state = linear_step(lwsam.sam(0.1), optax.sgd(0.1, momentum=0.9))
    other_state, _ = other(other_state, X)
    assert_close(state.params, other_state.params, 1e-5)
    assert lwsam.selection(state) == ("w",)


def test_multi_steps_around_it_is_refused():
    """What its loss sees is only the last part of the batch."""
    tx = multi(chained(k=1))
    state = tx.init(PARAMS)
    for read in (lwsam.selection, lambda s: lwsam.selection(s, cover="depth")):
        with pytest.raises(ValueError, match="behind layerwise_sam") as error:
            read(state)
        says(error, "state", "MultiSteps")
    with pytest.raises(ValueError, match="TrainStep") as error:
        linear_step(lwsam.sam(0.1), tx)
    says(error, "base_optimizer")


def test_lbfgs_after_it_descends():
    """Its line search takes `value`, `grad` and `value_fn`, which is our name too."""
    tx = chained(optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(6)))
    state = tx.init(PARAMS)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(LOSS)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=LOSS
        )
        return optax.apply_updates(params, updates), state

    params = PARAMS
    for _ in range(3):
        params, state = step(params, state)
    assert float(LOSS(params)) < 0.9 * float(LOSS(PARAMS))


def test_lookahead_after_it_works_on_the_fast_parameters():
    """Its parameters are a pair, fast and slow, of which the gradient has one."""
    tx = chained(optax.lookahead(optax.sgd(0.1), 3, 0.5))
    alone = chained(optax.sgd(0.1))
    pair = optax.LookaheadParams.init_synced(PARAMS)
    state, params, alone_state = tx.init(pair), PARAMS, alone.init(PARAMS)
    for _ in range(2):  # before the slow ones follow
        grads = jax.grad(LOSS)(pair.fast)
        updates, state = tx.update(grads, state, pair, value_fn=LOSS)
        pair = optax.apply_updates(pair, updates)
        expected, alone_state = alone.update(
            jax.grad(LOSS)(params), alone_state, params, value_fn=LOSS
        )
        params = optax.apply_updates(params, expected)
    chex.assert_trees_all_close(pair.fast, params, rtol=1e-6)
    chex.assert_trees_all_equal(pair.slow, PARAMS)
    assert lwsam.selection(state) == lwsam.selection(alone_state)


# --- keywords -------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["layerwise_sam", "as_optax"])
def test_levanters_keywords_are_taken(make):
    """`obj_fn` is `value_fn`; `loss` and `grams` are nobody's."""
    if make == "as_optax":
        inner = lwsam.as_optax(lwsam.LayerwiseSAM(**HYPER))
        tx = optax.chain(inner, optax.sgd(0.1))
    else:
        tx = chained(optax.sgd(0.1))
    grads, state = jax.grad(LOSS)(PARAMS), tx.init(PARAMS)
    update = lambda **extra: tx.update(grads, state, PARAMS, **extra)
    expected, expected_state = update(value_fn=LOSS)
    found, new_state = update(obj_fn=LOSS, loss=1.0, grams=None, batch_stats=())
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal(new_state, expected_state)
    assert float(lwsam.value(new_state)) == pytest.approx(float(LOSS(PARAMS)))
    # Where the loop names its own function, that one counts.
    wrong = lambda p: 1 / 0
    both, _ = update(value_fn=LOSS, obj_fn=wrong)
    chex.assert_trees_all_equal(both, expected)
    update(grad_fn=jax.grad(LOSS), obj_fn=wrong)


# --- NNX ------------------------------------------------------------------------------


def nnx_optimizer(tx):
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 5, rngs=rngs)
            self.last = nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.tanh(self.first(x)))

    model = Net(nnx.Rngs(0))
    return nnx, model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.mark.parametrize("name", ["value_fn", "obj_fn"])
def test_a_loss_of_an_nnx_model_is_refused_with_the_remedy(name):
    nnx, model, optimizer = nnx_optimizer(chained(k=1))
    of_model = lambda m: jnp.mean(m(weight(3, 4)) ** 2)
    grads = nnx.grad(of_model)(model)
    with pytest.raises(TypeError, match="nnx.merge") as error:
        optimizer.update(model, grads, **{name: of_model})
    says(error, "value_fn", "nnx.State", "nnx.split")
    # The remedy works.
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    remedy = lambda p: of_model(nnx_merge(nnx, graphdef, p, rest))
    before = float(of_model(model))
    for _ in range(2):
        optimizer.update(model, nnx.grad(of_model)(model), **{name: remedy})
    assert float(of_model(model)) < before


def test_the_selection_of_an_nnx_optimizer_is_found():
    nnx, _, optimizer = nnx_optimizer(chained(k=1))
    expected = lwsam.selection(optimizer.opt_state)
    assert expected == ("last",)
    assert lwsam.selection(optimizer) == expected
    cover = lwsam.selection(optimizer, cover="depth")
    assert cover == lwsam.selection(optimizer.opt_state, cover="depth")
    assert float(lwsam.value(optimizer)) == 0.0
    # Of its state as NNX has it nothing is left that knows the names.
    for read in (lwsam.selection, lwsam.value):
        with pytest.raises(ValueError, match="nnx.Optimizer") as error:
            read(nnx.state(optimizer))
        says(error, "state")


def test_the_state_of_perturbed_in_an_nnx_optimizer_is_found():
    nnx, model, optimizer = nnx_optimizer(lwsam.perturbed(optax.sgd(0.1, 0.9), 0.1))
    of_model = lambda m: jnp.mean(m(weight(3, 4)) ** 2)
    for _ in range(2):
        optimizer.update(model, nnx.grad(of_model)(model))
    params = nnx.state(model, nnx.Param)
    own = lwsam.eval_params(optimizer, params)
    assert jax.tree.structure(own) == jax.tree.structure(params)
    again = lwsam.eval_params(optimizer.opt_state, params)
    chex.assert_trees_all_equal(again, own)
    with pytest.raises(ValueError, match="nnx.Optimizer") as error:
        lwsam.eval_params(nnx.state(optimizer), params)
    says(error, "opt_state")
    kernel, held = jax.tree.leaves(own)[1], jax.tree.leaves(params)[1]
    gap, size = np.linalg.norm(kernel - held), np.linalg.norm(kernel)
    np.testing.assert_allclose(gap, 0.1 * size, rtol=1e-4)
    nnx.update(model, own)  # evaluate it so
    nnx.update(model, lwsam.train_params(optimizer, own))
    back = nnx.state(model, nnx.Param)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- Flax -----------------------------------------------------------------------------


def test_a_subclass_of_flaxs_train_state_hands_the_keywords_on():
    train_state = pytest.importorskip("flax.training.train_state")

    class SAMState(train_state.TrainState):
        def apply_gradients(self, *, grads, **extra):
            updates, opt_state = self.tx.update(
                grads, self.opt_state, self.params, **extra
            )
            return self.replace(
                step=self.step + 1,
                params=optax.apply_updates(self.params, updates),
                opt_state=opt_state,
            )

    tx = chained()
    state = SAMState.create(apply_fn=None, params=PARAMS, tx=tx)
    expected, expected_state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(state):
        grads = jax.grad(LOSS)(state.params)
        return state.apply_gradients(grads=grads, value_fn=LOSS)

    plain = jax.jit(lambda p, s: take_step(tx, LOSS, p, s))
    for _ in range(3):
        assert lwsam.selection(state) == lwsam.selection(expected_state)
        state = step(state)
        expected, expected_state = plain(expected, expected_state)
    assert_close(state.params, expected)
    assert float(lwsam.value(state)) > 0


def test_a_layerwise_state_survives_msgpack():
    serialization = pytest.importorskip("flax.serialization")
    tx = chained()
    step = jitted_step(tx)
    half = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        half = step(*half)
    target = PARAMS, chained().init(PARAMS)
    restored = serialization.from_bytes(target, serialization.to_bytes(half))
    assert lwsam.selection(restored[1]) == lwsam.selection(half[1])
    restored = jax.tree.map(jnp.asarray, restored)
    chex.assert_trees_all_equal(restored, half)
    chex.assert_trees_all_equal(step(*restored), step(*half))


@pytest.mark.parametrize(
    "method",
    [
        lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8, mean_overhead=0.5),
        lwsam.friendly_sam(0.1),
        lwsam.Method(lwsam.top_k(1), rho=0.1, ascent=lwsam.previous()),
    ],
    ids=["layer-wise", "friendly", "previous"],
)
def test_a_train_state_survives_msgpack(method):
    """Of typed keys Flax knows nothing: the old kind travels as it is."""
    serialization = pytest.importorskip("flax.serialization")
    make = lambda: lwsam.TrainStep(
        linear_loss, optax.sgd(0.1, 0.9), method, donate=False
    )
    step = make()
    state = step.init(LINEAR, {}, X, key=jax.random.PRNGKey(3))
    half, _ = step(state, X)
    other = make()  # of a new process
    target = other.init(LINEAR, {}, X, key=jax.random.PRNGKey(0))
    restored = serialization.from_bytes(target, serialization.to_bytes(half))
    restored = jax.tree.map(jnp.asarray, restored)
    chex.assert_trees_all_equal(restored, half)
    chex.assert_trees_all_equal(other(restored, X)[0], step(half, X)[0])


# --- Equinox --------------------------------------------------------------------------


MAKERS = {
    "layerwise_sam": lambda: chained(),
    "as_optax": lambda: lwsam.as_optax(lwsam.sam(0.1)),
    "perturbed": lambda: lwsam.perturbed(optax.sgd(0.1), 0.1),
    "perturbed, momentum": lambda: lwsam.perturbed(optax.sgd(0.1, 0.9), 0.1),
    "perturbed, adam": lambda: lwsam.perturbed(optax.adam(0.1), 0.1),
    "momentum_sam": lambda: lwsam.momentum_sam(optax.sgd(0.1, 0.9), 0.1),
}


@pytest.mark.parametrize("make", MAKERS)
def test_a_model_with_functions_in_it_raises_and_names_the_filter(make):
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(4, 2, 3, 1, key=KEY)
    tx = MAKERS[make]()
    with pytest.raises(TypeError, match=r"eqx\.filter") as error:
        tx.init(net)
    says(error, "params", "activation")
    tx.init(eqx.filter(net, eqx.is_inexact_array))


def test_a_train_step_names_the_filter_too():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(4, 2, 3, 1, key=KEY)

    def loss(net, model_state, batch, key):
        return jnp.mean(jax.vmap(net)(batch) ** 2), (model_state, {})

    step = lwsam.TrainStep(loss, optax.sgd(0.1), lwsam.sam(0.1))
    with pytest.raises(TypeError, match=r"eqx\.filter"):
        step.init(net, {}, jnp.ones((2, 4)), key=KEY)
