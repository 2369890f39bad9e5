"""The sweep that proposes a radius: what it trains, what it counts, what it proposes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam


class Fake(NamedTuple):
    """A state whose training only counts, for scores that are known."""

    hyperparams: dict[str, Any]
    key: Any
    step: int = 0
    seen: tuple = ()


class FakeInfo(NamedTuple):
    overhead: float


def start(rho=0.1):
    return Fake({"rho": jnp.float32(rho), "alpha": jnp.float32(0.5)}, jax.random.key(0))


def count(state, batch):
    rho = float(state.hyperparams["rho"])
    new = state._replace(step=state.step + 1, seen=(*state.seen, batch))
    return new, FakeInfo(1.0 if rho else 0.0)


def rho_of(state):
    return float(state.hyperparams["rho"])


def noise_of(state, size):
    """One number for each key, the same for all radii but for a small part."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(state.key)))
    shared = rng.normal()
    own = np.random.default_rng(int(1e6 * rho_of(state)) + rng.integers(1000)).normal()
    return 10 * size * shared + size * own


def find(validate, **changes):
    options = {"steps": 8, "rhos": (0.1, 0.2, 0.4, 0.8), **changes}
    options = {"batches": [0, 1, 2], **options}
    batches = options.pop("batches")
    return lwsam.find_rho(count, start(), batches, validate, **options)


def peak(state):
    """Best at 0.4, by far."""
    return -((rho_of(state) - 0.4) ** 2) + noise_of(state, 1e-3)


def test_it_proposes_the_radius_of_the_best_score():
    found = find(peak)
    assert found.rho == pytest.approx(0.4)
    assert found.gain == pytest.approx(0.16, abs=0.01)
    assert 0 < found.noise < 0.01
    assert found.why.startswith("0.4: +0.1")
    assert "end of the ladder" not in found.why
    worse = find(lambda s: -peak(s), maximize=False)
    assert worse.rho == pytest.approx(0.4)
    assert worse.gain == pytest.approx(found.gain)
    assert worse.trials[0].scores[0] == pytest.approx(-found.trials[0].scores[0])


def test_halving_keeps_zero_and_the_better_half():
    found = find(peak)
    trained = [(trial.steps, round(trial.rho, 4)) for trial in found.trials]
    assert trained == [
        *((2, rho) for rho in (0, 0.1, 0.2, 0.4, 0.8)),
        *((4, rho) for rho in (0, 0.2, 0.4)),
        *((8, rho) for rho in (0, 0.4)),
    ]
    assert {len(trial.scores) for trial in found.trials} == {3}
    steps = 3 * (5 * 2 + 3 * 2 + 2 * 4)
    assert found.steps == steps
    assert found.gradients == 2 * steps - 3 * 8  # 0 costs half
    assert f"{steps} steps, {2 * steps - 24} plain gradients" in found.why


def test_every_radius_sees_the_same_batches_and_each_repeat_its_own():
    seen = {}

    def validate(state):
        seen.setdefault((state.step, rho_of(state)), []).append(state.seen)
        return peak(state)

    numbers = iter(range(1000))
    find(validate, batches=numbers)
    for step in (2, 4, 8):
        runs = [rows for (at, _), rows in seen.items() if at == step]
        assert all(rows == runs[0] for rows in runs)
        assert len(set(runs[0])) == 3  # an iterator goes on from repeat to repeat
    seen.clear()
    find(
        validate, batches=lambda repeat: [10 * repeat, 10 * repeat + 1, 10 * repeat + 2]
    )
    last = next(rows for (at, rho), rows in seen.items() if at == 8 and rho > 0)
    assert last[1] == (10, 11, 12, 10, 11, 12, 10, 11)  # what ends is begun again


def test_it_proposes_0_where_the_gain_is_noise():
    """Repeats differ by ten times what radii do: the differences are paired."""

    def flat(seed):
        def validate(state):
            return noise_of(state._replace(key=jax.random.fold_in(state.key, seed)), 1)

        rhos = [0.1 * 2**i for i in range(7)]
        return find(validate, rhos=rhos, steps=3)

    found = [flat(seed) for seed in range(24)]
    noises = [each.noise for each in found]
    assert 0.5 < np.mean(noises) < 1.1  # it is sqrt(2 / 3)
    proposals = [each for each in found if each.rho]
    assert len(proposals) <= 2
    nothing = next(each for each in found if not each.rho)
    assert nothing.why.startswith("0: the best radius, ")
    assert "not 2.5 standard errors" in nothing.why


