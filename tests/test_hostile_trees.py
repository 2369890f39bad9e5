"""Parameter trees of any kind: right, or refused in our own words."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from hostile import (
    compiled_examples,
    examples,
    float_trees,
    floats,
    only_our_errors,
    trees,
    trees_with_a_weight,
)


RULES = st.sampled_from(
    [None, lwsam.weights, lwsam.modules, lwsam.leaves, lwsam.blocks("a|w|0")]
)
ANY_TREE = st.one_of(trees(), trees_with_a_weight(), float_trees())


def loss(params):
    """Half the square of every element that is a number; its gradient is the tree."""
    total = jnp.zeros(())
    for leaf in jax.tree.leaves(params):
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):
            total = total + 0.5 * jnp.sum(jnp.abs(leaf).astype(jnp.float32) ** 2)
    return total


def shapes(tree):
    return [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]


@examples
@hypothesis.given(ANY_TREE, RULES)
def test_layers_have_names_of_their_own_and_a_depth_each(params, rule):
    with only_our_errors():
        layers = lwsam.Layers.of(params, rule)
        assert len(set(layers.names)) == len(layers.names) == len(layers)
        assert sorted(layers.depth) == list(range(len(layers)))
        assert set(layers.leaf_layer) - {-1} == set(range(len(layers)))
        assert hash(layers) == hash(lwsam.Layers.of(params, rule))
        norms = layers.norms(params)
        for i, norm in enumerate(norms):
            members = [
                np.asarray(x).astype(np.complex128)
                for x, at in zip(
                    jax.tree.leaves(params), layers.leaf_layer, strict=True
                )
                if at == i
            ]
            expected = np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in members))
            np.testing.assert_allclose(float(norm), expected, rtol=1e-5)


@compiled_examples
@hypothesis.given(ANY_TREE, RULES, st.data())
def test_gradients_are_as_their_parameters_and_at_radius_0_are_plain(
    params, rule, data
):
    with only_our_errors():
        layers = lwsam.Layers.of(params, rule)
        names = st.lists(st.sampled_from(layers.names), unique=True)
        chosen = tuple(data.draw(names))
        for rho in (0.0, 0.1):
            grad = lwsam.value_and_grad(loss, chosen, rho=rho, alpha=0.5, rule=rule)
            out = grad(params)
            assert jax.tree.structure(out.grads) == jax.tree.structure(params)
            assert shapes(out.grads) == shapes(params)
            # The gradient of the loss is w itself (its conjugate), so that of the
            # perturbed layers is (1 + rho / 2) times as long.
            for x, w, at in zip(
                jax.tree.leaves(out.grads),
                jax.tree.leaves(params),
                layers.leaf_layer,
                strict=True,
            ):
                moved = at >= 0 and layers.names[at] in chosen
                size = 1 + 0.5 * rho if moved else 1.0
                coarse = jnp.finfo(w.dtype).bits < 32
                np.testing.assert_allclose(
                    np.asarray(x).astype(np.complex128),
                    size * np.conj(np.asarray(w).astype(np.complex128)),
                    rtol=2e-2 if coarse else 1e-5,
                )


def gradient(params):
    """That of the loss, for any tree; zero where there is none."""
    is_inexact = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return jax.tree.map(
        lambda x: jnp.conj(x) if is_inexact(x) else jnp.zeros_like(x), params
    )


def trained(params, optimizer, steps=2):
    """What the plain optimizer makes of the parameters; None if it cannot take them."""
    try:
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
        jax.tree.map(np.asarray, params)
    except (TypeError, ValueError, AttributeError, UserWarning):
        return None
    return params


@compiled_examples
@hypothesis.given(ANY_TREE, RULES)
def test_the_transformation_updates_what_it_was_made_for(params, rule):
    base = optax.sgd(0.1)
    hypothesis.assume(trained(params, base) is not None)
    with only_our_errors():
        method = lwsam.Method(lwsam.top_k(1), rho=0.1, rule=rule)
        tx = optax.chain(lwsam.as_optax(method), base)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(
                gradient(params), state, params, grad_fn=gradient
            )
            assert jax.tree.structure(updates) == jax.tree.structure(params)
            assert shapes(optax.apply_updates(params, updates)) == shapes(params)
        assert len(lwsam.selection(state)) == 1


@compiled_examples
@hypothesis.given(
    ANY_TREE,
    st.sampled_from([lwsam.momentum(), lwsam.previous(), lwsam.random()]),
    st.sampled_from(
        [lwsam.relative(), lwsam.normalized(), lwsam.raw(), lwsam.adaptive()]
    ),
)
def test_perturbed_parameters_can_be_unperturbed(params, ascent, shape):
    base = optax.sgd(0.1, momentum=0.9)
    hypothesis.assume(trained(params, base) is not None)
    with only_our_errors():
        tx = lwsam.perturbed(base, rho=0.1, ascent=ascent, shape=shape)
        state = tx.init(params)
        held, own, plain = params, params, base.init(params)
        for _ in range(2):
            grads = gradient(held)
            updates, state = tx.update(grads, state, held)
            held = optax.apply_updates(held, updates)
            assert shapes(held) == shapes(params)
            updates, plain = base.update(grads, plain, own)
            own = optax.apply_updates(own, updates)
        found = lwsam.eval_params(state, held)
        assert shapes(found) == shapes(params)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        for x, w in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(
                np.asarray(x).astype(np.complex128),
                np.asarray(w).astype(np.complex128),
                rtol=1e-4,
                atol=1e-5,
            )


@compiled_examples
@hypothesis.given(ANY_TREE, RULES)
def test_a_train_step_starts_or_says_why_not(params, rule):
    def step_loss(params, model_state, batch, key):
        return loss(params) * jnp.mean(batch), (model_state, {})

    with only_our_errors():
        method = lwsam.Method(lwsam.top_k(1), rho=0.1, rule=rule)
        step = lwsam.TrainStep(step_loss, optax.sgd(0.1), method)
        state = step.init(params, {}, jnp.ones((2,)), key=jax.random.key(0))
        assert jax.tree.structure(state.params) == jax.tree.structure(params)
        assert shapes(state.params) == shapes(params)


@compiled_examples
@hypothesis.given(
    st.dictionaries(st.sampled_from(["a", "b"]), floats(), min_size=1),
    trees(),
)
def test_any_model_state_is_carried_or_refused(params, model_state):
    def step_loss(params, model_state, batch, key):
        return loss(params) * jnp.mean(batch), (model_state, {})

    with only_our_errors():
        method = lwsam.Method(lwsam.everything(), rho=0.1, rule=lwsam.leaves)
        step = lwsam.TrainStep(step_loss, optax.sgd(0.1), method)
        batch = jnp.ones((2,))
        state = step.init(params, model_state, batch, key=jax.random.key(0))
        assert jax.tree.structure(state.model_state) == jax.tree.structure(model_state)


# What was found so, each by itself.


def test_keys_that_cannot_be_sorted_are_refused_in_our_words():
    params = {"a": jnp.ones((2, 2)), 0: jnp.ones((2, 2))}
    message = "expected `params` to be a tree whose dictionaries can be sorted"
    with pytest.raises(ValueError, match=message):
        lwsam.Layers.of(params)
    with pytest.raises(ValueError, match="expected `model_state` to be a tree whose"):
        started({"a": jnp.ones((2, 2))}, params)


def test_a_dtype_among_the_parameters_is_no_array():
    """It has a dtype of its own; models keep one in a field."""
    with pytest.raises(
        TypeError, match="tree of arrays, got <class .*float32.*'dtype'"
    ):
        lwsam.Layers.of({"w": jnp.ones((2, 2)), "dtype": jnp.float32})


def test_float64_of_numpy_is_what_jax_makes_of_it():
    params = {"w": np.full((2, 2), 1e30)}
    grads = {"w": np.ones((2, 2))}
    assert np.isinf(lwsam.Layers.of(params).norms(params)[0])  # and no warning
    tx = lwsam.as_optax(lwsam.sam(0.1))
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=lambda p: grads)
    assert updates["w"].dtype == jnp.float32
    tx = lwsam.perturbed(optax.sgd(0.1, momentum=0.9), rho=0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["w"].dtype == jnp.float32


def test_a_name_may_hold_any_digit():
    names = ("w²", "w10", "w2", "w٣")
    layers = lwsam.Layers.of({name: jnp.ones((1, 1)) for name in names})
    assert set(layers.names) == set(names)


@pytest.mark.parametrize("leaf", [jax.random.key(0), 2, True, jnp.ones(2, int)])
def test_leaves_without_a_gradient_are_no_layers(leaf):
    params = {"w": jnp.ones((2, 2)), "other": leaf}
    state = lwsam.as_optax(lwsam.sam(0.1)).init(params)
    assert lwsam.selection(state) == ("w",)
    with pytest.raises(TypeError, match="of float or complex arrays, got .*'other'"):
        started(params, {})


@pytest.mark.parametrize("leaf", ["text", len, np.array(["text"]), jnp.float32])
def test_what_no_step_can_carry_is_no_model_state(leaf):
    with pytest.raises(
        TypeError, match="expected `model_state` to be a tree of arrays"
    ):
        started({"w": jnp.ones((2, 2))}, {"other": leaf})


def started(params, model_state):
    loss = lambda p, s, batch, key: (jnp.sum(p["w"]) * jnp.mean(batch), (s, {}))
    step = lwsam.TrainStep(loss, optax.sgd(0.1), lwsam.sam(0.1))
    return step.init(params, model_state, jnp.ones(2), key=jax.random.key(0))
