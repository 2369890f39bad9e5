"""`lwsam.sharpness` against dense Hessians and closed forms, in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from plain import enable_x64


RHO = 0.3
SHAPES = {"a": (2, 3), "bias": (3,), "c": (3, 2)}
SIZES = [6, 3, 6]
N = sum(SIZES)


def symmetric(eigenvalues, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(N, N)))
    return (q * np.asarray(eigenvalues)) @ q.T


def tree(vector):
    parts = np.split(np.asarray(vector), np.cumsum(SIZES)[:-1])
    shapes = zip(SHAPES.items(), parts, strict=True)
    return {name: jnp.asarray(x.reshape(shape)) for (name, shape), x in shapes}


def vector(params):
    return jnp.concatenate([jnp.ravel(params[name]) for name in SHAPES])


def quadratic(matrices, slopes):
    """A loss whose i-th example is w A_i w / 2 + b_i w."""

    def loss(params, batch):
        w = vector(params)
        each = lambda a, b: 0.5 * w @ a @ w + b @ w
        return jnp.mean(jax.vmap(each)(batch["a"], batch["b"]))

    batch = {"a": jnp.asarray(matrices), "b": jnp.asarray(slopes)}
    return loss, batch


def parts():
    """The whole, and each layer: the places of its elements."""
    return [np.arange(N), np.arange(6), np.arange(9, 15)]


def only(x, places):
    out = np.zeros_like(x)
    out[places] = x[places]
    return out


def unit(x):
    return x / np.linalg.norm(x)


def of(found, name):
    """A measure of the whole and of each layer, one after the other."""
    rest = np.asarray(getattr(found.layers, name))
    return [np.asarray(getattr(found.whole, name)), *rest]


def test_a_quadratic_is_measured_exactly():
    rng = np.random.default_rng(1)
    # Of both signs, and one three times: a single Krylov space sees it once.
    spectra = [[5, 5, 5, 2, 1, *[0.5] * 4, 0, -1, -1, -7, -2, -3]] * 4
    matrices = [symmetric(s, i // 2) * (1 + i) for i, s in enumerate(spectra)]
    slopes, w = rng.normal(size=(4, N)), rng.normal(size=N)
    a, b = np.mean(matrices, axis=0), np.mean(slopes, axis=0)
    momentum = rng.normal(size=N)
    with enable_x64(True):
        loss, batch = quadratic(matrices, slopes)
        state = optax.trace(0.9).init(tree(w))._replace(trace=tree(momentum))
        found = lwsam.sharpness(
            loss,
            tree(w),
            batch,
            rho=RHO,
            m=2,
            eigenvalues=4,
            iterations=N,
            samples=2,
            opt_state=(state, optax.EmptyState()),
        )
    assert found.names == ("a", "c")
    np.testing.assert_allclose(found.value, 0.5 * w @ a @ w + b @ w)
    gap = lambda a, b, e: 0.5 * e @ a @ e + (a @ w + b) @ e
    for i, places in enumerate(parts()):
        block = a[np.ix_(places, places)]
        expected = np.linalg.eigvalsh(block)[::-1][:4]
        np.testing.assert_allclose(of(found, "eigenvalues")[i], expected, atol=1e-10)
        assert np.all(of(found, "residuals")[i] < 1e-10)
        climb = RHO * unit(only(a @ w + b, places))
        np.testing.assert_allclose(of(found, "gradient")[i], gap(a, b, climb))
        back = -RHO * unit(only(momentum, places))
        np.testing.assert_allclose(of(found, "momentum")[i], gap(a, b, back))
        groups = []
        for g in (slice(0, 2), slice(2, 4)):
            own_a, own_b = np.mean(matrices[g], axis=0), np.mean(slopes[g], axis=0)
            e = RHO * unit(only(own_a @ w + own_b, places))
            groups.append(gap(own_a, own_b, e))
        np.testing.assert_allclose(of(found, "m_sharpness")[i], np.mean(groups))


def test_a_round_bowl_is_as_steep_in_every_direction():
    with enable_x64(True):
        loss, batch = quadratic([7 * np.eye(N)], [np.zeros(N)])
        point = tree(np.zeros(N))
        found = lwsam.sharpness(loss, point, batch, rho=RHO, eigenvalues=3)
        # At the bottom there is no gradient, so along it nothing moves.
        assert of(found, "gradient") == [0, 0, 0] == of(found, "m_sharpness")
        assert found.whole.momentum is None
        for i in range(3):
            np.testing.assert_allclose(of(found, "eigenvalues")[i], [7, 7, 7])
            np.testing.assert_allclose(of(found, "random")[i], 3.5 * RHO**2)


def test_a_layer_has_no_more_eigenvalues_than_elements():
    with enable_x64(True):
        a = symmetric(-np.arange(1.0, N + 1))
        loss, batch = quadratic([a], [np.zeros(N)])
        found = lwsam.sharpness(loss, tree(np.ones(N)), batch, eigenvalues=8)
        block = a[9:, 9:]
        expected = [*np.linalg.eigvalsh(block)[::-1], 0, 0]
        np.testing.assert_allclose(found.layers.eigenvalues[1], expected, atol=1e-10)


def net(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["a"] + params["bias"])
    return jnp.mean((hidden @ params["c"] - y) ** 2)


@pytest.mark.parametrize("iterations", [N, 8])
def test_a_net_is_measured_as_its_dense_hessian_is(iterations):
    rng = np.random.default_rng(2)
    with enable_x64(True):
        batch = (
            jnp.asarray(rng.normal(size=(6, 2))),
            jnp.asarray(rng.normal(size=(6, 2))),
        )
        params = tree(rng.normal(size=N))
        found = lwsam.sharpness(
            net, params, batch, eigenvalues=2, iterations=iterations, m=3, rho=0.1
        )
        flat = lambda w: net(dict(zip(SHAPES, _split(w), strict=True)), batch)
        dense = np.asarray(jax.hessian(flat)(vector(params)))
    for i, places in enumerate(parts()):
        expected = np.linalg.eigvalsh(dense[np.ix_(places, places)])[::-1][:2]
        error = np.abs(of(found, "eigenvalues")[i] - expected)
        assert np.all(error <= of(found, "residuals")[i] + 1e-9)
        assert np.all(error <= 1e-2 * expected[0])


def _split(w):
    pieces = jnp.split(w, np.cumsum(SIZES)[:-1].tolist())
    return [p.reshape(s) for p, s in zip(pieces, SHAPES.values(), strict=True)]


def test_parameters_of_few_bits_are_measured_in_more(getkey):
    params = {"w": jax.random.normal(getkey(), (3, 2), jnp.bfloat16)}
    loss = lambda p, x: jnp.mean((x @ p["w"]) ** 2)
    batch = jax.random.normal(getkey(), (4, 3))
    found = jax.jit(lambda p, x: lwsam.sharpness(loss, p, x, m=1, rho=1e-3)[:3])(
        params, batch
    )
    wide = {"w": params["w"].astype(jnp.float32)}
    expected = lwsam.sharpness(loss, wide, batch, m=1, rho=1e-3)[:3]
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-4)
    assert float(found[1].m_sharpness) > float(found[1].gradient) > 0


_W = {"w": jnp.ones((2, 2))}
_LOSS = lambda p, x: jnp.mean((x @ p["w"]) ** 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rho": 0}, "expected `rho` to be a number > 0, got 0."),
        ({"rho": -1.0}, "expected `rho` to be finite and >= 0, got -1.0."),
        ({"m": 3}, "expected `m` to be a divisor of the batch 4, got 3."),
        ({"m": 8}, "expected `m` to be a divisor of the batch 4, got 8."),
        ({"m": 0}, "expected `m` to be >= 1, got 0."),
        ({"eigenvalues": 5}, "expected `eigenvalues` to be <= 4, the number of"),
        ({"iterations": 1.5}, "expected `iterations` to be an integer, got 1.5."),
        ({"samples": 0}, "expected `samples` to be >= 1, got 0."),
        ({"opt_state": ()}, "expected `opt_state` to be one that holds a first moment"),
        ({"params": {"w": jnp.ones((2, 2), jnp.complex64)}}, "of real float arrays"),
        ({"params": {"w": jnp.ones((2, 2), int)}}, "of float or complex arrays"),
        ({"batch": (jnp.ones((4, 2)), jnp.ones(3))}, "got first axes of [3, 4]"),
        ({"batch": 1.0}, "got first axes of []"),
        ({"loss_fn": lambda p, x: x}, "expected `loss_fn` to be a function to a real"),
    ],
)
def test_what_cannot_be_measured_raises(changes, message):
    given = {"loss_fn": _LOSS, "params": _W, "batch": jnp.ones((4, 2)), **changes}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        lwsam.sharpness(**given)