def test_a_gain_has_to_be_larger_than_its_noise():
    """Differences of 1, 2 and 3 have a mean of 2 and a standard error of 0.577.

    The residuals of both radii are half of the differences' own.
    """
    scores = iter([0.0, 0.0, 0.0, 1.0, 2.0, 3.0] * 2)
    found = find(lambda s: next(scores), rhos=[0.1], rungs=1, confidence=3.4)
    assert (found.rho, found.gain) == (pytest.approx(0.1), 2.0)
    assert found.noise == pytest.approx(1 / np.sqrt(3))
    scores = iter([0.0, 0.0, 0.0, 1.0, 2.0, 3.0] * 2)
    assert find(lambda s: next(scores), rhos=[0.1], rungs=1, confidence=3.6).rho == 0


def test_a_score_may_have_the_number_of_the_repeat():
    asked = []

    def of_repeat(state, repeat):
        asked.append(repeat)
        return peak(state) + 100 * repeat

    assert find(of_repeat, repeats=4).rho == pytest.approx(0.4)
    assert asked[:8] == [0, 1, 2, 3] * 2
    assert find(lambda state, often=1: often * peak(state)).rho == pytest.approx(0.4)


def test_a_radius_that_collapses_now_and_then_does_not_hide_the_others():
    """Its repeats differ by 1, and those of the others by hundredths."""

    def validate(state):
        fails = rho_of(state) > 0.7 and noise_of(state, 1.0) > 0
        return peak(state) - 1.0 * fails

    found = find(validate, repeats=6)
    assert found.rho == pytest.approx(0.4)
    assert found.noise < 0.01


@pytest.mark.parametrize(("at_the_end", "rho"), [(0.0, 0.4), (-1e-3, 0.0)])
def test_what_is_better_in_the_second_half_must_be_no_worse_at_the_end(at_the_end, rho):
    """At half of the steps 0.4 is ahead by 1."""
    ahead = {2: 9.0, 4: 1.0, 8: at_the_end}

    def validate(state):
        return ahead[state.step] if rho_of(state) == pytest.approx(0.4) else 0.0

    found = find(validate)
    assert found.rho == pytest.approx(rho)
    assert found.gain == pytest.approx((1 + at_the_end) / 2)
    assert ("gone at the end" in found.why) == (rho == 0)


def test_equal_scores_propose_0():
    assert find(lambda s: 1.0).rho == 0


def test_a_radius_that_diverges_is_worst_and_never_proposed():
    found = find(lambda s: np.nan if rho_of(s) > 0.3 else peak(s))
    assert found.rho == pytest.approx(0.2)
    assert "end of the ladder" not in found.why
    everywhere = find(lambda s: np.inf if rho_of(s) else 0.0)
    assert everywhere.rho == 0
    only_zero = find(lambda s: peak(s) if rho_of(s) else np.nan)
    assert only_zero.rho == pytest.approx(0.4)


def test_the_end_of_the_ladder_is_named():
    found = find(lambda s: rho_of(s))
    assert found.rho == pytest.approx(0.8)
    assert "It is the end of the ladder: try further." in found.why


def test_the_ladder_is_that_of_the_state():
    found = lwsam.find_rho(count, start(0.4), [0], peak, steps=3)
    ladder = [0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    tried = [trial.rho for trial in found.trials[:8]]
    np.testing.assert_allclose(tried, ladder, rtol=1e-6)


def test_steps_that_report_no_price_have_none():
    step = lambda state, batch: (count(state, batch)[0], None)
    found = lwsam.find_rho(step, start(), [0], peak, steps=4)
    assert found.gradients is None
    assert found.why.endswith(f"took {found.steps} steps.")


def linear_task():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 4)).astype(np.float32)
    y = (x @ rng.normal(size=(4, 1)) > 0).astype(np.float32)

    def loss_fn(params, model_state, batch, key):
        x, y = batch
        losses = optax.sigmoid_binary_cross_entropy(x @ params["w"], y)
        return losses.mean(), (model_state, {})

    batches = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8)]
    validate = lambda params: -float(loss_fn(params, {}, (x, y), None)[0])
    return loss_fn, {"w": jnp.zeros((4, 1))}, batches, validate


