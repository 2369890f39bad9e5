"""The presets, and the parts they are made of, against float64 NumPy oracles."""

import functools
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
    base,
    base_optimizer,
    chain,
    example_losses,
    flat_norm,
    follow,
    from_tree,
    GRADIENT,
    KERNELS,
    leaves_of,
    loss_fn,
    LOSSES,
    MODULES,
    MOMENTUM,
    params_of,
    problem,
    pulled,
    pulling_batches,
    RATE,
    SIZE,
    STEPS,
    train,
)
from plain import enable_x64


# One set of numbers for each preset: for the library and for the oracle.
HYPER = {
    "sam": {"rho": 0.3},
    "generalized_sam": {"rho": 0.3, "alpha": 0.7},
    "asam": {"rho": 0.5, "eta": 0.05},
    "sam_on": {"rho": 0.4},
    "gsam": {"rho": 0.3, "alpha": 0.6},
    "looksam": {"rho": 0.3, "period": 3, "weight": 0.7},
    "friendly_sam": {"rho": 0.3, "sigma": 0.9, "decay": 0.6},
    "esam": {"rho": 0.2, "keep": 0.6, "samples": 0.5},
}
# Those whose parts keep no state and draw nothing.
STATELESS = ("sam", "generalized_sam", "asam", "sam_on", "gsam")


def method(name, **changes):
    return getattr(lwsam, name)(**{**HYPER[name], **changes})


def rule_of(name, kept=None, **changes):
    """The oracle of a preset; ESAM's is told what each step perturbed."""
    hyper = {**HYPER[name], **changes}
    if name == "esam":
        return family.esam(GRADIENT, LOSSES, **hyper, kept=kept)
    if name == "sam_on":
        hyper["leaves"] = MODULES["m_mid"]
    if name == "asam":  # T is 1 for biases, as in the authors' code
        hyper["scaled_leaves"] = KERNELS
    return getattr(family, name)(GRADIENT, **hyper)


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


@functools.cache
def trained(name):
    return train(method(name))


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


# --- the perturbations, seen on a quadratic -------------------------------------------


def radius(step):
    return 0.1 * (step + 1)


def unscaled(w, epsilon, eta):
    """The norm of T^-1 eps."""
    return flat_norm(jax.tree.map(lambda e, w: e / (np.abs(w) + eta), epsilon, w))


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


# --- the parts one by one -------------------------------------------------------------


def composed(ascent, shape, **options):
    return family.perturbed(GRADIENT, ascent, shape, **options)


