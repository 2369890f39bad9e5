"""davda54's step of SAM, written out in PyTorch by its formula, and ours.

PyTorch is no dependency of anything here: `pip install -e .[torch]` for this test.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from plain import enable_x64


torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e .[torch]")

SIZES, STEPS, BATCH = (6, 8, 5, 3), 20, 10
RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-3


def weights():
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=pair) / np.sqrt(pair[0]), rng.normal(size=pair[1]) * 0.1)
        for pair in itertools.pairwise(SIZES)
    ]


def batches():
    rng = np.random.default_rng(1)
    return [
        (rng.normal(size=(BATCH, SIZES[0])), rng.integers(0, SIZES[-1], BATCH))
        for _ in range(STEPS)
    ]


def in_torch(rho, adaptive):
    """The weights after each step: two backward passes around w + e(w)."""
    leaves = [
        torch.tensor(x, dtype=torch.float64, requires_grad=True)
        for pair in weights()
        for x in pair
    ]
    base = torch.optim.SGD(leaves, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)

    def backward(x, y):
        base.zero_grad()
        h, pairs = x, [(leaves[i], leaves[i + 1]) for i in range(0, len(leaves), 2)]
        for number, (w, b) in enumerate(pairs):
            h = h @ w + b
            h = torch.tanh(h) if number < len(pairs) - 1 else h
        torch.nn.functional.cross_entropy(h, y).backward()

    found = []
    for x, y in batches():
        x, y = torch.tensor(x), torch.tensor(y)
        backward(x, y)
        with torch.no_grad():
            scales = [p.abs() if adaptive else torch.ones_like(p) for p in leaves]
            scaled = [
                (t * p.grad).norm(p=2) for t, p in zip(scales, leaves, strict=True)
            ]
            factor = rho / (torch.stack(scaled).norm(p=2) + 1e-12)
            old = [p.clone() for p in leaves]
            for t, p in zip(scales, leaves, strict=True):
                p.add_(t**2 * p.grad * factor)
        backward(x, y)
        with torch.no_grad():
            for p, before in zip(leaves, old, strict=True):
                p.copy_(before)
        base.step()
        found.append([p.detach().numpy().copy() for p in leaves])
    return found


def loss_fn(params, model_state, batch, key):
    del key
    h, labels = batch
    for number, (w, b) in enumerate(params):
        h = h @ w + b
        h = jnp.tanh(h) if number < len(params) - 1 else h
    losses = optax.softmax_cross_entropy_with_integer_labels(h, labels)
    return losses.mean(), (model_state, {})


def base_optimizer():
    decay = optax.add_decayed_weights(DECAY)
    return optax.chain(decay, optax.sgd(RATE, momentum=MOMENTUM))


def in_a_train_step(method):
    with enable_x64(True):
        step = lwsam.TrainStep(loss_fn, base_optimizer(), method)
        params = jax.tree.map(jnp.asarray, weights())
        state = step.init(params, {}, batches()[0], key=jax.random.key(0))
        found = []
        for batch in batches():
            state, _ = step(state, batch)
            found.append([np.asarray(x) for x in jax.tree.leaves(state.params)])
    return found


def in_a_chain(method):
    with enable_x64(True):
        tx = optax.chain(lwsam.as_optax(method), base_optimizer())
        params = jax.tree.map(jnp.asarray, weights())

        @jax.jit
        def update(params, opt_state, batch):
            loss = lambda p: loss_fn(p, {}, batch, None)[0]
            grads = jax.grad(loss)(params)
            extra = {"grad_fn": jax.grad(loss)}
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            return optax.apply_updates(params, updates), opt_state

        opt_state, found = tx.init(params), []
        for batch in batches():
            params, opt_state = update(params, opt_state, batch)
            found.append([np.asarray(x) for x in jax.tree.leaves(params)])
    return found


METHODS = {
    "SAM": (0.05, False, lambda rho: lwsam.sam(rho)),
    "ASAM": (2.0, True, lambda rho: lwsam.asam(rho, shape=lwsam.adaptive(eta=0))),
}


@pytest.mark.parametrize("loop", [in_a_train_step, in_a_chain])
@pytest.mark.parametrize("name", METHODS)
def test_both_find_the_same_parameters(name, loop):
    rho, adaptive, method = METHODS[name]
    theirs, ours = in_torch(rho, adaptive), loop(method(rho))
    start = [x for pair in weights() for x in pair]
    for number, (expected, found) in enumerate(zip(theirs, ours, strict=True)):
        for a, b in zip(found, expected, strict=True):
            atol = 1e-9 * np.abs(b).max()
            np.testing.assert_allclose(a, b, 0, atol, err_msg=f"step {number}")
    assert any(
        np.abs(a - b).max() > 0.05 for a, b in zip(theirs[-1], start, strict=True)
    )