@pytest.mark.parametrize(
    "method", [lwsam.sam(0.1), lwsam.LayerwiseSAM(1, rho=0.1, alpha=0.8)]
)
def test_a_train_step_is_swept_without_compiling_again(method):
    loss_fn, params, batches, validate = linear_task()
    step = lwsam.TrainStep(loss_fn, optax.sgd(0.5), method)
    state = step.init(params, {}, batches[0], key=jax.random.key(0))
    found = lwsam.find_rho(
        step, state, batches, lambda s: validate(s.params), steps=4, rhos=(0.1, 0.2)
    )
    assert len(step.executables) <= 1
    assert float(state.hyperparams["rho"]) == pytest.approx(0.1)  # it is still there
    assert found.steps == 3 * (3 * 1 + 2 * 1 + 2 * 2)
    assert found.gradients is not None
    assert found.gradients >= found.steps
    state, _ = step(state, batches[0])
    assert int(state.step) == 1


def test_the_radius_0_of_a_sweep_is_the_base_optimizer():
    loss_fn, params, batches, validate = linear_task()
    scores = {}
    for method in (lwsam.sam(0.1), lwsam.sam(0.0)):
        step = lwsam.TrainStep(loss_fn, optax.sgd(0.5), method)
        state = step.init(params, {}, batches[0], key=jax.random.key(0))
        if method.is_plain:
            for batch in batches * 2:
                state, _ = step(state, batch)
            scores["base"] = validate(state.params)
        else:
            found = lwsam.find_rho(
                step, state, batches, lambda s: validate(s.params), steps=4
            )
            zero = [trial for trial in found.trials if trial.rho == 0]
            scores["zero"] = zero[-1].scores[0]
            assert zero[-1].steps == 4
    np.testing.assert_allclose(scores["zero"], scores["base"], rtol=1e-5)


def test_a_loop_of_perturbed_is_swept_too():
    loss_fn, params, batches, validate = linear_task()
    tx = lwsam.perturbed(optax.sgd(0.5, momentum=0.9), 0.1)

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        grads = jax.grad(lambda p: loss_fn(p, {}, batch, None)[0])(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def score(state):
        params, opt_state = state
        return validate(lwsam.eval_params(opt_state, params))

    state = params, tx.init(params)
    found = lwsam.find_rho(step, state, batches, score, steps=4, rhos=(0.05, 5.0))
    assert found.gradients is None
    zero, ours = found.trials[-2:]
    assert (zero.rho, zero.steps, ours.steps) == (0, 4, 4)
    assert ours.scores != zero.scores


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rhos": ()}, ("`rhos`", "> 0")),
        ({"rhos": (0.0, 0.1)}, ("`rhos`", "0 is there by itself")),
        ({"repeats": 1}, ("`repeats`", ">= 2", "noise")),
        ({"rungs": 0}, ("`rungs`", ">= 1")),
        ({"steps": 2}, ("`steps`", ">= 3")),
        ({"confidence": -1.0}, ("`confidence`",)),
        ({"batches": []}, ("`batches`", "no more")),
        ({"batches": iter([1, 2])}, ("`batches`", "iterator with more")),
    ],
)
def test_what_is_wrong_is_refused(changes, words):
    with pytest.raises((ValueError, TypeError)) as error:
        find(peak, **changes)
    for word in ("find_rho", *words):
        assert word in str(error.value)


def test_a_state_without_a_radius_is_refused():
    for state in (start()._replace(hyperparams={}), {"w": 1.0}):
        with pytest.raises(ValueError, match=r"`state`.*a Python 0 is static"):
            lwsam.find_rho(count, state, [0], peak, steps=3)
    with pytest.raises(ValueError, match=r"`rhos`.*above 0"):
        lwsam.find_rho(count, start(0.0), [0], peak, steps=3)
