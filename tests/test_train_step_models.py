"""TrainStep with Flax models: BatchNorm statistics, dropout and keys in the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import lwsam_jax as lwsam
from devices import needs_eight
from framework_nets import nnx_merge
from nets import weight
from plain import assert_close, two_gradients


X, Y = weight(16, 4, seed=1), weight(16, 2, seed=2)
BATCH = {"x": X, "y": Y}
PARALLEL = {
    "one device": lambda: None,
    "pmap": lambda: "pmap",
    "mesh": lambda: Mesh(np.array(jax.devices()[:8]), ("data",)),
}


def linen():
    """Synchronised BatchNorm under pmap: eight devices are one."""
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        axis_name: str | None = None

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(5)(x)
            x = nn.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)
            return nn.Dense(2)(nn.tanh(x))

    variables = Net().init(jax.random.key(0), X)

    def make_loss(axis_name):
        def loss(params, model_state, batch, key):
            del key
            y, model_state = Net(axis_name).apply(
                {"params": params, **model_state}, batch["x"], mutable=["batch_stats"]
            )
            return jnp.mean((y - batch["y"]) ** 2), (model_state, {})

        return loss

    params = variables.pop("params")
    return make_loss, params, variables


def nnx():
    """The model state holds statistics, and the typed key and count of a dropout."""
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, rngs=rngs)
            self.drop = nnx.Dropout(0.3, rngs=rngs)
            self.last = nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(nnx.tanh(self.norm(self.first(x)))))

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, model_state, batch, key):
        del key
        model = nnx_merge(nnx, graphdef, params, model_state)
        y = model(batch["x"])
        _, _, model_state = nnx.split(model, nnx.Param, ...)
        return jnp.mean((y - batch["y"]) ** 2), (model_state, {})

    return lambda axis_name: loss, params, rest


def run(make_loss, params, model_state, parallel, steps):
    axis_name = "data" if parallel == "pmap" else None  # a mesh has the whole batch
    method = lwsam.LayerwiseSAM(k=1, rho=0.3, alpha=0.7)
    step = lwsam.TrainStep(make_loss(axis_name), optax.sgd(0.1), method, parallel)
    assert step.axis_name == axis_name
    state = step.init(params, model_state, BATCH, key=jax.random.key(0))
    selections = []
    for _ in range(steps):
        selections.append(lwsam.selection(state))
        state, info = step(state, BATCH)
        assert bool(info.finite)
    return state, selections


def by_hand(loss, params, model_state, selections):
    """Two plain gradients a step, SGD."""
    for selected in selections:
        args = (model_state, BATCH, None)
        out = two_gradients(loss, params, args, selected, rho=0.3, alpha=0.7)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, out.grads)
        model_state = out.aux[0]
    return params, model_state


@pytest.mark.parametrize("make", [linen, nnx])
def test_one_device_is_two_gradients_and_the_statistics_are_clean(make):
    """Not counted twice, and not those of the perturbed point."""
    make_loss, params, model_state = make()
    state, selections = run(make_loss, params, model_state, None, steps=2)
    expected = jax.jit(lambda p, m: by_hand(make_loss(None), p, m, selections))(
        params, model_state
    )
    assert_close((state.params, state.model_state), expected, rtol=1e-5)


@needs_eight
@pytest.mark.parametrize("name", ["pmap", "mesh"])
def test_synchronised_statistics_make_eight_devices_one(name):
    make_loss, params, model_state = linen()
    state, selections = run(make_loss, params, model_state, PARALLEL[name](), steps=2)
    expected = jax.jit(lambda p, m: by_hand(make_loss(None), p, m, selections))(
        params, model_state
    )
    assert_close((state.params, state.model_state), expected, rtol=1e-5)


@needs_eight
@pytest.mark.parametrize("name", ["pmap", "mesh"])
def test_keys_and_counts_in_the_model_state_survive_many_devices(name):
    make_loss, params, model_state = nnx()
    state, _ = run(make_loss, params, model_state, PARALLEL[name](), steps=2)
    assert jax.tree.structure(state.model_state) == jax.tree.structure(model_state)
    before, after = jax.tree.leaves(model_state), jax.tree.leaves(state.model_state)
    for one, other in zip(before, after, strict=True):
        assert one.dtype == other.dtype
        if one.dtype == jnp.uint32:
            assert int(other) == int(one) + 2  # drawn from once in each step
