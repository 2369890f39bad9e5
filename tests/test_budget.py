"""Budgets: each step within max_overhead, the mean within mean_overhead; the scan."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam


WIDTHS = (6, 12, 10, 8, 3)
STEPS = 40


def loss_fn(params, model_state, batch, key):
    del key
    h = batch["x"]
    for name in sorted(params)[:-1]:
        h = jnp.tanh(h @ params[name])
    loss = jnp.mean((h @ params[sorted(params)[-1]] - batch["y"]) ** 2)
    return loss, (model_state, {})


def make_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(WIDTHS) - 1)
    shapes = itertools.pairwise(WIDTHS)
    return {
        f"w{i}": jax.random.normal(k, s, dtype)
        for i, (k, s) in enumerate(zip(keys, shapes, strict=True))
    }


def make_batches(count, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(1), (count, 16, WIDTHS[0]), dtype)
    y = jax.random.normal(jax.random.key(2), (count, 16, WIDTHS[-1]), dtype)
    return {"x": x, "y": y}


def make_step(*, lag=0, max_executables=9, **method):
    method = {"k": 2, "rho": 0.05, "alpha": 0.8, "normalize": "selected", **method}
    return lwsam.TrainStep(
        loss_fn,
        optax.sgd(0.05, momentum=0.9),
        lwsam.LayerwiseSAM(**method),
        selection_lag=lag,
        max_executables=max_executables,
    )


def run(step, batches, state=None, steps=None):
    at = lambda i: jax.tree.map(lambda x: x[i], batches)
    if state is None:
        state = step.init(make_params(), {}, at(0), key=jax.random.key(3))
    infos = []
    for i in range(len(batches["x"])) if steps is None else steps:
        state, info = step(state, at(i))
        infos.append(info)
    return state, jax.tree.map(lambda *xs: np.stack(xs), *infos)


@pytest.fixture(scope="module")
def batches():
    return make_batches(STEPS)


@pytest.fixture(scope="module")
def free(batches):
    """The paper's rule, without a budget."""
    step = make_step()
    state, infos = run(step, batches)
    return step, state, infos


def test_every_step_stays_within_max_overhead(batches, free):
    bound = 0.5
    step = make_step(max_overhead=bound)
    _, infos = run(step, batches)
    assert infos.overhead.max() <= bound < free[2].overhead.max()
    assert infos.mask.any(axis=1).all()


def test_a_bound_that_all_layers_keep_changes_nothing(batches, free):
    _, infos = run(make_step(max_overhead=1.5), batches)
    np.testing.assert_array_equal(infos.mask, free[2].mask)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_the_running_mean_stays_within_mean_overhead(batches, share):
    _, infos = run(make_step(mean_overhead=share), batches)
    means = np.cumsum(infos.overhead) / np.arange(1, STEPS + 1)
    assert (means <= share + 1e-5).all()
    np.testing.assert_allclose(infos.mean_overhead, means, rtol=1e-5)


def test_savings_pay_for_a_dear_set_now_and_then(batches):
    """A share that pays for no layer alone is saved until it pays for a free choice."""
    step = make_step(mean_overhead=0.06)
    _, infos = run(step, batches)
    perturbed = infos.mask.any(axis=1)
    assert 0 < perturbed.sum() < STEPS / 2
    assert infos.overhead.max() > 0.06
    assert infos.mean_overhead[-1] <= 0.06 + 1e-5


def test_a_budget_below_every_layer_gives_plain_steps_and_one_warning(batches):
    step = make_step(max_overhead=1e-4)
    with pytest.warns(UserWarning, match="max_overhead.*every step is plain") as caught:
        state, infos = run(step, batches, steps=range(4))
    assert len(caught) == 1
    assert not infos.mask.any()
    plain, _ = run(make_step(k=0, rho=0.0), batches, steps=range(4))
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(plain.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["max_overhead", "mean_overhead"])
@pytest.mark.parametrize("bad", [-0.1, float("nan"), "cheap"])
def test_a_wrong_budget_is_refused(name, bad):
    with pytest.raises((TypeError, ValueError), match=name):
        lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8, **{name: bad})


def test_parameters_do_not_depend_on_the_executables(batches, free):
    """One cover for everything, or one for each depth: the same bits."""
    for most in (2, 3):
        state, infos = run(make_step(max_executables=most), batches)
        np.testing.assert_array_equal(infos.mask, free[2].mask)
        for a, b in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(free[1].params), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_a_lag_uses_older_norms_and_resumes_exactly(batches):
    lag = 1
    step = make_step(lag=lag, k=1)
    state, infos = run(step, batches, steps=range(12))
    decided = np.argmax(infos.norms, axis=1)
    perturbed = np.argmax(infos.mask, axis=1)
    np.testing.assert_array_equal(perturbed[1 + lag :], decided[: -1 - lag])

    first, second = make_step(lag=lag, k=1), make_step(lag=lag, k=1)
    half, _ = run(first, batches, steps=range(5))
    restored = jax.tree.map(lambda x: x.copy(), half)
    end, _ = run(second, batches, restored, range(5, 12))
    for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(state), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("budget", [{}, {"max_overhead": 0.5}, {"mean_overhead": 0.3}])
def test_scan_agrees_with_the_loop(batches, budget):
    loop_step, scan_step = make_step(**budget), make_step(**budget)
    first = jax.tree.map(lambda x: x[:1], batches)
    at = jax.tree.map(lambda x: x[0], batches)
    looped, _ = run(loop_step, first)
    state = scan_step.init(make_params(), {}, at, key=jax.random.key(3))
    scanned, _ = scan_step.scan(state, first)
    for a, b in zip(
        jax.tree.leaves(looped.params), jax.tree.leaves(scanned.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_scan_agrees_with_the_loop_in_float64_for_fifty_steps():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else _x64():
        batches = make_batches(50, jnp.float64)
        at = jax.tree.map(lambda x: x[0], batches)
        loop_step, scan_step = make_step(), make_step()
        params = make_params(jnp.float64)
        state = loop_step.init(params, {}, at, key=jax.random.key(3))
        looped, infos = run(loop_step, batches, state)
        state = scan_step.init(params, {}, at, key=jax.random.key(3))
        scanned, scan_infos = scan_step.scan(state, batches, covers=3)
        np.testing.assert_array_equal(infos.mask, scan_infos.mask)
        for a, b in zip(
            jax.tree.leaves(looped.params), jax.tree.leaves(scanned.params), strict=True
        ):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def _x64():
    from jax.experimental import enable_x64

    return enable_x64()


def test_scan_compiles_no_more_covers_than_asked_for(batches):
    step = make_step()
    at = jax.tree.map(lambda x: x[0], batches)
    step.init(make_params(), {}, at, key=jax.random.key(3))
    for count in (1, 2, 3, 9):
        covers = step._compiled._menu.few(count)
        assert covers[0] == lwsam.Cover(())
        assert len(covers) <= count + 1
        assert set(covers[-1].names) == set(step.layers.names)


def test_no_warning_within_budget(batches):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make_step(max_overhead=0.5), batches, steps=range(1))
