"""A small task whose parameters can be sharded in every way, and meshes for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lwsam_jax as lwsam
from plain import enable_x64


ROWS, WIDE = 16, 16
RNG = np.random.default_rng(4)
PARAMS = {
    "a_in": {"kernel": RNG.normal(size=(8, WIDE)) / 3, "bias": np.zeros(WIDE)},
    "b_mid": {"kernel": RNG.normal(size=(WIDE, 8)) / 4},
    "c_out": {"kernel": RNG.normal(size=(8, 8)) / 3},
}
MODEL_STATE = {"mean": np.zeros(WIDE), "steps": np.int32(0)}
KEY = jax.random.key(5)

# The axes of each mesh, those over which the batch is cut, and for each of the
# parameters a spec. In the mixed ones some layers are replicated.
fully = lambda axes: {
    "a_in": {"kernel": P(None, axes), "bias": P()},
    "b_mid": {"kernel": P(axes)},
    "c_out": {"kernel": P(axes)},
}
tensors = lambda axis: {
    "a_in": {"kernel": P(None, axis), "bias": P(axis)},
    "b_mid": {"kernel": P(axis)},
    "c_out": {"kernel": P()},
}
replicated = jax.tree.map(lambda x: P(), PARAMS)
mixed = {
    "a_in": {"kernel": P("data", "model"), "bias": P("model")},
    "b_mid": {"kernel": P("model", "data")},
    "c_out": {"kernel": P()},
}
SHAPES = {
    "8": ((8,), ("data",)),
    "4 x 2": ((4, 2), ("data", "model")),
    "2 x 2 x 2": ((2, 2, 2), ("replica", "data", "model")),
}


def mesh(shape, kind="Auto"):
    sizes, names = SHAPES[shape]
    return jax.make_mesh(
        sizes, names, axis_types=(getattr(AxisType, kind),) * len(names)
    )


def put(mesh, specs, params=PARAMS):
    with enable_x64(True):
        return jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs
        )


@functools.cache
def batch(seed):
    """Rows of unequal weight, some of them padding, and a vector that is no batch."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.2, 3.0, size=ROWS)
    weight[-3:] = 0.0
    return {
        "x": rng.normal(size=(ROWS, 8)) * np.linspace(0.3, 2.0, ROWS)[:, None],
        "y": rng.integers(0, 8, size=ROWS),
        "weight": weight,
    }


def forward(params, batch, gather):
    h = batch["x"] @ gather(params["a_in"]["kernel"])
    mean = jnp.mean(h, axis=0)
    h = (h - mean) / jnp.sqrt(jnp.var(h, axis=0) + 0.1)
    h = jnp.tanh(h + gather(params["a_in"]["bias"]))
    y = jnp.tanh(h @ gather(params["b_mid"]["kernel"])) @ gather(
        params["c_out"]["kernel"]
    )
    return y, mean


def loss_of(gather=lambda w: w):
    """BatchNorm over the batch, dropout, a weighted mean, and metrics of each example."""

    def loss_fn(params, model_state, batch, key):
        y, mean = forward(params, batch, gather)
        y = y * (1 + 0.1 * jax.random.normal(key, y.shape, y.dtype))
        labels = jax.nn.one_hot(batch["y"], 8, dtype=y.dtype)
        losses = -jnp.sum(labels * jax.nn.log_softmax(y), axis=1)
        loss = jnp.sum(batch["weight"] * losses) / jnp.sum(batch["weight"])
        model_state = {
            "mean": 0.9 * model_state["mean"] + 0.1 * mean,
            "steps": model_state["steps"] + 1,
        }
        return loss, (model_state, {"losses": losses})

    return loss_fn


def gathered(w):
    """What a loss says where axes are Explicit: a weight is used whole."""
    return jax.sharding.reshard(w, P())


METHODS = {
    "layers": lambda: lwsam.LayerwiseSAM(k=1, rho=0.3, alpha=0.7),
    "full norm": lambda: lwsam.LayerwiseSAM(k=2, rho=0.3, alpha=0.7, normalize="full"),
    "sam": lambda: lwsam.sam(0.1),
    "asam": lambda: lwsam.asam(0.3),
    "friendly": lambda: lwsam.friendly_sam(0.1),
    "look": lambda: lwsam.looksam(0.1, period=2),
    "gap": lambda: lwsam.gsam(0.1, 0.3),
    "momentum": lambda: lwsam.Method(
        lwsam.everything(), rho=0.1, ascent=lwsam.momentum(), shape=lwsam.relative()
    ),
    "random": lambda: lwsam.Method(
        lwsam.everything(),
        rho=0.1,
        ascent=lwsam.random(),
        shape=lwsam.relative("filter"),
    ),
}


def make(method, parallel=None, gather=lambda w: w, **options):
    method = METHODS[method]() if isinstance(method, str) else method
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01))
    return lwsam.TrainStep(loss_of(gather), optimizer, method, parallel, **options)


def run(step, params, steps):
    """The state after so many steps, and what each of them reported."""
    infos = []
    with enable_x64(True):
        state = step.init(params, MODEL_STATE, batch(0), key=KEY)
        for i in range(steps):
            state, info = step(state, batch(i))
            infos.append(info)
    return state, infos


@functools.cache
def one_device(method, steps):
    state, infos = run(make(method), PARAMS, steps)
    return jax.device_get((state._replace(key=jax.random.key_data(state.key)), infos))
