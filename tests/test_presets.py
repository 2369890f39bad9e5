"""The presets against float64 NumPy oracles, in both loops."""

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
    base,
    chain,
    example_losses,
    follow,
    from_tree,
    GRADIENT,
    KERNELS,
    leaves_of,
    params_of,
    problem,
    SIZE,
    STEPS,
    train,
)
from plain import enable_x64
from preset_task import HYPER, method, rule_of, trained


# Those whose parts keep no state and draw nothing.
STATELESS = ("sam", "generalized_sam", "asam", "sam_on", "gsam")


# --- the oracles ----------------------------------------------------------------------


# What a preset becomes in a limit: SAM, or at rho = 0 the base optimizer.
LIMITS = {
    "generalized_sam, alpha 1": ("generalized_sam", {"alpha": 1.0}, HYPER["sam"]),
    "generalized_sam, alpha 0": ("generalized_sam", {"alpha": 0.0}, {"rho": 0.0}),
    "gsam, alpha 0": ("gsam", {"alpha": 0.0}, HYPER["sam"]),
    "looksam, period 1": ("looksam", {"period": 1}, HYPER["sam"]),
    "friendly_sam, sigma 0": ("friendly_sam", {"sigma": 0.0}, HYPER["sam"]),
    "esam, all of it": (
        "esam",
        {"rho": 0.3, "keep": 1.0, "samples": 1.0},
        HYPER["sam"],
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_the_oracles_meet_in_their_limits(limit):
    name, changes, sam = LIMITS[limit]
    rule = rule_of(name, kept=[ALL] * STEPS, **changes)
    assert_follows(params_of(follow(rule)), follow(family.sam(GRADIENT, **sam)), 1e-12)


@pytest.mark.parametrize("name", HYPER)
def test_the_oracles_are_the_base_optimizer_without_a_radius(name):
    changes = {"alpha": 0.0} if name == "gsam" else {}
    changes |= {"samples": 1.0} if name == "esam" else {}
    steps = follow(rule_of(name, kept=[ALL] * STEPS, rho=0.0, **changes))
    if name != "looksam":  # its g_v is rounding then
        assert_follows(params_of(steps), follow(family.sam(GRADIENT, rho=0.0)), 1e-12)
    assert all(family.norm_of(step.move.epsilon.values()) == 0 for step in steps)


def test_the_oracles_perturbations_have_the_norms_of_their_papers():
    norm = lambda leaves: family.norm_of(leaves.values())
    for name in ("sam", "sam_on", "friendly_sam"):
        for step in follow(rule_of(name)):
            np.testing.assert_allclose(norm(step.move.epsilon), HYPER[name]["rho"])
    w = reference.mlp_params()
    for step in follow(rule_of("asam")):
        unscaled = {
            n: leaf / (np.abs(w[n]) + HYPER["asam"]["eta"]) if n in KERNELS else leaf
            for n, leaf in step.move.epsilon.items()
        }
        np.testing.assert_allclose(norm(unscaled), HYPER["asam"]["rho"])
        w = step.params
    kept = [ALL[number % 3 :: 2] for number in range(STEPS)]
    for step, names in zip(follow(rule_of("esam", kept)), kept, strict=True):
        np.testing.assert_allclose(norm(step.move.epsilon), 0.2 / 0.6)
        assert [n for n in ALL if np.any(step.move.epsilon[n])] == list(names)


def test_the_oracles_parts_are_orthogonal():
    for step in follow(rule_of("gsam")):
        g_perp, ghat = step.move.memory, step.move.descent
        assert abs(family.inner(g_perp, ghat)) < 1e-14
        assert family.norm_of(g_perp.values()) > 1e-3
    for step in follow(rule_of("looksam"))[::3]:
        g_v, g = step.move.memory, step.move.ascent
        assert abs(family.inner(g_v, g)) < 1e-14
        assert family.norm_of(g_v.values()) > 1e-3


def test_on_a_quadratic_the_oracles_have_closed_forms():
    """ghat = A (w + rho A w / |A w|)."""
    rng = np.random.default_rng(3)
    root = rng.normal(size=(7, 7))
    matrix = root @ root.T
    w = {"first": rng.normal(size=3), "second": rng.normal(size=4)}
    gradient = family.gradient_of(reference.quadratic(matrix))
    flat = lambda leaves: np.concatenate(list(leaves.values()))
    g = matrix @ flat(w)
    ghat = matrix @ (flat(w) + 0.3 * g / np.linalg.norm(g))
    across = g - (g @ ghat) / (ghat @ ghat) * ghat
    t = np.abs(flat(w)) + 0.1
    adapted = matrix @ (flat(w) + 0.3 * t**2 * g / np.linalg.norm(t * g))
    for rule, expected in (
        (family.sam(gradient, rho=0.3), ghat),
        (family.generalized_sam(gradient, rho=0.3, alpha=0.7), 0.3 * g + 0.7 * ghat),
        (family.gsam(gradient, rho=0.3, alpha=0.6), ghat - 0.6 * across),
        (family.asam(gradient, rho=0.3, eta=0.1), adapted),
    ):
        (step,) = family.trajectory(rule, w, [None])
        np.testing.assert_allclose(flat(step.move.update), expected)


def test_the_axes_of_the_oracles_meet_the_published_methods():
    def composed(ascent, shape, **options):
        rule = family.perturbed(GRADIENT, ascent, shape, rho=0.3, **options)
        return params_of(follow(rule))

    whole, layers = family.whole_batch(GRADIENT), reference.LEAVES
    sam = follow(family.sam(GRADIENT, rho=0.3))
    base = follow(family.sam(GRADIENT, rho=0.0))
    assert_follows(composed(whole, family.normalized()), sam, 1e-12)
    every_row = family.micro_batch(GRADIENT, lambda number: slice(0, SIZE))
    assert_follows(composed(every_row, family.normalized(over_all=True)), sam, 1e-12)
    one_layer = {"everything": ALL}
    for step in follow(
        family.perturbed(GRADIENT, whole, family.relative_to_layers(one_layer), rho=0.3)
    )[:1]:
        norm = family.norm_of(step.move.epsilon.values())
        own = family.norm_of(reference.mlp_params().values())
        np.testing.assert_allclose(norm, 0.3 * own)
    for ascent in (family.momentum(), family.previous()):
        first = composed(ascent, family.relative_to_layers(layers))[0]
        assert_follows([first], base[:1], 1e-12)
    never = composed(whole, family.normalized(), when=lambda number: False)
    assert_follows(never, base, 1e-12)


# --- the library in its two loops -----------------------------------------------------


@pytest.mark.parametrize("name", HYPER)
def test_train_step_follows_the_formulas(name):
    run = trained(name)
    kept = [leaves_of(names) for names in run.kept]
    steps = follow(rule_of(name, kept))
    assert_follows(run.params, steps)
    w = reference.mlp_params()
    for info, step, batch in zip(
        run.infos, steps, reference.mlp_batches(STEPS, SIZE), strict=True
    ):
        value = lambda w, batch=batch: reference.mlp_value_and_grad(w, batch)[0]
        epsilon = step.move.epsilon
        np.testing.assert_allclose(info.value, value(w))
        perturbed_value = value(family.added(w, 1.0, epsilon))
        np.testing.assert_allclose(info.perturbed_value, perturbed_value)
        if name not in ("asam", "esam"):
            np.testing.assert_allclose(info.rho, family.norm_of(epsilon.values()))
        w = step.params


@pytest.mark.parametrize("form", ["grad_fn", "value_fn"])
@pytest.mark.parametrize("name", HYPER)
def test_the_transformation_follows_the_formulas(name, form):
    changes = {"samples": 1.0} if name == "esam" else {}
    run = chain(method(name, **changes), form)
    kept = [leaves_of(names) for names in run.kept]
    assert_follows(run.params, follow(rule_of(name, kept, **changes)))


@pytest.mark.parametrize("name", STATELESS)
def test_the_functional_form_follows_the_formulas(name):
    with enable_x64(True):
        params, batches = problem()
        loss = lambda p, batch: jnp.mean(example_losses(p, batch))
        ours = method(name)
        layers = lwsam.Layers.of(params, ours.rule)
        selection = [
            n for n in layers.names if name != "sam_on" or n.startswith("m_Batch")
        ]
        grad_fn = lwsam.value_and_grad(loss, tuple(selection), method=ours)
        out = grad_fn(params, batches[0])
        (step,) = follow(rule_of(name), batches=reference.mlp_batches(1, SIZE))
        for path, leaf in from_tree(out.grads).items():
            expected = step.move.update[path]
            np.testing.assert_allclose(leaf, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("limit", LIMITS)
def test_the_limits_of_the_presets(limit):
    name, changes, sam = LIMITS[limit]
    run = train(method(name, **changes))
    assert_follows(run.params, follow(family.sam(GRADIENT, **sam)))


def test_asam_is_sam_where_all_weights_have_the_same_size():
    ones = {name: np.sign(leaf) for name, leaf in reference.mlp_params().items()}
    run = train(lwsam.asam(rho=0.3, eta=0.0), params=ones)
    (expected, *_) = follow(family.sam(GRADIENT, rho=0.3), params=ones)
    assert_follows(run.params[:1], [expected])


@pytest.mark.parametrize("name", HYPER)
def test_without_a_radius_every_preset_is_the_base_optimizer_bit_for_bit(name):
    run = train(method(name, rho=0.0))
    for ours, theirs in zip(run.params, base(), strict=True):
        for path, leaf in theirs.items():
            np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


@pytest.mark.parametrize("name", HYPER)
def test_without_a_radius_the_transformation_hands_gradients_through(name):
    params, _ = problem(np.float32)
    changes = {"samples": 1.0} if name == "esam" else {}
    tx = lwsam.as_optax(method(name, rho=0.0, **changes))
    grads = jax.tree.map(lambda x: x + 1.0, params)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params, grad_fn=lambda p: 0.0)
        for ours, theirs in zip(
            jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