WHOLE = family.whole_batch(GRADIENT)
LAYERS = family.relative_to_layers(reference.WEIGHTS)
PARTS = {
    "adaptive, weights": (
        lambda: dict(rho=0.4, shape=lwsam.adaptive(eta=0.02)),
        composed(WHOLE, family.adaptive(0.02), rho=0.4, leaves=KERNELS),
    ),
    "relative to layers": (
        lambda: dict(rho=0.1, shape=lwsam.relative(per="layer")),
        composed(WHOLE, LAYERS, rho=0.1, leaves=KERNELS),
    ),
    "relative to modules": (
        lambda: dict(rho=0.1, shape=lwsam.relative(), rule=lwsam.modules),
        composed(WHOLE, family.relative_to_layers(MODULES), rho=0.1),
    ),
    "relative to filters": (
        lambda: dict(rho=0.1, shape=lwsam.relative(per="filter")),
        composed(WHOLE, family.relative_to_filters(KERNELS), rho=0.1, leaves=KERNELS),
    ),
    "over all, one layer": (
        lambda: dict(
            select=lwsam.named("m_"), rho=0.4, shape=lwsam.normalized(over="all")
        ),
        composed(
            WHOLE, family.normalized(over_all=True), rho=0.4, leaves=["m_mid/kernel"]
        ),
    ),
    "raw, every second": (
        lambda: dict(rho=0.4, shape=lwsam.raw(), when=lwsam.every(2)),
        composed(
            WHOLE, family.raw(), rho=0.4, leaves=KERNELS, when=lambda t: t % 2 == 0
        ),
    ),
    "a window": (
        lambda: dict(rho=0.4, when=lwsam.between(2, 4)),
        composed(
            WHOLE,
            family.normalized(),
            rho=0.4,
            leaves=KERNELS,
            when=lambda t: 2 <= t < 4,
        ),
    ),
    "a tail": (
        lambda: dict(rho=0.4, when=lwsam.last(0.5, STEPS)),
        composed(
            WHOLE, family.normalized(), rho=0.4, leaves=KERNELS, when=lambda t: t >= 3
        ),
    ),
    "momentum": (
        lambda: dict(rho=1.0, ascent=lwsam.momentum(), rule=lwsam.leaves),
        composed(family.momentum(), family.normalized(), rho=1.0),
    ),
    "momentum, upwards": (
        lambda: dict(rho=0.3, ascent=lwsam.momentum(sign=1), shape=lwsam.raw()),
        composed(family.momentum(1.0), family.raw(), rho=0.3, leaves=KERNELS),
    ),
    "momentum, relative": (
        lambda: dict(rho=0.2, ascent=lwsam.momentum(), shape=lwsam.relative()),
        composed(family.momentum(), LAYERS, rho=0.2, leaves=KERNELS),
    ),
    "momentum, adaptive": (
        lambda: dict(
            rho=1.0,
            ascent=lwsam.momentum(),
            shape=lwsam.adaptive(eta=0.01),
            rule=lwsam.leaves,
        ),
        composed(family.momentum(), family.adaptive(0.01), rho=1.0),
    ),
    "previous": (
        lambda: dict(rho=0.3, ascent=lwsam.previous(), rule=lwsam.leaves),
        composed(family.previous(), family.normalized(), rho=0.3),
    ),
    "previous, relative, every second": (
        lambda: dict(
            rho=0.1,
            ascent=lwsam.previous(),
            shape=lwsam.relative(),
            when=lwsam.every(2),
        ),
        composed(
            family.previous(),
            LAYERS,
            rho=0.1,
            leaves=KERNELS,
            when=lambda t: t % 2 == 0,
        ),
    ),
}


@pytest.mark.parametrize("name", ["generalized_sam", "gsam", "friendly_sam", "asam"])
def test_an_ascent_of_its_own_on_every_example_is_the_whole_batch(name):
    """The path that a micro-batch takes, of the size of the batch."""
    run = train(method(name, ascent=lwsam.micro_batch(size=SIZE)))
    assert_follows(run.params, follow(rule_of(name)))


@pytest.mark.parametrize(
    ("parts", "layers", "k", "normalize"),
    [
        (
            {"select": lwsam.top_k(2), "rule": lwsam.weights},
            reference.WEIGHTS,
            2,
            "selected",
        ),
        ({"shape": lwsam.raw()}, reference.LEAVES, len(ALL), "none"),
    ],
    ids=["the largest layers", "raw"],
)
def test_generalized_sam_with_other_parts_is_algorithm_1(parts, layers, k, normalize):
    steps = reference.algorithm_1(
        reference.mlp_value_and_grad,
        reference.mlp_params(),
        reference.mlp_batches(STEPS, SIZE),
        layers,
        k=k,
        r=0.3,
        alpha=0.7,
        normalize=normalize,
        learning_rate=RATE,
        momentum=MOMENTUM,
    )
    assert_follows(train(method("generalized_sam", **parts)).params, steps)


def test_gsam_of_one_layer_projects_over_all_leaves():
    ours = method("gsam", select=lwsam.named("m_"), rule=lwsam.weights)
    rule = rule_of("gsam", leaves=["m_mid/kernel"])
    assert_follows(train(ours).params, follow(rule))


@pytest.mark.parametrize("form", ["grad_fn", "value_fn"])
@pytest.mark.parametrize("case", ["momentum", "previous", "momentum, relative"])
def test_stale_parts_follow_the_formulas_in_the_transformation(case, form):
    """Its momentum is its own, of the decay of the base optimizer here."""
    parts, rule = PARTS[case]
    assert_follows(chain(of_parts(**parts()), form).params, follow(rule))


def of_parts(**parts):
    return lwsam.Method(parts.pop("select", lwsam.everything()), **parts)


