"""The training loops of Flax around the transformation, written as their users do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from framework_nets import nnx_merge
from nets import weight
from plain import assert_close, two_gradients


X, Y = weight(8, 4, seed=1), weight(8, 2, seed=2)
STEPS = 4


def descend(loss, params, layers, steps=STEPS, k=1, learning_rate=0.1):
    """Algorithm 1 by two plain gradients, with SGD."""
    plain = functools.partial(two_gradients, loss, rho=0.3, alpha=0.7, has_aux=False)
    plain = jax.jit(plain, static_argnames="selected")
    chosen = lwsam.selection(transform(layers).init(params))
    picks = []
    for _ in range(steps):
        picks.append(tuple(chosen))
        out = plain(params, selected=tuple(chosen))
        params = jax.tree.map(lambda w, g: w - learning_rate * g, params, out.grads)
        norms = dict(zip(layers.names, np.asarray(out.norms), strict=True))
        chosen = sorted(norms, key=norms.get)[-k:]
    return params, picks


def transform(layers=None):
    return lwsam.layerwise_sam(k=1, rho=0.3, alpha=0.7, layers=layers)


@pytest.mark.parametrize("form", ["value_fn", "grad_fn"])
def test_a_linen_loop_with_a_train_state(form):
    nn = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.tanh(nn.Dense(5)(x)))

    net = Net()
    params = net.init(jax.random.key(0), X)["params"]
    loss_of = lambda p, x, y: jnp.mean((net.apply({"params": p}, x) - y) ** 2)
    layers = lwsam.Layers.of(params, None, loss_of, X, Y)
    tx = optax.chain(transform(layers), optax.sgd(0.1))
    state = train_state.TrainState.create(apply_fn=net.apply, params=params, tx=tx)

    @functools.partial(jax.jit, static_argnames="selection")
    def step(state, x, y, selection):
        loss = lambda p: loss_of(p, x, y)
        grads = jax.grad(loss)(state.params)
        extra = {form: loss if form == "value_fn" else jax.grad(loss)}
        updates, opt_state = state.tx.update(
            grads, state.opt_state, state.params, selection=selection, **extra
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    picks = []
    for _ in range(STEPS):
        selection = lwsam.selection(state.opt_state)
        assert lwsam.selection(state) == selection
        picks.append(selection)
        state = step(state, X, Y, selection)
    expected, expected_picks = descend(lambda p: loss_of(p, X, Y), params, layers)
    assert picks == expected_picks
    assert_close(state.params, expected, rtol=1e-5)


@pytest.mark.parametrize("how", ["exact", "cover", "traced"])
@pytest.mark.parametrize("form", ["value_fn", "grad_fn"])
def test_an_nnx_loop_with_an_optimizer(form, how):
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 5, rngs=rngs)
            self.last = nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.tanh(self.first(x)))

    model = Net(nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    loss_of = lambda p: jnp.mean((nnx_merge(nnx, graphdef, p)(X) - Y) ** 2)
    layers = lwsam.Layers.of(params, None, loss_of)
    assert layers.names == ("first", "last")
    expected, expected_picks = descend(loss_of, params, layers)
    tx = optax.chain(transform(), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @functools.partial(nnx.jit, static_argnames="selection")
    def step(model, optimizer, selection):
        graphdef, params = nnx.split(model, nnx.Param)
        loss = lambda p: jnp.mean((nnx_merge(nnx, graphdef, p)(X) - Y) ** 2)
        grads = jax.grad(loss)(params)
        extra = {form: loss if form == "value_fn" else jax.grad(loss)}
        optimizer.update(model, grads, selection=selection, **extra)

    picks = []
    for _ in range(STEPS):
        selection = lwsam.selection(optimizer.opt_state)
        picks.append(selection)
        if how == "cover":
            selection = lwsam.selection(optimizer.opt_state, cover="depth")
        step(model, optimizer, selection if how != "traced" else None)
    assert picks == expected_picks
    assert_close(nnx.split(model, nnx.Param)[1], expected, rtol=1e-5)
    if form == "value_fn":
        assert float(lwsam.value(optimizer.opt_state)) > float(loss_of(expected))


def test_an_equinox_loop():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0))
    net = [eqx.nn.Linear(4, 5, key=keys[0]), jnp.tanh, eqx.nn.Linear(5, 2, key=keys[1])]
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def loss(params):
        first, activation, last = eqx.combine(params, static)
        y = jax.vmap(lambda x: last(activation(first(x))))(X)
        return jnp.mean((y - Y) ** 2)

    layers = lwsam.Layers.of(params, None, loss)
    assert layers.names == ("0/weight", "2/weight")
    tx = optax.chain(transform(layers), optax.sgd(0.1))
    expected, expected_picks = descend(loss, params, layers)

    @functools.partial(eqx.filter_jit, donate="all")
    def step(params, opt_state, selection):
        grads = jax.grad(loss)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value_fn=loss, selection=selection
        )
        return eqx.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    params = jax.tree.map(jnp.copy, params)
    picks = []
    for _ in range(STEPS):
        picks.append(lwsam.selection(opt_state))
        params, opt_state = step(params, opt_state, picks[-1])
    assert picks == expected_picks
    assert_close(params, expected, rtol=1e-5)
