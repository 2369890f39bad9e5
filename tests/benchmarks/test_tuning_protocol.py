"""Which runs a tuning has, and in which ranges it looks; nothing is trained."""

import math

import numpy as np
import pytest

from lwsam_bench.support.errors import UserError
from lwsam_bench.tuning import results
from lwsam_bench.tuning.methods import BY_NAME, choose, FIVE, GROUPS, METHODS
from lwsam_bench.tuning.protocol import AGAIN, AGAIN_SEEDS, LENGTHS, Protocol, tune
from lwsam_bench.tuning.space import drawn, points, Range, rounds


STEPS = (50, 400)


def asked(method, protocol, draws=0, wanted=None):
    """The runs of a tuning that is the better the nearer a config is to a wanted one."""
    requests = []

    def run(request):
        requests.append(request)
        miss = sum(
            abs(math.log(request.config[name] / value))
            for name, value in (wanted or {}).items()
        )
        return {"validation": {"accuracy": -miss, "loss": 0.0}}

    tune(method.space(STEPS), protocol, draws, method.is_base, run)
    return requests


def in_phase(requests, phase):
    return [request for request in requests if request.phase == phase]


@pytest.mark.parametrize("trials", [2, 6, 16, 32])
@pytest.mark.parametrize("name", ["sgd", "momentum-relative"])
def test_a_tuning_has_as_many_runs_as_it_says(name, trials):
    protocol = Protocol(trials, seeds=5)
    requests = asked(BY_NAME[name], protocol)
    assert len(requests) == protocol.runs(base=name == "sgd")
    assert len({request.key for request in requests}) == len(requests)
    assert len(in_phase(requests, "trial")) == trials == sum(rounds(trials))
    again = in_phase(requests, "again")
    assert len(again) == min(AGAIN, trials) * AGAIN_SEEDS
    lengths = {request.length for request in in_phase(requests, "final")}
    assert lengths == (set(LENGTHS) if name == "sgd" else {1.0})


def test_seeds_are_paired_and_none_is_used_twice():
    protocol = Protocol(8, seeds=5)
    tuning, final = [], []
    for draws in range(2):
        for name in ("sgd", "sam"):
            requests = asked(BY_NAME[name], protocol, draws)
            tuning.append({r.seed for r in requests if r.phase != "final"})
            final.append({r.seed for r in in_phase(requests, "final")})
    assert final == [set(range(5))] * 4
    assert tuning[0] == tuning[1]
    assert tuning[2] == tuning[3]
    assert not tuning[0] & tuning[2]
    assert not (tuning[0] | tuning[2]) & final[0]


def test_all_methods_try_the_same_learning_rates_decays_and_steps():
    space = BY_NAME["sgd"].space(STEPS)
    for method in METHODS:
        if method.family == "sgd":
            for number, point in enumerate(points(16, draws=1)):
                mine = drawn(method.space(STEPS), point, number)
                theirs = drawn(space, point, number)
                assert {name: mine[name] for name in space} == theirs


def test_sets_of_draws_differ_and_more_points_begin_with_fewer():
    assert np.array_equal(points(16, 0)[:6], points(6, 0))
    assert not np.any(points(16, 0) == points(16, 1))


def test_the_best_three_run_again_and_the_best_of_them_at_last():
    lucky = 5  # the best on the seed of the trials, and bad on all others
    accuracy = lambda trial, seed: (
        (1.0 if seed == 1000 else 0.0) if trial == lucky else 0.5 + trial / 100
    )
    requests = []

    def run(request):
        requests.append(request)
        validation = accuracy(request.trial, request.seed)
        return {"validation": {"accuracy": validation, "loss": None}}

    tune(BY_NAME["sam"].space(STEPS), Protocol(8, 2), 0, False, run)
    assert {r.trial for r in in_phase(requests, "again")} == {lucky, 6, 7}
    assert {r.trial for r in in_phase(requests, "final")} == {7}


def test_an_optimum_at_the_edge_widens_its_range_twice_at_most():
    method = BY_NAME["sam"]
    radius = method.radius
    requests = asked(method, Protocol(32), wanted={"rho": 100 * radius.high})
    highs = [r.space["rho"].high for r in in_phase(requests, "trial")]
    assert highs[:16] == [radius.high] * 16
    assert highs[16] > radius.high
    assert highs[24] > highs[16]
    assert len(set(highs)) == 3
    assert all(r.config["rho"] >= 0.99 * radius.high for r in requests[16:24])
    # The other end stays, and so do the steps.
    assert {r.space["rho"].low for r in requests} == {radius.low}
    assert {(r.space["steps"].low, r.space["steps"].high) for r in requests} == {STEPS}


def test_steps_never_widen_and_a_good_optimum_widens_nothing():
    requests = asked(BY_NAME["sgd"], Protocol(32), wanted={"steps": 10_000})
    assert max(r.config["steps"] for r in requests) <= STEPS[1]
    within = {"lr": 0.1, "weight_decay": 2e-3}
    requests = asked(BY_NAME["sgd"], Protocol(32), wanted=within)
    assert {r.space["lr"].high for r in requests} == {0.5}


def test_two_wider_ranges_are_looked_at_in_turn():
    space = {name: Range(1.0, 10.0).after(10.0) for name in ("a", "b")}
    for number, point in enumerate(points(8, 0)):
        config = drawn(space, point, number)
        assert config["ab"[number % 2]] >= 9.99
    assert min(drawn(space, p, 0)["b"] for p in points(8, 0)) < 9


def test_a_range_has_its_ends():
    within = Range(0.01, 1.0)
    assert within.at(0.0) == 0.01
    assert within.at(0.5) == pytest.approx(0.1)
    assert within.at(1.0) == 1.0
    assert within.place(within.at(0.3)) == pytest.approx(0.3, abs=1e-3)
    assert Range(50, 400, whole=True).at(0.123) == 65
    lower = within.after(0.01)
    assert (lower.low < 0.01, lower.high, lower.widenings) == (True, 1.0, 1)
    assert lower.at(1.0) == pytest.approx(0.01)
    assert lower.after(lower.low).after(0.0001).widenings == 2


def test_radii_reach_down_to_a_tenth_of_where_one_would_begin():
    for method in METHODS:
        if method.radius is not None:
            assert method.radius.high / method.radius.low >= 20


def test_methods_are_chosen_by_name_and_by_group():
    assert [m.name for m in choose(["sam", "sgd", "sgd"])] == ["sgd", "sam"]
    assert [m.name for m in choose(["five"])] == [m for m in BY_NAME if m in FIVE]
    assert choose(["all"]) == METHODS
    assert all(name in BY_NAME for group in GROUPS.values() for name in group)
    with pytest.raises(UserError, match="unknown nonsense"):
        choose(["sgd", "nonsense"])


def test_a_row_of_another_range_is_refused():
    (request,) = asked(BY_NAME["sgd"], Protocol(2))[:1]
    row = {
        "method": "sgd",
        "phase": "trial",
        "trial": 0,
        "seed": request.seed,
        "length": 1.0,
        "config": {**request.config, "lr": 7.0},
    }
    with pytest.raises(UserError, match=r"drawn from other ranges \(lr: 7.0 -> "):
        results.lookup([row], request)
    assert results.lookup([{**row, "config": request.config}], request) is not None
    assert results.lookup([], request) is None
