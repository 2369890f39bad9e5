"""The parts that presets are made of, one by one, against float64 NumPy oracles."""

import jax
import numpy as np
import pytest

import family_reference as family
import lwsam_jax as lwsam
import reference
from family_runs import (
    ALL,
    assert_follows,
    base_optimizer,
    chain,
    follow,
    from_tree,
    GRADIENT,
    KERNELS,
    loss_fn,
    MODULES,
    MOMENTUM,
    problem,
    RATE,
    SIZE,
    STEPS,
    train,
)
from plain import enable_x64
from preset_task import composed, method, rule_of


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
