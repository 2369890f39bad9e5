"""The noise presets with one set of numbers each, and the oracles with the same."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import family_reference as family
import lwsam_jax as lwsam
import reference
import weight_noise_reference as oracle
from plain import enable_x64


STEPS, SIZE, PARTS = 20, 8, 4
RATE, MOMENTUM = 0.2, 0.9
KEY = jax.random.key(5)
BATCHES = reference.mlp_batches(STEPS, SIZE)
GRADIENT = family.gradient_of(reference.mlp_value_and_grad)
LEAVES = tuple(reference.LEAVES)
KERNELS = tuple(name for name in LEAVES if name.endswith("/kernel"))
# One set of numbers for each preset: for the library and for the oracle.
HYPER = {
    "random_sam": {"rho": 0.4},
    "rwp": {"rho": 0.1},
    "m_rwp": {"rho": 0.1, "weight": 0.3},
    "arwp": {"rho": 0.1, "eta": 2.0, "decay": 0.8},
    "m_arwp": {"rho": 0.1, "weight": 0.3, "eta": 2.0, "decay": 0.8},
    "damp": {"rho": 0.2, "count": PARTS},
}


def method(name, **changes):
    return getattr(lwsam, name)(**{**HYPER[name], **changes})


def rule_of(name, noise, **changes):
    hyper: Any = {**HYPER[name], **changes}
    rho, weight = hyper["rho"], hyper.get("weight")
    damping: Any = {"eta": hyper.get("eta"), "beta": hyper.get("decay")}
    rules = {
        "random_sam": lambda: oracle.in_parts(
            GRADIENT, oracle.on_the_sphere(rho), noise
        ),
        "rwp": lambda: oracle.in_parts(GRADIENT, oracle.filter_wise(rho), noise),
        "m_rwp": lambda: oracle.two_batches(
            GRADIENT, oracle.filter_wise(rho), noise, weight
        ),
        "arwp": lambda: oracle.damped(GRADIENT, rho, noise, **damping),
        "m_arwp": lambda: oracle.damped(GRADIENT, rho, noise, weight=weight, **damping),
        "damp": lambda: oracle.in_parts(
            GRADIENT, oracle.multiplicative(rho, KERNELS), noise
        ),
    }
    return rules[name]()


def follow(rule, batches=BATCHES):
    steps = family.trajectory(
        rule,
        reference.mlp_params(),
        batches,
        learning_rate=RATE,
        momentum=MOMENTUM,
    )
    return [step.params for step in steps]


def assert_follows(ours, steps, rtol=1e-9):
    for number, (params, step) in enumerate(zip(ours, steps, strict=True)):
        for name, leaf in step.items():
            where = f"{name} after step {number}"
            atol = rtol * max(np.abs(leaf).max(), 1e-3)
            np.testing.assert_allclose(params[name], leaf, 0, atol, err_msg=where)


def to_tree(leaves, dtype=np.float64):
    tree = {}
    for path, leaf in leaves.items():
        layer, key = path.split("/")
        tree.setdefault(layer, {})[key] = jnp.asarray(leaf, dtype)
    return tree


def from_tree(tree):
    pairs = (path.split("/") for path in LEAVES)
    return {f"{a}/{b}": np.asarray(tree[a][b]) for a, b in pairs}


def losses_of(params, batch):
    h, labels = batch
    for name in reference.MLP_LAYERS:
        h = h @ params[name]["kernel"] + params[name]["bias"]
        h = jnp.tanh(h) if name != "a_out" else h
    return optax.softmax_cross_entropy_with_integer_labels(h, labels)


def loss_fn(params, model_state, batch, key):
    """Each example's metrics show the point at which its loss was computed."""
    del key
    losses = losses_of(params, batch)
    point = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params)])
    points = jnp.broadcast_to(point, (len(losses), *point.shape))
    metrics = {"losses": losses, "points": points, "examples": jnp.int32(len(losses))}
    return losses.mean(), (model_state + losses.mean(), metrics)


def base_optimizer(rate=RATE):
    return optax.sgd(rate, momentum=MOMENTUM)


def train(method, steps=STEPS, optimizer=None, dtype=np.float64, parallel=None):
    """The parameters after each step, and what it reports."""
    with enable_x64(dtype == np.float64):
        optimizer = base_optimizer() if optimizer is None else optimizer
        step = lwsam.TrainStep(loss_fn, optimizer, method, parallel)
        params = to_tree(reference.mlp_params(), dtype)
        batches = [(x.astype(dtype), y) for x, y in BATCHES[:steps]]
        start = jnp.zeros((), dtype)
        state = step.init(params, start, batches[0], key=KEY)
        found = []
        for batch in batches:
            state, info = step(state, batch)
            found.append((from_tree(state.params), jax.device_get(info)))
        return found


@functools.cache
def noise(parts=None):
    """What `random` draws for each part of each step, seen where weights stay at 0."""
    split = None if parts is None else lwsam.sub_batches(parts)
    alone = lwsam.Method(
        lwsam.everything(),
        rho=1.0,
        ascent=lwsam.random(),
        shape=lwsam.raw(),
        split=split,
        rule=lwsam.leaves,
    )
    found = train(alone, optimizer=optax.sgd(0.0))
    with enable_x64(True):
        w, treedef = jax.tree.flatten(to_tree(reference.mlp_params()))
        start = np.concatenate([np.ravel(x) for x in w])
        shapes = [x.shape for x in w]
    sizes = np.cumsum([x.size for x in w])[:-1]

    def leaves(row):
        pieces = np.split(row - start, sizes)
        pairs = zip(pieces, shapes, strict=True)
        return from_tree(jax.tree.unflatten(treedef, [p.reshape(s) for p, s in pairs]))

    size = SIZE // (parts or 1)
    return [
        [leaves(row) for row in info.metrics["points"][::size]] for _, info in found
    ]
