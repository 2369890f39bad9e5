"""One perturbation for all devices, or for each its own: `TrainStep(sync=)`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import lwsam_jax as lwsam
import mesh_task as task
from devices import DEVICES, needs_eight
from plain import enable_x64
from test_mesh_collectives import BATCH, FULLY, NAMES, PARAMS, REDUCE, travels


pytestmark = needs_eight
ROWS, RHO, RATE = 16, 0.3, 0.1
RNG = np.random.default_rng(2)
W = {"in": RNG.normal(size=(4, 6)) / 2, "out": RNG.normal(size=(6, 2)) / 2}
X, Y = RNG.normal(size=(ROWS, 4)), RNG.normal(size=(ROWS, 2))
WAYS = {
    "pmap": (DEVICES, lambda: {"parallel": "pmap"}),
    "8": (DEVICES, lambda: {"parallel": task.mesh("8")}),
    "4 x 2": (DEVICES, lambda: {"parallel": task.mesh("4 x 2")}),
    "4 of 4 x 2": (4, lambda: {"parallel": task.mesh("4 x 2"), "batch_axes": "data"}),
}


def loss_fn(params, model_state, batch, key):
    h = jnp.tanh(batch["x"] @ params["in"])
    loss = jnp.mean((h @ params["out"] - batch["y"]) ** 2)
    noise = jax.random.normal(key, ()) * 0
    return loss + noise, (model_state, {"point": params["in"]})


def gradient(w, x, y):
    """Value and gradient of the same loss, by hand."""
    h = np.tanh(x @ w["in"])
    error = h @ w["out"] - y
    back = 2 * error / error.size
    into = (back @ w["out"].T) * (1 - h**2)
    return np.mean(error**2), {"in": x.T @ into, "out": h.T @ back}


def steps_by_hand(devices, alpha, steps):
    """m-sharpness: each share climbs by its own gradient; the descents are averaged."""
    w, values = W, []
    for _ in range(steps):
        total, clean = {k: 0.0 for k in w}, []
        for x, y in zip(np.split(X, devices), np.split(Y, devices), strict=True):
            value, g = gradient(w, x, y)
            size = np.sqrt(sum(np.sum(v**2) for v in g.values()))
            moved = {k: w[k] + RHO * g[k] / size for k in w}
            _, hat = gradient(moved, x, y)
            d = {k: (1 - alpha) * g[k] + alpha * hat[k] for k in w}
            total = {k: total[k] + d[k] / devices for k in w}
            clean.append(value)
        w = {k: w[k] - RATE * total[k] for k in w}
        values.append(np.mean(clean))
    return w, values


def train(way, method, steps=3, **options):
    _, given = WAYS[way]
    with enable_x64(True):
        step = lwsam.TrainStep(
            loss_fn, optax.sgd(RATE), method, sync="device", **given(), **options
        )
        batch = {"x": X, "y": Y}
        state, infos = step.init(W, {}, batch, key=jax.random.key(0)), []
        for _ in range(steps):
            state, info = step(state, batch)
            infos.append(jax.device_get(info))
        return jax.device_get(state.params), infos


@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("way", WAYS)
def test_each_device_climbs_by_the_gradient_of_its_share(way, alpha):
    method = lwsam.Method(lwsam.everything(), rho=RHO, combine=lwsam.mix(alpha))
    params, infos = train(way, method)
    expected, values = steps_by_hand(WAYS[way][0], alpha, 3)
    for name, wanted in expected.items():
        np.testing.assert_allclose(params[name], wanted, rtol=1e-9)
    np.testing.assert_allclose([info.value for info in infos], values, rtol=1e-9)


@pytest.mark.parametrize("way", ["pmap", "8"])
def test_each_device_has_noise_of_its_own(way):
    """The mean of their points is off by a noise that is smaller by the root of 8."""
    method = lwsam.Method(
        lwsam.everything(), rho=1.0, ascent=lwsam.random(), shape=lwsam.raw()
    )
    _, (info,) = train(way, method, 1)
    spread = np.std(info.metrics["point"] - W["in"])
    assert 0.5 / np.sqrt(DEVICES) < spread < 1.7 / np.sqrt(DEVICES)


def test_nothing_is_reduced_between_the_passes():
    def loss(params, model_state, batch, key):
        x = batch
        for name in NAMES:
            x = jnp.tanh(x @ params[name])
        return jnp.mean(x**2), (model_state, {})

    step = lwsam.TrainStep(
        loss, optax.sgd(0.1), lwsam.sam(0.1), task.mesh("8"), sync="device"
    )
    state = step.init(PARAMS, {}, BATCH, key=jax.random.key(0))
    found = travels(step.lower(state, BATCH, NAMES).compile())
    assert {n: found[REDUCE, n] for n in NAMES} == dict.fromkeys(NAMES, 1)


def test_what_cannot_be_raises():
    mesh = task.mesh("8")
    make = lambda method, parallel=mesh, sync="device": lwsam.TrainStep(
        loss_fn, optax.sgd(0.1), method, parallel, sync=sync
    )
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    cut = jax.tree.map(place, PARAMS, FULLY)
    with pytest.raises(ValueError, match=r"params\['a'\].*replicated"):
        make(lwsam.sam(0.1)).init(cut, {}, {"x": X, "y": Y}, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"`sync`.*'global', 'device'"):
        make(lwsam.sam(0.1), sync="none")
    with pytest.raises(ValueError, match=r"`sync`.*one device"):
        make(lwsam.sam(0.1), None)
    with pytest.raises(ValueError, match=r"`sync`.*same on every device"):
        make(lwsam.Method(lwsam.everything(), rho=0.1, ascent=lwsam.momentum()))
    with pytest.raises(ValueError, match=r"`sync`.*split"):
        make(lwsam.sam(0.1, split=lwsam.sub_batches(8)))
    with pytest.raises(ValueError, match="one without a state"):
        make(lwsam.friendly_sam(0.1)).init(
            W, {}, {"x": X, "y": Y}, key=jax.random.key(0)
        )
