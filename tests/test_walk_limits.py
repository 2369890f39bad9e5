"""Without a perturbation, and with an alpha of one: the limits of every part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import family_reference as family
import lwsam_jax as lwsam
import reference
import walk_combinations as combinations
import walk_reference as walk
from plain import enable_x64
from walk_combinations import Parts
from walk_parts import (
    base_optimizer,
    BATCHES,
    differs,
    from_tree,
    mean_loss,
    method_of,
    name_of,
    to_tree,
    trained,
)
from walk_reference import MOMENTUM, RATE, SIZE


# Each ascent with the default shape, and each shape with the default ascent.
STAR = [Parts(ascent=name) for name in combinations.PARTS["ascent"]]
STAR += [Parts(shape=name) for name in combinations.PARTS["shape"][1:]]
PASSES = [parts for parts in STAR if not parts.is_stale]
LIMITS = {"no radius": {"rho": 0.0}, "nothing": {"select": lwsam.nothing()}}


def assert_same(one, other, rtol=0.0):
    """Bit for bit, or almost."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol, rtol)


@functools.cache
def path_of_the_base():
    """The base optimizer in a loop of its own."""
    with enable_x64(True):
        params = to_tree(reference.mlp_params())
        tx = base_optimizer()

        @jax.jit
        def update(params, opt_state, batch):
            updates, opt_state = tx.update(
                jax.grad(mean_loss)(params, batch), opt_state, params
            )
            return optax.apply_updates(params, updates), opt_state

        opt_state, path = tx.init(params), []
        for batch in BATCHES:
            params, opt_state = update(params, opt_state, batch)
            path.append(jax.device_get(params))
    return path


def path_of(method, **options):
    with enable_x64(True):
        return [params for params, *_ in trained(method, **options)[1]]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("parts", STAR, ids=name_of)
def test_a_step_without_a_perturbation_is_the_base_optimizer_bit_for_bit(parts, limit):
    assert_same(path_of(method_of(parts, **LIMITS[limit])), path_of_the_base())


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("shape", combinations.PARTS["shape"])
@pytest.mark.parametrize("ascent", combinations.PARTS["ascent"])
def test_and_the_transformation_hands_gradients_through(ascent, shape, limit):
    method = method_of(Parts(ascent=ascent, shape=shape), **LIMITS[limit])
    tx = lwsam.as_optax(method)
    params = {"w": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    grads = jax.tree.map(lambda x: 2 * x, params)
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=lambda p: 0.0)
    assert_same(updates, grads)
    assert lwsam.selection(state) == () or limit == "no radius"


@pytest.mark.parametrize("parts", STAR, ids=name_of)
def test_a_radius_that_is_set_to_zero_is_the_base_optimizer(parts):
    """It is data, so the step is the same one; w + 0 eps is w."""
    path = path_of(method_of(parts, rho=lambda step: 0.0 * step))
    assert_same(path, path_of_the_base(), 1e-12)


@pytest.mark.parametrize("parts", PASSES, ids=name_of)
def test_with_an_alpha_of_one_all_is_descent(parts):
    """As a number it is `descend` itself, and as a schedule it has its gradients."""
    assert lwsam.mix(1) is lwsam.mix(1.0) is lwsam.descend()
    mixed = method_of(parts, combine=lwsam.mix(lambda step: 1.0 + 0.0 * step))
    assert_same(path_of(mixed), path_of(method_of(parts)), 1e-12)


SAMS = {
    "sam": lambda: lwsam.sam(0.4),
    "generalized": lambda: lwsam.generalized_sam(0.4, 1.0),
    "layer-wise": lambda: lwsam.LayerwiseSAM(
        6, rho=0.4, alpha=1.0, normalize="selected", rule=lwsam.leaves
    ),
    "over all": lambda: lwsam.sam(0.4, shape=lwsam.normalized("all")),
    "by name": lambda: lwsam.sam(0.4, select=lwsam.named(".")),
    "all of the batch": lambda: lwsam.sam(0.4, ascent=lwsam.micro_batch(size=SIZE)),
    "no gap": lambda: lwsam.gsam(0.4, 0.0),
    "no weight": lambda: lwsam.sam(0.4, combine=lwsam.reuse(0.0)),
}


@pytest.mark.parametrize("name", SAMS)
def test_everything_with_an_alpha_of_one_is_sam(name):
    steps = family.trajectory(
        family.sam(walk.GRADIENT, rho=0.4),
        reference.mlp_params(),
        BATCHES,
        learning_rate=RATE,
        momentum=MOMENTUM,
    )
    for params, taken in zip(path_of(SAMS[name]()), steps, strict=True):
        assert not differs(from_tree(params), taken.params, 1e-12)


def test_the_whole_of_a_batch_is_the_whole_batch():
    assert lwsam.micro_batch(1.0) is lwsam.micro_batch(1) is lwsam.whole_batch()
