"""Presets that weigh the samples against their oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import family_reference as family
import lwsam_jax as lwsam
import reference
import sample_oracles as oracles
from family_runs import (
    assert_follows,
    base,
    base_optimizer,
    follow,
    GRADIENT,
    loss_fn,
    LOSSES,
    problem,
    SIZE,
    STEPS,
    train,
)


LABELS = lambda batch: batch[1]
COUNTS = [30, 12, 4]
SHARES = np.array(COUNTS) / sum(COUNTS)
C = 0.7 * (1 - SHARES) ** 2.0
RARE = [0.0, 1.0, 1.0]


def focal(rho, **parts):
    return lwsam.focal_sam(rho, COUNTS, LABELS, 2.0, 0.7, **parts)


def imb(rho, **parts):
    return lwsam.imbsam(rho, COUNTS, LABELS, **parts)


CASES = {
    "csam": (
        lambda rho, **parts: lwsam.csam(rho, 1.5, **parts),
        lambda rho: oracles.csam(GRADIENT, LOSSES, rho=rho, gamma=1.5),
    ),
    "csam, a constant weight": (
        lambda rho, **parts: lwsam.csam(rho, 1.5, False, **parts),
        lambda rho: oracles.csam(GRADIENT, LOSSES, rho=rho, gamma=1.5, inside=False),
    ),
    "focal_sam": (focal, lambda rho: oracles.focal_sam(GRADIENT, LOSSES, rho=rho, c=C)),
    "imbsam": (imb, lambda rho: oracles.focal_sam(GRADIENT, LOSSES, rho=rho, c=RARE)),
    "imbsam, twice": (
        lambda rho, **parts: imb(rho, tail_weight=2.0, **parts),
        lambda rho: oracles.focal_sam(GRADIENT, LOSSES, rho=rho, c=RARE, tail=2.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_train_step_follows_the_formula(name):
    ours, oracle = CASES[name]
    run, steps = train(ours(0.3)), follow(oracle(0.3))
    assert_follows(run.params, steps)
    w = reference.mlp_params()
    batches = reference.mlp_batches(STEPS, SIZE)
    for info, step, batch in zip(run.infos, steps, batches, strict=True):
        np.testing.assert_allclose(info.value, LOSSES(w, batch).mean())
        point = family.added(w, 1.0, step.move.epsilon)
        np.testing.assert_allclose(info.perturbed_value, LOSSES(point, batch).mean())
        np.testing.assert_allclose(info.ascent_value, info.value)
        w = step.params
    if name == "csam":  # examples of both kinds
        known = np.concatenate([step.move.memory for step in steps])
        assert 0 < (known > 0.5).sum() < known.size


@pytest.mark.parametrize("name", CASES)
def test_without_a_radius_it_is_the_base_optimizer_bit_for_bit(name):
    for ours, theirs in zip(train(CASES[name][0](0.0)).params, base(), strict=True):
        for path, leaf in theirs.items():
            np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


LIMITS = {
    "csam of gamma 0": lambda: lwsam.csam(0.3, 0.0),
    "focal_sam of equal weights": lambda: lwsam.focal_sam(0.3, [1, 1, 1], LABELS, 0, 1),
    "imbsam of rare classes": lambda: lwsam.imbsam(0.3, [1, 2, 3], LABELS),
    "imbsam without any is the base": lambda: lwsam.imbsam(0.3, [99] * 3, LABELS),
    "focal_sam of none is the base": lambda: lwsam.focal_sam(0.3, COUNTS, LABELS, 1, 0),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits(name):
    """In a batch without rare classes the perturbation is 0, and the step is plain."""
    rho = 0.0 if "base" in name else 0.3
    run = train(LIMITS[name]())
    assert_follows(run.params, follow(family.sam(GRADIENT, rho=rho)))


@pytest.mark.parametrize("name", CASES)
def test_a_part_of_the_batch_and_the_largest_layers(name):
    ours = CASES[name][0](
        0.1, ascent=lwsam.micro_batch(0.5), select=lwsam.top_k(2), rule=lwsam.weights
    )
    run = train(ours, dtype=np.float32)
    assert {len(names) for names in run.kept[1:]} == {2}


@pytest.mark.parametrize("name", CASES)
def test_an_ascent_of_its_own_on_every_example_is_the_whole_batch(name):
    """Where ascent and third gradient do not share their forward pass."""
    ours, oracle = CASES[name]
    run = train(ours(0.3, ascent=lwsam.micro_batch(size=SIZE)))
    assert_follows(run.params, follow(oracle(0.3)))


def test_csam_along_the_momentum_and_what_needs_an_ascent():
    train(lwsam.csam(0.1, ascent=lwsam.momentum()), dtype=np.float32)
    for ours in (focal, imb):
        with pytest.raises(ValueError, match="`descent`.*takes no pass"):
            ours(0.1, ascent=lwsam.momentum())


@pytest.mark.parametrize("name", ["csam", "focal_sam"])
def test_over_devices(name):
    ours, oracle = CASES[name]
    run = train(ours(0.3), parallel="pmap", dtype=np.float32)
    assert_follows(run.params, follow(oracle(0.3)), rtol=1e-4)


def test_a_third_gradient_costs_a_backward_pass():
    """Two forward and three backward passes, where SAM has two of each."""
    params, batches = problem(np.float32)
    cost = {}
    for name, method in (("sam", lwsam.sam(0.3)), ("focal", focal(0.3))):
        step = lwsam.TrainStep(loss_fn, base_optimizer(), method)
        state = step.init(params, {}, batches[0], key=jax.random.key(0))
        compiled = step.lower(state, batches[0]).compile().cost_analysis()
        compiled = compiled[0] if isinstance(compiled, list) else compiled
        _, info = step(state, batches[0])
        cost[name] = compiled["flops"], 1 + float(info.overhead)
    (plain, one), (third, two) = cost["sam"], cost["focal"]
    assert one == pytest.approx(2.0, abs=0.02)
    assert 2.5 < two < 2.75
    assert third / plain == pytest.approx(two / one, abs=0.12)


def test_other_terms_of_the_loss_go_with_the_descent():
    """Weight decay, once, at the perturbed point."""
    decay = 0.05

    def decayed(params, model_state, batch, key):
        loss, aux = loss_fn(params, model_state, batch, key)
        squares = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        return loss + decay / 2 * squares, aux

    plain = oracles.focal_sam(GRADIENT, LOSSES, rho=0.3, c=C)

    def rule(number, w, last, batch):
        move = plain(number, w, last, batch)
        point = family.added(w, 1.0, move.epsilon)
        return move._replace(update=family.added(move.update, decay, point))

    assert_follows(train(focal(0.3), loss_fn=decayed).params, follow(rule))


def test_numbers_out_of_range_are_refused():
    for make, argument in (
        (lambda: lwsam.csam(0.1, 2.5), "gamma"),
        (lambda: lwsam.focal_sam(0.1, [], LABELS), "counts"),
        (lambda: lwsam.focal_sam(0.1, COUNTS, LABELS, weight=-1), "weight"),
        (lambda: lwsam.imbsam(0.1, COUNTS, LABELS, tail_weight=0), "tail_weight"),
    ):
        with pytest.raises(ValueError, match=f"`{argument}`"):
            make()


def test_what_the_loss_must_return():
    def without(params, model_state, batch, key):
        loss, (model_state, _) = loss_fn(params, model_state, batch, key)
        return loss, (model_state, {})

    params, batches = problem(np.float32)
    step = lwsam.TrainStep(without, base_optimizer(), lwsam.csam(0.1))
    state = step.init(params, {}, batches[0], key=jax.random.key(0))
    with pytest.raises(ValueError, match="losses"):
        step(state, batches[0])
    wrong = lwsam.focal_sam(0.1, COUNTS, lambda batch: jnp.zeros(3, int))
    step = lwsam.TrainStep(loss_fn, base_optimizer(), wrong)
    state = step.init(params, {}, batches[0], key=jax.random.key(0))
    with pytest.raises(ValueError, match="`labels`"):
        step(state, batches[0])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_m_sam_follows_the_formula(count):
    """One part is SAM; as many as examples is SAM of each."""
    run = train(lwsam.m_sam(0.3, count))
    rule = oracles.m_sam(GRADIENT, rho=0.3, groups=count)
    assert_follows(run.params, follow(rule))
    if count == 1:
        assert_follows(run.params, follow(family.sam(GRADIENT, rho=0.3)))


def test_m_sam_with_other_parts():
    parts = {"combine": lwsam.mix(0.5), "select": lwsam.top_k(2)}
    run = train(lwsam.m_sam(0.1, 2, **parts, rule=lwsam.weights), dtype=np.float32)
    assert {len(names) for names in run.kept[1:]} == {2}
    train(lwsam.focal_sam(0.1, COUNTS, LABELS, split=lwsam.sub_batches(2)))
    with pytest.raises(ValueError, match="without a state"):
        train(lwsam.friendly_sam(0.1, split=lwsam.sub_batches(2)))
    with pytest.raises(ValueError, match="`split`"):
        lwsam.ae_sam(0.1, 6, split=lwsam.sub_batches(2))
    with pytest.raises(ValueError, match="TrainStep"):
        lwsam.as_optax(lwsam.m_sam(0.1))


@pytest.mark.parametrize("name", CASES)
def test_a_chain_refuses_to_weigh_the_examples(name):
    with pytest.raises(ValueError, match="TrainStep"):
        lwsam.as_optax(CASES[name][0](0.1))
