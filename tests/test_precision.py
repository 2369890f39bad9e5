"""Numbers are kept wide, rounded once, and never made into NaN."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from plain import enable_x64


def point_of(w, g, *, rho=0.3, normalize="none", selection=("w",)):
    """The perturbed weights: with alpha=1, what a grad_fn that returns w gets."""
    params, grads = {"w": w}, {"w": g}
    tx = lwsam.layerwise_sam(k=1, rho=rho, alpha=1.0, normalize=normalize)
    updates, state = jax.jit(
        lambda p, g, s: tx.update(g, s, p, grad_fn=lambda p: p, selection=selection)
    )(params, grads, tx.init(params))
    return updates["w"], state


def normal(seed, shape=(64, 64), scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("selection", [("w",), lwsam.Cover(("w",)), None])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_perturbed_point_is_computed_in_float32_and_rounded_once(dtype, selection):
    w = jnp.asarray(normal(0), dtype)
    g = jnp.asarray(normal(1), dtype)
    rho = 0.0517  # no short number
    point, _ = point_of(w, g, rho=rho, selection=selection)
    exact = np.asarray(w, np.float64) + np.float32(rho) * np.asarray(g, np.float64)
    assert point.dtype == dtype
    rounded = np.asarray(
        jnp.asarray(exact.astype(np.float32)).astype(dtype), np.float32
    )
    # A product rounded to float32 first may move a tie: one weight in thousands.
    assert np.mean(np.asarray(point, np.float32) != rounded) < 1e-3
    narrow = np.asarray(w + jnp.asarray(rho, dtype) * g, np.float32)
    assert np.mean(narrow != rounded) > 0.01, "the test could not tell"


def test_a_small_radius_in_bfloat16_still_turns_the_right_way():
    """In bfloat16 arithmetic the norm itself is off; here only the last rounding is."""
    w = jnp.asarray(normal(0, (100, 1000), 0.02), jnp.bfloat16)
    g = jnp.asarray(normal(1, (100, 1000)), jnp.bfloat16)
    point, state = point_of(w, g, rho=0.5, normalize="selected")
    step = np.asarray(point, np.float64) - np.asarray(w, np.float64)
    np.testing.assert_allclose(np.linalg.norm(step), 0.5, rtol=0.02)
    assert state.norms.dtype == jnp.float32


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_float16_norms_neither_overflow_nor_lose_small_numbers(size):
    """The sum of squares passes 65504, or every square is below what float16 holds."""
    g = jnp.full((300, 400), size, jnp.float16)
    _, state = point_of(jnp.zeros((300, 400), jnp.float16), g)
    point, _ = point_of(jnp.zeros_like(g), g, rho=64.0, normalize="selected")
    expected = 64.0 / np.sqrt(120_000)
    np.testing.assert_allclose(np.asarray(point, np.float32), expected, rtol=1e-3)
    # The norms are those at the perturbed point, where this grad_fn returns that point.
    exact = np.float64(jnp.float16(0.3 * np.float32(g[0, 0]))) * np.sqrt(120_000)
    np.testing.assert_allclose(state.norms[0], exact, rtol=1e-3)


def test_float64_stays_float64():
    with enable_x64(True):
        # Of one sign: where terms cancel, no implementation has so many digits.
        w, g = abs(normal(0)), abs(normal(1))
        assert jnp.asarray(w).dtype == jnp.float64
        point, _ = point_of(
            jnp.asarray(w), jnp.asarray(g), rho=0.3, normalize="selected"
        )
        exact = w + 0.3 * g / np.linalg.norm(g)
        np.testing.assert_allclose(point, exact, rtol=1e-14)


@pytest.mark.parametrize("form", ["grad_fn", "value_fn"])
@pytest.mark.parametrize("selection", [("w",), None, ()])
def test_updates_keep_each_dtype(form, selection):
    params = {
        "b": jnp.ones(3, jnp.float32),
        "v": jnp.ones((3, 3), jnp.float16),
        "w": jnp.ones((3, 3), jnp.bfloat16),
    }
    loss = lambda p: sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in p.values())
    tx = lwsam.layerwise_sam(k=2, rho=0.3, alpha=0.7, normalize="selected")
    state = tx.init(params)
    extra = {form: loss if form == "value_fn" else jax.grad(loss)}
    updates, after = jax.eval_shape(
        lambda p, s: tx.update(p, s, p, selection=selection, **extra), params, state
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_eq_6_is_mixed_wide_and_rounded_once():
    """0.3 g + 0.7 d in bfloat16 arithmetic would round three times."""
    g, d = (jnp.asarray(normal(i), jnp.bfloat16) for i in (1, 2))
    params = {"w": jnp.zeros((64, 64), jnp.bfloat16)}
    tx = lwsam.layerwise_sam(k=1, rho=0.3, alpha=0.7)
    updates, _ = tx.update(
        {"w": g}, tx.init(params), params, grad_fn=lambda p: {"w": d}, selection=("w",)
    )
    exact = 0.3 * np.asarray(g, np.float64) + 0.7 * np.asarray(d, np.float64)
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float32)
    assert np.mean(np.asarray(updates["w"], np.float32) != rounded) < 1e-2


@pytest.mark.parametrize("normalize", ["none", "selected", "full"])
def test_an_infinite_gradient_elsewhere_does_not_reach_the_selected_layer(normalize):
    """Only "full" asks for the norm of all leaves."""
    params = {name: jnp.ones((2, 2)) for name in ("v", "w")}
    grads = {"v": jnp.full((2, 2), jnp.nan), "w": jnp.full((2, 2), 0.5)}
    tx = lwsam.layerwise_sam(k=1, rho=0.3, alpha=0.7, normalize=normalize)
    updates, state = tx.update(
        grads, tx.init(params), params, grad_fn=lambda p: p, selection=("w",)
    )
    assert np.isfinite(updates["v"]).all()
    if normalize != "full":
        assert np.isfinite(updates["w"]).all()
    assert np.isfinite(state.norms).all()


def test_a_masked_layer_with_a_bad_gradient_leaves_no_trace():
    """`0 * nan` is how it would: the cover holds v, the mask does not."""
    params = {name: jnp.ones((2, 2)) for name in ("v", "w")}
    grads = {"v": jnp.full((2, 2), jnp.nan), "w": jnp.full((2, 2), 0.5)}
    for normalize in ("none", "selected"):
        tx = lwsam.layerwise_sam(k=1, rho=0.3, alpha=0.7, normalize=normalize)
        state = tx.init(params)
        assert lwsam.selection(state) == ("w",)
        for selection in (None, lwsam.Cover(("v", "w"))):
            updates, after = tx.update(
                grads, state, params, grad_fn=lambda p: p, selection=selection
            )
            chex.assert_tree_all_finite((updates, after.norms))


def test_a_nan_that_comes_in_does_not_reach_the_selection():
    params = {name: jnp.ones((2, 2)) for name in ("u", "v", "w")}
    grads = {**params, "v": jnp.full((2, 2), jnp.nan)}
    tx = lwsam.layerwise_sam(k=2, rho=0.3, alpha=0.7)
    _, state = tx.update(grads, tx.init(params), params, selection=())
    assert lwsam.selection(state) == ("u", "w")
    # The next step takes it in as nothing, and after that it is as if it never was.
    _, state = tx.update(params, state, params, selection=())
    assert lwsam.selection(state) == ("v", "w")


def test_complex_weights_are_perturbed_uphill():
    """JAX's gradient by a complex number is the conjugate of the ascent direction."""
    w = jnp.asarray([[1.0 + 2.0j, -0.5j], [0.3 + 0.1j, 2.0 + 0j]], jnp.complex64)
    loss = lambda p: jnp.sum(jnp.abs(p["w"] @ jnp.array([1.0, 2.0j])) ** 2)
    out = lwsam.value_and_grad(loss, ("w",), rho=0.05, alpha=1.0)({"w": w})
    g = jax.grad(loss)({"w": w})["w"]
    moved = loss({"w": w + 0.05 * jnp.conj(g)})
    np.testing.assert_allclose(out.perturbed_value, moved, rtol=1e-6)
    assert float(out.perturbed_value) > float(out.value)
    np.testing.assert_allclose(out.norms[0], jnp.linalg.norm(out.grads["w"]), rtol=1e-6)


