"""What is special to one preset, and what presets refuse."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import family_reference as family
import lwsam_jax as lwsam
import reference
from family_runs import (
    ALL,
    assert_follows,
    base_optimizer,
    flat_norm,
    follow,
    GRADIENT,
    leaves_of,
    loss_fn,
    MODULES,
    MOMENTUM,
    problem,
    pulled,
    pulling_batches,
    RATE,
    SIZE,
    STEPS,
    train,
)
from preset_task import HYPER, method, rule_of, trained, unscaled


# --- the perturbations, seen on a quadratic -------------------------------------------


def radius(step):
    return 0.1 * (step + 1)


@pytest.mark.parametrize("name", HYPER)
def test_zero_gradients_and_the_norms_of_the_perturbations(name):
    """With a scheduled radius, which every preset takes.

    On a quadratic whose Hessian is the identity eps, g and ghat are parallel: g_perp is
    zero, and so is the g_v of step 0.
    """
    records = pulled(method(name, rho=radius), pulling_batches(4))
    _, g, epsilon, _ = records[0]
    assert flat_norm(g) == 0
    assert flat_norm(epsilon) == 0
    for number, (w, _, epsilon, names) in enumerate(records[1:], start=1):
        rho, norm = radius(number), flat_norm(epsilon)
        if name == "asam":
            norm = unscaled(w, epsilon, HYPER["asam"]["eta"])
        elif name == "generalized_sam":
            rho *= HYPER[name]["alpha"]
        elif name == "looksam":
            rho *= number % HYPER[name]["period"] == 0
        elif name == "esam":
            rho *= bool(names) / HYPER[name]["keep"]
        elif name == "sam_on":
            assert not np.any(epsilon["w"].round(12))
        np.testing.assert_allclose(norm, rho, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", HYPER)
def test_a_radius_that_a_schedule_makes_zero_is_the_base_optimizer(name):
    """ESAM on all examples: where no loss rises, which half is taken is arbitrary."""
    changes = {"samples": 1.0} if name == "esam" else {}
    ours = method(name, rho=lambda step: 0.0 * step, **changes)
    for _, g, epsilon, _ in pulled(ours, pulling_batches(5)):
        assert flat_norm(epsilon) <= 1e-6 * flat_norm(g)


def test_the_average_of_friendly_sam_is_over_raw_gradients():
    """Not over the residuals g - sigma m, as a widely used port has it."""
    sigma, decay = 0.9, 0.6
    ours = lwsam.friendly_sam(rho=0.3, sigma=sigma, decay=decay)
    m = wrong = None
    distances = []
    for _, g, epsilon, _ in pulled(ours, pulling_batches(6)[1:]):
        g, epsilon = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
            for tree in (g, epsilon)
        )
        q, fed_back = (g, g) if m is None else (g - sigma * m, g - sigma * wrong)
        np.testing.assert_allclose(epsilon, 0.3 * q / np.linalg.norm(q), atol=1e-10)
        distances.append(np.linalg.norm(epsilon - 0.3 * fed_back / np.linalg.norm(q)))
        m = g if m is None else decay * m + (1 - decay) * g
        wrong = g if wrong is None else decay * wrong + (1 - decay) * fed_back
    assert min(distances[2:]) > 1e-2


# --- what is special to one preset ----------------------------------------------------


def test_looksam_keeps_what_is_orthogonal_to_the_ascent_gradient():
    """In the steps between two ascents d - g is along g_v, as long as weight |g|."""
    params = [reference.mlp_params(), *trained("looksam").params]
    batches = reference.mlp_batches(STEPS, SIZE)
    v = [family.scaled(0.0, params[0])]
    v += [
        family.scaled(1 / RATE, family.added(before, -1.0, after))
        for before, after in itertools.pairwise(params)
    ]
    directions = []
    for number in (1, 2):
        d = family.added(v[number + 1], -MOMENTUM, v[number])
        g = GRADIENT(params[number], batches[number])
        added = family.added(d, -1.0, g)
        size = reference.norm_of(g.values())
        np.testing.assert_allclose(
            reference.norm_of(added.values()), 0.7 * size, rtol=1e-8
        )
        directions.append(family.to_norm(1.0, added))
    first = family.to_norm(1.0, GRADIENT(params[0], batches[0]))
    for direction in directions:
        assert abs(family.inner(direction, first)) < 1e-8
    np.testing.assert_allclose(family.inner(*directions), 1.0)


def test_looksam_takes_no_direction_from_rounding():
    """Where ghat is g, as in a warm-up with rho = 0, g_v is zero but for rounding."""
    part = lwsam.reuse(0.7)

    def next_step(g):
        zero = (jnp.zeros_like(g),)
        _, stored = part.update((g,), (g,), zero, None)
        (d,) = part.otherwise((g,), stored)
        return d

    g = jnp.asarray(np.random.default_rng(0).normal(size=(200, 9)), jnp.float32)
    np.testing.assert_allclose(jax.vmap(next_step)(g), g, rtol=1e-5)


def test_looksam_ascends_in_every_period_alone():
    whole = [len(names) for names in trained("looksam").kept]
    assert whole == [6, 0, 0, 6, 0, 0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"select": lwsam.top_k(2)},
        {"select": lwsam.named("a_out")},
        {"max_overhead": 0.5},
        {"ascent": lwsam.momentum()},
    ],
    ids=["of some layers", "of one", "with a budget", "without an ascent"],
)
def test_where_looksam_has_nothing_to_reuse_it_is_refused(arguments):
    with pytest.raises(ValueError, match="combine"):
        method("looksam", **arguments)


@pytest.mark.parametrize("name", ["gsam", "looksam", "friendly_sam"])
def test_over_devices_the_parts_are_those_of_the_global_batch(name):
    run = train(method(name), parallel="pmap", dtype=np.float32)
    assert_follows(run.params, follow(rule_of(name)), rtol=1e-4)


def test_esam_draws_leaves_anew_in_every_step():
    kept = trained("esam").kept
    assert len(set(kept)) > 2
    assert all(0 < len(names) <= len(ALL) for names in kept)


def test_esam_keeps_each_leaf_with_its_probability():
    keys = jax.random.split(jax.random.key(0), 2000)
    norms = jnp.ones(5)
    drawn = jax.vmap(lambda key: lwsam.esam(0.1, keep=0.6).select(norms, key))(keys)
    np.testing.assert_allclose(drawn.mean(axis=0), 0.6, atol=0.04)
    pairs = np.cov(np.asarray(drawn, float).T)
    np.testing.assert_allclose(pairs - np.diag(np.diag(pairs)), 0.0, atol=0.03)


@pytest.mark.parametrize("layer", ["b", "lora_b", "offset"])
def test_asam_scales_kernels_whatever_their_layer_is_called(layer):
    params = {"first": {"kernel": jnp.full((2, 2), 3.0)}}
    params |= {layer: {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}}
    tx = lwsam.as_optax(lwsam.asam(rho=1.0, eta=0.0))
    seen = []
    grads = jax.tree.map(jnp.ones_like, params)
    tx.update(
        grads, tx.init(params), params, grad_fn=lambda p: (seen.append(p), grads)[1]
    )
    epsilon = jax.tree.map(lambda a, b: a - b, seen[0], params)
    norm = np.sqrt(8 * 3.0**2 + 2)
    np.testing.assert_allclose(epsilon["first"]["kernel"], 9.0 / norm, rtol=1e-5)
    np.testing.assert_allclose(epsilon[layer]["kernel"], 9.0 / norm, rtol=1e-5)
    np.testing.assert_allclose(epsilon[layer]["bias"], 1.0 / norm, rtol=1e-5)


def test_sam_on_perturbs_the_normalization_layers_alone():
    for names in trained("sam_on").kept:
        assert set(leaves_of(names)) == set(MODULES["m_mid"])


@pytest.mark.parametrize("found", ["LayerNorm_0", "bn1", "block/norm", "RMSNorm"])
def test_sam_on_finds_normalization_by_name(found):
    params = {"dense": {"kernel": jnp.ones((2, 2))}, found: {"scale": jnp.ones(2)}}
    state = lwsam.as_optax(lwsam.sam_on(rho=0.1)).init(params)
    (name,) = lwsam.selection(state)
    assert found in name


def test_sam_on_without_normalization_is_refused():
    tx = lwsam.as_optax(lwsam.sam_on(rho=0.1))
    with pytest.raises(ValueError, match="dense"):
        tx.init({"dense": {"kernel": jnp.ones((2, 2))}})


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sam", {"rho": -0.1}),
        ("generalized_sam", {"alpha": -0.1}),
        ("asam", {"eta": -0.1}),
        ("gsam", {"alpha": -0.1}),
        ("looksam", {"period": 0}),
        ("looksam", {"weight": -0.1}),
        ("looksam", {"weight": float("nan")}),
        ("friendly_sam", {"sigma": -0.1}),
        ("friendly_sam", {"decay": 1.5}),
        ("esam", {"keep": 0.0}),
        ("esam", {"keep": 1.1}),
        ("esam", {"samples": 0.0}),
        ("esam", {"samples": 1.1}),
    ],
)
def test_numbers_out_of_range_are_refused(name, changes):
    (argument,) = changes
    named = {"samples": "fraction", "period": "n"}.get(argument, argument)
    with pytest.raises(ValueError, match=f"`{named}`"):
        method(name, **changes)


@pytest.mark.parametrize("name", ["looksam", "friendly_sam"])
def test_the_functional_form_refuses_parts_that_keep_state(name):
    loss = lambda p: jnp.sum(p["w"])
    grad_fn = lwsam.value_and_grad(loss, ("w",), method=method(name))
    with pytest.raises(ValueError, match="keep no state"):
        grad_fn({"w": jnp.ones(2)})


def test_the_transformation_refuses_to_choose_among_the_examples():
    with pytest.raises(ValueError, match="TrainStep"):
        lwsam.as_optax(method("esam"))


def test_esam_without_the_losses_of_the_examples_is_refused():
    def without(params, model_state, batch, key):
        loss, (model_state, _) = loss_fn(params, model_state, batch, key)
        return loss, (model_state, {})

    params, batches = problem(np.float32)
    step = lwsam.TrainStep(without, base_optimizer(), method("esam"))
    with pytest.raises(ValueError, match="losses"):
        step(step.init(params, {}, batches[0], key=jax.random.key(0)), batches[0])
