"""Which executable runs: covers, the sets that the history calls for, eviction."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

import lwsam_jax as lwsam
from lwsam_jax._executables import Executables


L = 8
LAYERS = lwsam.Layers.of([jnp.ones((2, 2)) for _ in range(L)])
# The price grows towards the input: reach of the deepest cut, plus weight gradients.
WEIGHT = 0.05


def ratio(cover):
    depths = [LAYERS.depth[LAYERS.names.index(name)] for name in cover.names]
    return 1.0 + ((L - min(depths)) / L * 0.6 + WEIGHT * len(depths) if depths else 0.0)


def make(exact_sets=4, bound=None, at_most_own=False):
    ran = []

    def build(cover):
        def step(*args):
            ran.append(cover)
            return args

        return step

    return Executables(LAYERS, ratio, build, exact_sets, bound, at_most_own), ran


def mask(*indices):
    return np.isin(np.arange(L), indices)


def test_the_first_selection_runs_on_its_cover():
    executables, ran = make()
    executables.run(mask(5, 7), "state")
    assert ran == [lwsam.Cover(LAYERS.from_depth(5))]


def test_an_empty_selection_runs_the_plain_step():
    executables, ran = make()
    executables.run(mask(0), "state")
    executables.run(mask(), "state")
    assert ran[-1] == lwsam.Cover(())


def test_whatever_runs_contains_the_selection():
    executables, ran = make()
    draw = random.Random(0)
    for _ in range(300):
        chosen = draw.sample(range(L), 2)
        executables.run(mask(*chosen), "state")
        assert {LAYERS.names[i] for i in chosen} <= set(ran[-1].names)


def test_executables_are_bounded_by_the_covers_and_the_cap():
    executables, _ = make(exact_sets=2)
    draw = random.Random(1)
    for _ in range(2000):
        executables.run(mask(*draw.sample(range(L), 3)), "state")
    assert len(executables.compiled) <= L + 1 + 2


def test_a_set_that_recurs_gets_an_executable_of_its_own():
    executables, ran = make()
    for _ in range(100):
        executables.run(mask(0, 7), "state")
    assert set(ran[-1].names) == {"0", "7"}
    assert ratio(ran[-1]) < ratio(ran[0])


def test_without_exact_sets_only_covers_run():
    executables, ran = make(exact_sets=0)
    for _ in range(100):
        executables.run(mask(0, 7), "state")
    assert set(ran) == {lwsam.Cover(LAYERS.names)}


def test_an_idle_set_makes_room_for_one_that_is_needed():
    executables, ran = make(exact_sets=1)
    for _ in range(64):
        executables.run(mask(0, 7), "state")
    for _ in range(600):
        executables.run(mask(1, 6), "state")
    assert executables.evictions == 1
    assert set(ran[-1].names) == {"1", "6"}


def test_a_set_that_no_step_uses_is_given_up():
    """Else it would be compiled whenever such a selection comes once more."""
    executables, ran = make()
    for _ in range(4):
        executables.run(mask(0, 7), "state")
    chosen = set(executables._sets)
    assert chosen
    for _ in range(60):
        executables.run(mask(7), "state")
    assert not chosen & set(executables._sets)
    executables.run(mask(0, 7), "state")
    assert ran[-1] == lwsam.Cover(LAYERS.names)


def test_no_step_runs_on_an_executable_above_the_bound():
    bound = ratio(lwsam.Cover(LAYERS.from_depth(5))) - 1
    executables, ran = make(bound=bound)
    executables.run(mask(0), "state")  # not the budget's choice: compiles a dear cover
    for chosen in [(5, 7), (6,), (7,), (6, 7)] * 50:
        executables.run(mask(*chosen), "state")
        assert ratio(ran[-1]) - 1 <= bound + 1e-12


def test_a_restored_history_repeats_the_choices_of_an_unbroken_run():
    draw = random.Random(2)
    masks = [mask(*draw.sample(range(L), 2)) for _ in range(400)]
    unbroken, expected = make()
    for m in masks:
        unbroken.run(m, "state")
    first, _ = make()
    for m in masks[:150]:
        first.run(m, "state")
    second, got = make()
    second.restore(first.history())
    for m in masks[150:]:
        second.run(m, "state")
    assert got == expected[150:]


def test_compiling_is_counted_and_reported():
    executables, _ = make()
    executables.run(mask(7), "state")
    assert executables.compile_seconds > 0
    assert executables.evictions == 0


def test_sets_settle_early():
    """After the reviews up to step 192 hardly a step waits for a compilation."""
    executables, _ = make(exact_sets=8)
    draw = random.Random(3)
    waits = []
    for step in range(400):
        before = len(executables.compiled) + executables.evictions
        chosen = [0] * (draw.random() < 0.5) + draw.sample(range(3, L), 3)
        executables.run(mask(*chosen), "state")
        if len(executables.compiled) + executables.evictions > before:
            waits.append(step)
    assert sum(step >= 200 for step in waits) < 4


def test_no_step_costs_more_than_its_own_cover():
    """A mean that is kept by charging covers would be exceeded otherwise."""
    executables, ran = make(at_most_own=True)
    draw = random.Random(4)
    for _ in range(200):
        chosen = draw.sample(range(L), 2)
        executables.run(mask(*chosen), "state")
        own = lwsam.Cover(LAYERS.from_depth(min(LAYERS.depth[i] for i in chosen)))
        assert ratio(ran[-1]) <= ratio(own)


def test_a_step_that_raises_leaves_everything_as_it_was():
    def build(cover):
        def step(fails):
            if fails:
                raise KeyError("image")

        return step

    executables = Executables(LAYERS, ratio, build, exact_sets=4)
    for before in (None, 7):
        if before is not None:
            executables.run(mask(before), False)
        history = executables.history()
        with pytest.raises(KeyError, match="image"):
            executables.run(mask(2), True)
        assert executables.history() == history


def test_what_is_remembered_is_bounded():
    many = lwsam.Layers.of([jnp.ones((2, 2)) for _ in range(30)])
    draw = random.Random(5)
    for exact_sets in (0, 2):
        executables = Executables(
            many, lambda cover: 1.0, lambda cover: lambda: None, exact_sets
        )
        for _ in range(3000):
            executables.run(np.isin(np.arange(30), draw.sample(range(30), 4)))
        most = 0 if not exact_sets else 1024
        assert len(executables.history()["counts"]) <= most


def test_a_history_replaces_what_was_there():
    """Else the way back to an older checkpoint would not repeat its run."""
    executables, _ = make()
    draw = random.Random(6)
    masks = [mask(0, *draw.sample(range(3, L), 2)) for _ in range(200)]
    for m in masks[:60]:
        executables.run(m, "state")
    history = executables.history()
    for m in masks[60:]:
        executables.run(m, "state")
    assert executables.history() != history
    executables.restore(history)
    assert executables.history() == history
    spent = executables.compile_seconds
    for m in masks[:60]:
        executables.run(m, "state")
    assert executables.compile_seconds == spent  # all of it was compiled before


def test_a_history_is_taken_over_within_the_cap():
    executables, _ = make(exact_sets=8)
    draw = random.Random(7)
    for _ in range(200):
        executables.run(mask(0, *draw.sample(range(3, L), 2)), "state")
    history = executables.history()
    for cap in (0, 1):
        fewer, _ = make(exact_sets=cap)
        fewer.restore(history)
        assert len(fewer.history()["sets"]) == cap
        covers = [lwsam.Cover(LAYERS.from_depth(d)) for d in range(L + 1)]
        assert sum(cover not in covers for cover in fewer.compiled) <= cap


@pytest.mark.parametrize("exact_sets", [-1, 1.5])
def test_a_wrong_cap_is_refused(exact_sets):
    import optax

    method = lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8)
    with pytest.raises((TypeError, ValueError), match="exact_sets"):
        lwsam.TrainStep(lambda *a: a, optax.sgd(0.1), method, exact_sets=exact_sets)