@pytest.mark.parametrize("normalize", ["none", "selected", "full"])
@pytest.mark.parametrize("form", ["value_fn", "grad_fn"])
def test_no_promotion_happens_by_accident(form, normalize):
    """Under strict rules a mix of dtypes, or of ranks, is an error."""
    params = {
        "bias": jnp.ones(3),
        "v": jnp.ones((3, 3)),
        "w": jnp.ones((3, 3), jnp.bfloat16),
    }
    loss = lambda p: sum(jnp.sum(x.astype(jnp.float32)) for x in p.values())
    tx = lwsam.layerwise_sam(
        k=1, rho=optax.linear_schedule(0.1, 0.2, 9), alpha=0.7, normalize=normalize
    )
    extra = {form: loss if form == "value_fn" else jax.grad(loss)}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for selection in (None, (), ("v", "w"), lwsam.Cover(("v", "w"))):
            jax.eval_shape(
                lambda p, on=selection: tx.update(
                    p, tx.init(p), p, selection=on, **extra
                ),
                params,
            )


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (2, 1, 3)])
def test_odd_shapes_work(shape):
    params = {"v": jnp.ones((2, 2)), "w": jnp.ones(shape)}
    loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["v"] ** 2)
    for selection in (("w",), ("v", "w")):
        fn = lwsam.value_and_grad(
            loss, selection, rho=0.1, alpha=0.8, normalize="selected"
        )
        out = fn(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(out.grads, params)
        chex.assert_tree_all_finite(out)


def test_none_in_the_tree_is_no_leaf():
    params = {"v": None, "w": jnp.ones((2, 2))}
    tx = lwsam.layerwise_sam(k=1, rho=0.1, alpha=0.8)
    state = tx.init(params)
    updates, _ = tx.update(
        params, state, params, value_fn=lambda p: jnp.sum(p["w"] ** 2)
    )
    assert updates["v"] is None


def test_a_bare_array_is_a_tree_of_one_layer():
    w = jnp.ones((2, 2))
    layers = lwsam.Layers.of(w)
    out = lwsam.value_and_grad(
        lambda w: jnp.sum(w**2), layers.names, rho=0.1, alpha=1.0
    )(w)
    np.testing.assert_allclose(out.grads, 2 * 1.2 * np.ones((2, 2)), rtol=1e-6)


LOW_METHODS = {
    "layerwise": lambda: lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8),
    "sam": lambda: lwsam.sam(0.1),
    "asam": lambda: lwsam.asam(0.1),
    "gsam": lambda: lwsam.gsam(0.1, 0.4),
    "looksam": lambda: lwsam.looksam(0.1),
    "friendly_sam": lambda: lwsam.friendly_sam(0.1),
    "momentum": lambda: lwsam.Method(
        lwsam.everything(), rho=0.1, ascent=lwsam.momentum(), shape=lwsam.relative()
    ),
    "previous": lambda: lwsam.Method(
        lwsam.everything(), rho=0.1, ascent=lwsam.previous()
    ),
    "chain": lambda: lwsam.Method(
        lwsam.everything(),
        rho=0.1,
        shape=optax.chain(optax.ema(0.9), lwsam.normalized()),
    ),
}


