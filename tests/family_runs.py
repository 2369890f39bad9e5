"""The library in its loops on a small net, for tests against the family's oracles."""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import family_reference as family
import lwsam_jax as lwsam
import reference
from plain import enable_x64


STEPS = 6
RATE, MOMENTUM = 0.3, 0.9
SIZE = 8
# The names in the library's tree. The middle layer is called as a normalization layer
# is, so that SAM-ON finds it.
NAMES = {"z_in": "z_in", "m_mid": "m_BatchNorm_0", "a_out": "a_out"}
ALL = tuple(reference.LEAVES)
KERNELS = tuple(leaves[0] for leaves in reference.WEIGHTS.values())
MODULES = {n: (f"{n}/kernel", f"{n}/bias") for n in reference.MLP_LAYERS}

GRADIENT = family.gradient_of(reference.mlp_value_and_grad)
LOSSES = family.losses_of(reference.mlp_value_and_grad)


def follow(rule, params=None, batches=None):
    """The oracle's steps."""
    return family.trajectory(
        rule,
        reference.mlp_params() if params is None else params,
        reference.mlp_batches(STEPS, SIZE) if batches is None else batches,
        learning_rate=RATE,
        momentum=MOMENTUM,
    )


def assert_follows(ours, steps, rtol=1e-9):
    """The parameters after each step, relative to the largest entry of each leaf."""
    for number, (params, step) in enumerate(zip(ours, steps, strict=True)):
        for name, leaf in step.params.items():
            where = f"{name} after step {number}"
            atol = rtol * np.abs(leaf).max()
            np.testing.assert_allclose(params[name], leaf, 0, atol, err_msg=where)


def params_of(steps):
    return [step.params for step in steps]


def to_tree(leaves, dtype=np.float64):
    tree = {name: {} for name in NAMES.values()}
    for path, leaf in leaves.items():
        name, key = path.split("/")
        tree[NAMES[name]][key] = jnp.asarray(leaf, dtype)
    return tree


def from_tree(tree):
    return {
        f"{name}/{key}": np.asarray(tree[NAMES[name]][key], np.float64)
        for name, key in (path.split("/") for path in ALL)
    }


def leaves_of(names):
    """The oracle's names of the library's layers, under the rule that leaves are."""
    back = {ours: name for name, ours in NAMES.items()}
    paths = [name if name.endswith("/bias") else f"{name}/kernel" for name in names]
    pairs = (path.split("/") for path in paths)
    return tuple(f"{back[name]}/{key}" for name, key in pairs)


def example_losses(params, batch):
    h, labels = batch
    for name in NAMES.values():
        h = h @ params[name]["kernel"] + params[name]["bias"]
        h = jnp.tanh(h) if name != "a_out" else h
    return optax.softmax_cross_entropy_with_integer_labels(h, labels)


def loss_fn(params, model_state, batch, key):
    """The metrics show the point at which the loss was computed."""
    del key
    losses = example_losses(params, batch)
    return jnp.mean(losses), (model_state, {"losses": losses, "point": params})


def base_optimizer():
    return optax.sgd(RATE, momentum=MOMENTUM)


def problem(dtype=np.float64):
    params = to_tree(reference.mlp_params(), dtype)
    return params, [(x.astype(dtype), y) for x, y in reference.mlp_batches(STEPS, SIZE)]


class Run(NamedTuple):
    """Of each step: parameters after it, layers perturbed, metrics, info, state."""

    params: list
    kept: list
    metrics: list
    infos: list
    states: list


def train(method, parallel=None, dtype=np.float64, params=None, loss_fn=loss_fn):
    """Runs a TrainStep."""
    with enable_x64(True) if dtype == np.float64 else contextlib.nullcontext():
        start, batches = problem(dtype)
        start = start if params is None else to_tree(params, dtype)
        step = lwsam.TrainStep(loss_fn, base_optimizer(), method, parallel)
        state = step.init(start, {}, batches[0], key=jax.random.key(0))
        run = Run([], [], [], [], [])
        for batch in batches:
            state, info = step(state, batch)
            assert bool(info.finite)
            run.params.append(from_tree(state.params))
            run.kept.append(step.layers.selected(info.mask))
            run.metrics.append(jax.device_get(info.metrics))
            run.infos.append(jax.device_get(info))
            run.states.append(jax.device_get(state.method_state))
    return run


def chain(method, form):
    """Runs an optax.chain; the parameters after each step, and what it perturbed."""
    with enable_x64(True):
        params, batches = problem()
        tx = optax.chain(lwsam.as_optax(method), base_optimizer())

        @jax.jit
        def update(params, opt_state, batch):
            loss = lambda p: jnp.mean(example_losses(p, batch))
            grads = jax.grad(loss)(params)
            extra = {form: jax.grad(loss) if form == "grad_fn" else loss}
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            return optax.apply_updates(params, updates), opt_state

        opt_state = tx.init(params)
        run = Run([], [], [], [], [])
        for batch in batches:
            run.kept.append(lwsam.selection(opt_state))
            params, opt_state = update(params, opt_state, batch)
            run.params.append(from_tree(params))
    return run


@functools.cache
def base():
    """The base optimizer in a loop of its own."""
    with enable_x64(True):
        params, batches = problem()
        tx = base_optimizer()

        @jax.jit
        def update(params, opt_state, batch):
            loss = lambda p: jnp.mean(example_losses(p, batch))
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        opt_state, path = tx.init(params), []
        for batch in batches:
            params, opt_state = update(params, opt_state, batch)
            path.append(from_tree(params))
    return path


def pull(params, model_state, batch, key):
    """L = |w - c|^2 / 2 for each example; d - g is the perturbation in a step of SAM."""
    del key
    losses = [
        jnp.sum((w[None] - c) ** 2, axis=tuple(range(1, c.ndim))) / 2
        for w, c in zip(jax.tree.leaves(params), jax.tree.leaves(batch), strict=True)
    ]
    return jnp.mean(sum(losses)), (model_state, {"losses": sum(losses)})


def flat_norm(tree):
    return reference.norm_of(np.asarray(leaf) for leaf in jax.tree.leaves(tree))


def pulled(method, batches, rate=0.5):
    """For each step w, g and d - g, and the names of the leaves perturbed."""
    with enable_x64(True):
        params = {"norm": {"scale": jnp.asarray([1.0, -2.0])}, "w": jnp.ones((2, 3))}
        step = lwsam.TrainStep(pull, optax.sgd(rate), method)
        state = step.init(params, {}, batches[0], key=jax.random.key(3))
        records = []
        for batch in batches:
            w = jax.tree.map(np.asarray, state.params)
            state, info = step(state, batch)
            assert bool(info.finite)
            g = jax.tree.map(lambda w, c: w - c.mean(axis=0), w, batch)
            epsilon = jax.tree.map(
                lambda a, b, g: (a - np.asarray(b)) / rate - g, w, state.params, g
            )
            records.append((w, g, epsilon, step.layers.selected(info.mask)))
    return records


def pulling_batches(steps, size=2):
    """In step 0 the gradient is zero; all examples of a batch are the same."""
    rng = np.random.default_rng(0)
    one = {"norm": {"scale": np.array([1.0, -2.0])}, "w": np.ones((2, 3))}
    repeat = lambda leaf: np.repeat(leaf[None], size, axis=0)
    batches = [jax.tree.map(repeat, one)]
    for _ in range(steps - 1):
        one = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), one)
        batches.append(jax.tree.map(repeat, one))
    return batches
