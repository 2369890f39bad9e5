"""Gradients that are zero, tiny, huge or no numbers at all."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lwsam_jax as lwsam
from hostile import examples, NUMBERS


PARAMS = {"a": jnp.ones((2, 2)), "b": 0.5 * jnp.ones(2), "c": jnp.ones((1, 2))}
LAYERS = lwsam.Layers.of(PARAMS, lwsam.leaves)
LARGEST = 1e18  # whose square float32 holds
GRADS = st.fixed_dictionaries(
    {
        name: st.lists(NUMBERS, min_size=x.size, max_size=x.size).map(
            lambda values, shape=x.shape: np.asarray(values, np.float32).reshape(shape)
        )
        for name, x in PARAMS.items()
    }
)
SHAPES = {
    "raw": lwsam.raw(),
    "selected": lwsam.normalized(),
    "all": lwsam.normalized("all"),
    "relative": lwsam.relative(),
    "filter": lwsam.relative("filter"),
    "adaptive": lwsam.adaptive(),
}
STALE = {
    "momentum": lwsam.momentum(),
    "previous": lwsam.previous(),
    "random": lwsam.random(),
}
RHO = 0.5


def is_finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def largest(tree):
    """The largest size of an element; NaN if one of them is."""
    return np.max([np.max(np.abs(x)) for x in tree.values()])


@functools.cache
def moves(shape):
    """The gradient of a linear loss whose slope is the argument, and its parameters."""
    method = lwsam.Method(
        lwsam.everything(), rho=RHO, shape=SHAPES[shape], rule=lwsam.leaves
    )

    def loss(params, slope):
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(slope), strict=True)
        return sum(jnp.sum(w * g) for w, g in pairs), params

    grad = lwsam.value_and_grad(
        loss, LAYERS.names, method=method, has_aux=True, aux_from="perturbed"
    )
    return jax.jit(grad)


@examples
@hypothesis.given(GRADS, st.sampled_from(sorted(SHAPES)))
def test_of_a_finite_gradient_nothing_is_made_that_is_not_finite(slope, shape):
    out = moves(shape)(PARAMS, slope)
    np.testing.assert_array_equal(
        jax.tree.leaves(out.grads)[0], slope["a"], err_msg="the slope is the gradient"
    )
    if not largest(slope) < LARGEST:
        return
    assert is_finite(out.aux), "the perturbed parameters"
    assert is_finite(out.norms)
    moved = jax.tree.map(lambda new, old: np.asarray(new - old), out.aux, PARAMS)
    length = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in moved.values()))
    if shape in ("selected", "all"):
        assert length <= RHO * (1 + 1e-5)
    if shape == "relative":
        for name, x in moved.items():
            most = RHO * np.linalg.norm(PARAMS[name])
            assert np.linalg.norm(x) <= most * (1 + 1e-5)
    for name, x in moved.items():
        # Nothing moves where the gradient is zero, and nothing moves downhill.
        assert not np.any(x[slope[name] == 0])
        assert np.all(x * np.sign(slope[name]) >= 0)


SELECTORS = (lwsam.top_k, lwsam.bottom_k, lwsam.random_k)


@jax.jit
def chosen(slope, k):
    """The norms, and the mask of each selector; k is data, so that one compiles."""
    norms = LAYERS.norms(slope)
    return norms, [select(k)(norms, jax.random.key(0)) for select in SELECTORS]


@examples
@hypothesis.given(GRADS, st.integers(0, 3))
def test_a_norm_that_is_not_finite_is_never_selected(slope, k):
    norms, masks = jax.device_get(chosen(slope, k))
    wide = [np.linalg.norm(np.float64(slope[name])) for name in LAYERS.names]
    for norm, expected in zip(norms, wide, strict=True):
        if not np.isfinite(expected):
            assert not np.isfinite(norm)
        elif 1e-15 < expected < LARGEST:
            np.testing.assert_allclose(norm, expected, rtol=1e-5)
    finite = np.isfinite(norms)
    for mask in masks:
        assert not np.any(mask & ~finite)
        assert np.sum(mask) == min(k, np.sum(finite))
    mask = masks[0]
    if mask.any() and (finite & ~mask).any():
        assert norms[mask].min() >= norms[finite & ~mask].max()


@functools.cache
def held(ascent, shape):
    tx = lwsam.perturbed(
        optax.sgd(0.0, momentum=0.9),
        rho=RHO,
        ascent=STALE[ascent],
        shape=SHAPES[shape],
        rule=lwsam.leaves,
    )

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, lwsam.eval_params(state, params)

    return tx, step


@examples
@hypothesis.given(
    GRADS, st.sampled_from(sorted(STALE)), st.sampled_from(["relative", "selected"])
)
def test_whatever_the_gradients_the_held_parameters_come_back(slope, ascent, shape):
    """A learning rate of 0: after each step the unperturbed parameters are the first."""
    hypothesis.assume(largest(slope) < LARGEST)
    tx, step = held(ascent, shape)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state, found = step(slope, state, params)
        assert is_finite(params)
        for x, w in zip(jax.tree.leaves(found), jax.tree.leaves(PARAMS), strict=True):
            np.testing.assert_allclose(x, w, rtol=1e-5, atol=1e-6)


@functools.cache
def train_step():
    def loss(params, model_state, batch, key):
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(batch), strict=True)
        return sum(jnp.sum(w * g[0]) for w, g in pairs), (model_state, {})

    method = lwsam.Method(lwsam.top_k(1), rho=RHO, rule=lwsam.leaves)
    step = lwsam.TrainStep(loss, optax.sgd(0.1), method, donate=False)
    batch = {name: x[None] for name, x in PARAMS.items()}
    return step, step.init(PARAMS, {}, batch, key=jax.random.key(0))


@examples
@hypothesis.given(GRADS)
def test_a_step_says_whether_its_numbers_are_finite(slope):
    batch = {name: x[None] for name, x in slope.items()}
    step, state = train_step()
    for _ in range(2):
        state, info = step(state, batch)
        mask = np.asarray(info.mask)
        assert int(state.step) > 0
        assert np.isfinite(
            np.asarray(info.norms)[np.asarray(state.method_state.mask)]
        ).all()
        if bool(info.finite):
            assert is_finite((info.value, info.perturbed_value, state.params))
    if largest(slope) < LARGEST:
        assert bool(info.finite)
        assert mask.sum() == 1