@pytest.mark.parametrize("name", LOW_METHODS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_state_keeps_its_dtypes_in_every_step(name, dtype):
    """Or a scan could not carry it, and a loop would compile twice."""
    params = {"v": jnp.ones((4, 3), dtype), "w": jnp.ones((3, 2), dtype)}
    loss = lambda p: jnp.sum((p["v"] @ p["w"]).astype(jnp.float32) ** 2)
    tx = lwsam.as_optax(LOW_METHODS[name]())
    state = tx.init(params)
    updates, after = jax.eval_shape(
        lambda p, s: tx.update(p, s, p, value_fn=loss), params, state
    )
    chex.assert_trees_all_equal_shapes_and_dtypes((updates, after), (params, state))


def test_a_train_step_keeps_low_parameters_low_in_a_scan():
    """And what a shape remembers wide; the norms too."""
    params = {"v": jnp.ones((4, 3), jnp.bfloat16), "w": jnp.ones((3, 2), jnp.float16)}

    def loss(p, model_state, batch, key):
        del key
        out = (batch @ p["v"].astype(jnp.float32)) @ p["w"].astype(jnp.float32)
        return jnp.mean((out - 1.0) ** 2), (model_state, {})

    step = lwsam.TrainStep(
        loss,
        optax.sgd(0.01, momentum=0.9),
        lwsam.friendly_sam(0.1),
        on_nonfinite="skip",
        loss_scale=2.0**8,
        donate=False,
    )
    batches = jnp.asarray(normal(3, (3, 8, 4)), jnp.float32)
    state = step.init(params, {}, batches[0], key=jax.random.key(0))
    after, infos = step.scan(state, batches)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert infos.finite.all()
    remembered = jax.tree.leaves(state.method_state.memory.shape)
    assert {x.dtype for x in remembered if x.ndim} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(infos.perturbation_norm, 0.1, rtol=0.05)  # rounded
