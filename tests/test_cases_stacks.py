"""What Optax's wrappers, Flax and Equinox do to states, and what is right then."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from case_task import KEY, LINEAR, linear_loss, linear_step, X
from chains import chained, HYPER, jitted_step, LOSS, PARAMS
from framework_nets import nnx_merge
from nets import weight
from plain import assert_close, says, take_step


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