@pytest.mark.parametrize("case", PARTS)
def test_parts_follow_the_formulas(case):
    parts, rule = PARTS[case]
    assert_follows(train(of_parts(**parts())).params, follow(rule))


@pytest.mark.parametrize("case", ["looksam", "momentum", "previous"])
def test_inside_a_compiled_loop(case):
    if case == "looksam":
        ours, rule = method(case), rule_of(case)
    else:
        parts, rule = PARTS[case]
        ours = of_parts(**parts())
    with enable_x64(True):
        params, batches = problem()
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)
        step = lwsam.TrainStep(loss_fn, base_optimizer(), ours)
        state = step.init(params, {}, batches[0], key=jax.random.key(0))
        state, infos = step.scan(state, stacked)
        last = from_tree(state.params)
    perturbed = np.arange(STEPS) % 3 == 0 if case == "looksam" else np.ones(STEPS)
    np.testing.assert_array_equal(infos.mask.all(axis=1), perturbed)
    assert_follows([last], follow(rule)[-1:])


@pytest.mark.parametrize("size", [{"fraction": 0.25}, {"size": 2}])
def test_a_micro_batch_is_a_block_of_the_batch(size):
    """Which block a step takes is the library's; the oracle finds it by trying all."""
    ascent = lwsam.micro_batch(**size)
    run = train(of_parts(rho=0.3, ascent=ascent, rule=lwsam.leaves))
    blocks = []

    def distance(block):
        taken = [*blocks, block]
        step = micro_batch_steps(taken)[-1]
        return max(
            np.abs(run.params[len(blocks)][name] - leaf).max()
            for name, leaf in step.params.items()
        )

    for _ in range(STEPS):
        blocks.append(min(range(4), key=distance))
    assert_follows(run.params, micro_batch_steps(blocks))
    assert len(set(blocks)) > 1


def micro_batch_steps(blocks):
    rows = lambda number: slice(2 * blocks[number], 2 * blocks[number] + 2)
    ascent = family.micro_batch(GRADIENT, rows)
    rule = family.perturbed(GRADIENT, ascent, family.normalized(), rho=0.3)
    return follow(rule, batches=reference.mlp_batches(STEPS, SIZE)[: len(blocks)])


def test_a_micro_batch_of_everything_is_the_whole_batch():
    ascent = lwsam.micro_batch(1.0)
    run = train(of_parts(rho=0.3, ascent=ascent, rule=lwsam.leaves))
    assert_follows(run.params, follow(rule_of("sam")))


def observed_noise(run):
    """The perturbation of each step, from the point that its metrics show."""
    starts = [reference.mlp_params(), *run.params[:-1]]
    points = [from_tree(metrics["point"]) for metrics in run.metrics]
    return [family.added(b, -1.0, a) for a, b in zip(starts, points, strict=True)]


@pytest.mark.parametrize(
    ("shape", "oracle", "leaves"),
    [
        ("raw", family.raw(), KERNELS),
        ("normalized", family.normalized(), KERNELS),
        ("relative", LAYERS, KERNELS),
    ],
)
def test_random_perturbations_follow_the_formulas(shape, oracle, leaves):
    """The noise is seen; its shape, and what is done with it, are the oracle's."""
    ours = of_parts(rho=0.2, ascent=lwsam.random(), shape=getattr(lwsam, shape)())
    run = train(ours)
    noise = observed_noise(run)
    for epsilon in noise:
        assert {name for name, leaf in epsilon.items() if np.any(leaf)} == set(leaves)
    # Undone, so that the oracle gives the noise its size by itself.
    sizes = 1.0 / 0.2 if shape == "raw" else 7.0
    drawn = [family.scaled(sizes, epsilon) for epsilon in noise]
    rule = composed(family.random(drawn), oracle, rho=0.2, leaves=leaves)
    assert_follows(run.params, follow(rule))
    units = [family.to_norm(1.0, epsilon) for epsilon in noise]
    assert all(abs(family.inner(units[0], other)) < 0.7 for other in units[1:])
    if shape == "raw":
        values = np.concatenate([d[name].ravel() for d in drawn for name in leaves])
        assert abs(values.mean()) < 0.2
        assert abs(values.std() - 1.0) < 0.15


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
