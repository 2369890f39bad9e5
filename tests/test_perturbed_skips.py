"""Steps that a loop around `perturbed` skips, in every precision."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from chains import LOSS, PARAMS


GOOD, BAD = 1.0, (jnp.nan, jnp.inf)
SCALES = (GOOD, *BAD, GOOD, BAD[0], GOOD, GOOD)  # of the loss, in each step


def sgd():
    return optax.sgd(0.1, momentum=0.9)


PARTS = {
    "momentum": functools.partial(lwsam.perturbed, rho=0.1),
    "momentum_sam": functools.partial(lwsam.momentum_sam, rho=0.3),
    "previous": functools.partial(
        lwsam.perturbed, rho=0.1, ascent=lwsam.previous(), k=2
    ),
    "random": functools.partial(lwsam.perturbed, rho=0.1, ascent=lwsam.random()),
    # Of one's own, with a state: the unperturbed parameters are all kept.
    "chain": functools.partial(
        lwsam.perturbed,
        rho=0.3,
        shape=optax.chain(optax.ema(0.5, debias=False), lwsam.normalized()),
    ),
}
DTYPES = {
    "float32": (jnp.float32,) * 3,
    "bfloat16": (jnp.bfloat16,) * 3,
    "mixed": (jnp.bfloat16, jnp.float32, jnp.float16),
}


def start(precision):
    return {
        name: jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), PARAMS[name])
        for name, dtype in zip(PARAMS, DTYPES[precision], strict=True)
    }


def by_apply_if_finite(tx):
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=5)

    def step(carry, grads):
        params, state = carry
        updates, state = guarded.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return guarded.init, step


def by_the_loop(tx):
    """As the loops of Flax do it: the old ones are taken where a gradient is none."""

    def step(carry, grads):
        params, state = carry
        updates, new_state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates), new_state
        finite = jnp.isfinite(optax.tree.norm(grads))
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, carry)

    return tx.init, step


def by_multi_steps(tx):
    """One micro-batch a step, and those that are not finite left out."""
    steps = optax.MultiSteps(tx, 1, should_skip_update_fn=optax.skip_not_finite)

    def step(carry, grads):
        params, state = carry
        updates, state = steps.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return steps.init, step


GUARDS = {f.__name__: f for f in (by_apply_if_finite, by_the_loop, by_multi_steps)}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    ("guard", "parts"),
    [
        *[("by_apply_if_finite", name) for name in PARTS],
        ("by_the_loop", "momentum"),
        ("by_the_loop", "chain"),
        ("by_multi_steps", "momentum_sam"),
    ],
)
def test_a_skipped_step_is_as_if_it_never_was(guard, parts, precision):
    """Bit for bit, in what the loop holds and in the unperturbed parameters."""
    init, step = GUARDS[guard](PARTS[parts](sgd()))
    params = start(precision)

    @jax.jit
    def advance(carry, scale):
        grads = jax.grad(lambda p: scale * LOSS(p))(carry[0])
        new = step(carry, grads)
        return new, lwsam.eval_params(new[1], new[0])

    def run(scales):
        carry, points = (params, init(params)), []
        for scale in scales:
            carry, own = advance(carry, scale)
            points.append((carry[0], own))
        return points

    found = run(SCALES)
    for scale, before, after in zip(SCALES[1:], found[:-1], found[1:], strict=True):
        if not np.isfinite(scale):
            chex.assert_trees_all_equal(after, before)
    expected = run([scale for scale in SCALES if np.isfinite(scale)])
    good = [x for x, scale in zip(found, SCALES, strict=True) if np.isfinite(scale)]
    chex.assert_trees_all_equal(good, expected)
    held, own = good[-1]
    chex.assert_trees_all_equal_shapes_and_dtypes((held, own), (params, params))
    assert any(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(own), strict=True)
    )


@pytest.mark.parametrize("precision", ["bfloat16", "mixed"])
def test_updates_have_the_dtype_of_the_base_optimizers(precision):
    """So `lax.cond` and wrappers take them; float32 parameters get no less."""
    params = start(precision)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = lwsam.perturbed(sgd(), 0.1)
    for grads in (params, low):
        updates, _ = jax.eval_shape(tx.update, grads, tx.init(params), params)
        for u, w in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert u.dtype == jnp.promote_types(u.dtype, w.dtype)
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("parts", ["momentum", "chain"])
def test_without_a_guard_a_nan_stays_as_with_any_optimizer(parts):
    """Nothing hides it: both points have it from then on."""
    tx = PARTS[parts](sgd())
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), PARAMS)
    updates, state = tx.update(bad, state, PARAMS)
    held = optax.apply_updates(PARAMS, updates)
    own = lwsam.eval_params(state, held)
    for x in (*jax.tree.leaves(held), *jax.tree.leaves(own)):
        assert np.all(np.isnan(x))


def test_float16_with_the_dynamic_scale_of_flax():
    """The loop has one pass, so its scaler sees all there is; the gradients are small."""
    dynamic_scale = pytest.importorskip("flax.training.dynamic_scale")
    params = start("float32")
    tx = lwsam.perturbed(sgd(), 0.1)

    def loss(params):
        half = jax.tree.map(lambda x: x.astype(jnp.float16), params)
        return LOSS(half).astype(jnp.float32)

    @jax.jit
    def step(params, state, scale):
        scale, finite, _, grads = scale.value_and_grad(loss)(params)
        updates, new_state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        keep = lambda a, b: jnp.where(finite, a, b)
        params, state = jax.tree.map(keep, (new, new_state), (params, state))
        return params, state, scale, finite

    state = tx.init(params)
    scale = dynamic_scale.DynamicScale(scale=jnp.float32(2.0**20))
    skipped = 0
    for _ in range(12):
        before = params, lwsam.eval_params(state, params)
        params, state, scale, finite = step(params, state, scale)
        own = lwsam.eval_params(state, params)
        if not finite:
            skipped += 1
            chex.assert_trees_all_equal((params, own), before)
    assert 0 < skipped < 12
    assert float(scale.scale) == 2.0 ** (20 - skipped)
    chex.assert_tree_all_finite((params, own))
