"""TrainStep(on_nonfinite="skip"): a step that is not finite is as if it never was."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import lwsam_jax as lwsam
from devices import DEVICES, needs_eight
from plain import assert_close


KEY = jax.random.key(3)
PARAMS = {
    "first": {"bias": jnp.zeros(5), "kernel": jnp.full((4, 5), 0.3)},
    "last": {"bias": jnp.zeros(2), "kernel": jnp.eye(5, 2)},
}
BAD = (2, 3, 5)  # of the steps of a run
STEPS = 8


def batch(i, fault=None):
    """One example of sixteen may be at fault, so only one device of eight sees it."""
    key = jax.random.fold_in(jax.random.key(7), i)
    x = jax.random.normal(key, (16, 4))
    y = jnp.stack([jnp.sin(x[:, 0]), x[:, 1] * x[:, 2]], 1)
    return {"x": x if fault is None else x.at[13, 1].set(fault), "y": y}


def loss_fn(params, model_state, batch, key):
    del key
    h = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
    logits = h @ params["last"]["kernel"] + params["last"]["bias"]
    losses = jnp.sum((logits - batch["y"]) ** 2, 1)
    running = 0.9 * model_state["running"] + 0.1 * jnp.mean(h, 0)
    state = {"running": running, "calls": model_state["calls"] + 1}
    return jnp.mean(losses), (state, {"losses": losses})


def make(method, loss=loss_fn, base=None, **options):
    options = {"on_nonfinite": "skip", **options}
    base = optax.adam(1e-2) if base is None else base
    return lwsam.TrainStep(loss, base, method, **options)


def start(step):
    model_state = {"running": jnp.zeros(5), "calls": jnp.zeros((), jnp.int32)}
    return step.init(PARAMS, model_state, batch(0), key=KEY)


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def run(step, batches):
    """The state after each step, and its info."""
    state, found = start(step), []
    for x in batches:
        state, info = step(state, x)
        found.append((copied(state), info))
    return found


def what_stays(state):
    """All but counters, the key, and the masks of steps to come."""
    kept = state.method_state
    return (
        state.params,
        state.model_state,
        state.opt_state,
        (kept.norms, kept.value, kept.memory, kept.ascent, kept.select),
    )


METHODS = {
    "plain": lambda: lwsam.sam(0.0),
    "layerwise": lambda: lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8),
    "sam": lambda: lwsam.sam(0.1),
    "gsam": lambda: lwsam.gsam(0.1, 0.4),
    "looksam": lambda: lwsam.looksam(0.1, period=2),
    "friendly": lambda: lwsam.friendly_sam(0.1),
    "esam": lambda: lwsam.esam(0.1),
    "gate": lambda: lwsam.ae_sam(0.1, STEPS),
    "momentum": lambda: lwsam.Method(
        lwsam.top_k(1), rho=0.1, ascent=lwsam.momentum(), shape=lwsam.relative()
    ),
    "previous": lambda: lwsam.Method(
        lwsam.everything(), rho=0.1, ascent=lwsam.previous()
    ),
    "random": lambda: lwsam.Method(lwsam.everything(), rho=0.1, ascent=lwsam.random()),
    "micro": lambda: lwsam.Method(
        lwsam.everything(), rho=0.1, ascent=lwsam.micro_batch(0.25)
    ),
    "bandit": lambda: lwsam.Method(lwsam.bandit(1), rho=0.1),
    "parts": lambda: lwsam.sam(0.1, split=lwsam.sub_batches(8)),
    "noisy parts": lambda: lwsam.Method(
        lwsam.everything(),
        rho=0.1,
        ascent=lwsam.random(),
        split=lwsam.sub_batches(3, clean=0.5),
    ),
}
DRAWN = (
    "esam",
    "random",
    "micro",
    "bandit",
    "noisy parts",
)  # whose steps draw from their keys


@functools.cache
def faulty_run(name):
    fault = lambda i: (jnp.nan if i % 2 else jnp.inf) if i in BAD else None
    return run(make(METHODS[name]()), [batch(i, fault(i)) for i in range(STEPS)])


@pytest.mark.parametrize("name", METHODS)
def test_a_skip_leaves_all_that_was_learned_and_the_next_step_recovers(name):
    found = faulty_run(name)
    for i, (state, info) in enumerate(found):
        assert int(state.step) == i + 1
        assert int(info.skipped) == int(state.skipped) == sum(j <= i for j in BAD)
        assert bool(info.finite) == (i not in BAD)
        if i in BAD:
            chex.assert_trees_all_equal(what_stays(state), what_stays(found[i - 1][0]))
        else:
            chex.assert_tree_all_finite(what_stays(state))
            assert int(state.model_state["calls"]) == i + 1 - int(state.skipped)
    later = [info.mask for _, info in found[max(BAD) + 1 :]]
    assert np.any(later) == (name != "plain")


@pytest.mark.parametrize(
    "name", sorted(set(METHODS) - set(DRAWN) - {"looksam", "gate"})
)
def test_a_run_with_skips_is_the_run_without_these_batches_bit_for_bit(name):
    """Where nothing is drawn, and nothing follows `state.step`, which went on."""
    good = [batch(i) for i in range(STEPS) if i not in BAD]
    expected, _ = run(make(METHODS[name]()), good)[-1]
    state, _ = faulty_run(name)[-1]
    chex.assert_trees_all_equal(what_stays(state), what_stays(expected))
    np.testing.assert_array_equal(state.method_state.mask, expected.method_state.mask)
    assert int(state.step) == int(expected.step) + len(BAD)


@pytest.mark.parametrize("name", ["layerwise", "looksam", "friendly"])
def test_finite_steps_are_those_of_a_step_that_reports(name):
    batches = [batch(i) for i in range(3)]
    found, _ = run(make(METHODS[name]()), batches)[-1]
    expected, info = run(make(METHODS[name](), on_nonfinite="report"), batches)[-1]
    assert_close(what_stays(found), what_stays(expected), 1e-5)
    assert int(info.skipped) == 0


def test_to_report_is_the_default_and_takes_the_step():
    step = lwsam.TrainStep(loss_fn, optax.sgd(0.1), METHODS["layerwise"]())
    state, info = step(start(step), batch(0, jnp.nan))
    assert not bool(info.finite)
    assert int(info.skipped) == int(state.skipped) == 0
    assert np.any(np.isnan(state.params["last"]["kernel"]))


def steep(params, model_state, batch, key):
    """Overflows as soon as the weights are a little larger."""
    del key
    size = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
    value = jnp.exp(batch["x"][0, 0] * size)
    return value, (model_state, {})


def test_an_overflow_in_the_second_pass_alone_is_skipped():
    """The clean loss is e^36, the perturbed one more than float32 holds."""
    params = {name: jnp.full((2, 2), 1.0) for name in ("v", "w")}
    method = lwsam.LayerwiseSAM(k=1, rho=3.0, alpha=0.8, normalize="selected")
    step = make(method, steep, optax.sgd(1e-3, momentum=0.9))
    calm, wild = ({"x": jnp.full((4, 1), x)} for x in (0.1, 4.5))
    state = step.init(params, {}, calm, key=KEY)
    state, info = step(state, calm)
    assert bool(info.finite)
    before = copied(state)
    state, info = step(state, wild)
    assert np.isfinite(info.value)
    assert not np.isfinite(info.perturbed_value)
    assert not bool(info.finite)
    chex.assert_trees_all_equal(what_stays(state), what_stays(before))
    state, info = step(state, calm)
    assert bool(info.finite)
    assert int(info.skipped) == 1


def test_a_loss_of_inf_with_a_finite_gradient_is_skipped():
    def loss(params, model_state, batch, key):
        value, aux = loss_fn(params, model_state, batch, key)
        return value + batch["more"], aux

    step = make(METHODS["layerwise"](), loss)
    more = lambda x, i: {**batch(i), "more": jnp.float32(x)}
    model_state = {"running": jnp.zeros(5), "calls": jnp.zeros((), jnp.int32)}
    state = step.init(PARAMS, model_state, more(0.0, 0), key=KEY)
    state, _ = step(state, more(0.0, 0))
    before = copied(state)
    state, info = step(state, more(jnp.inf, 1))
    assert int(info.skipped) == 1
    chex.assert_trees_all_equal(what_stays(state), what_stays(before))


def test_an_update_that_overflows_by_itself_is_skipped():
    """The gradient is finite, what the base optimizer makes of it is not."""
    step = make(METHODS["layerwise"](), base=optax.sgd(3e38, momentum=0.9))
    state, info = step(start(step), batch(0))
    state, info = step(state, {**batch(1), "y": 1e3 * batch(1)["y"]})
    assert bool(info.finite)
    assert int(info.skipped) >= 1
    chex.assert_tree_all_finite(state.params)


@pytest.mark.parametrize("options", [{}, {"selection_lag": 2}, {"donate": False}])
def test_the_masks_that_the_host_reads_are_those_of_the_state(options):
    """Also while masks are late: a step that is skipped moves them on all the same."""
    step = make(METHODS["layerwise"](), **options)
    state = start(step)
    for i in range(STEPS):
        wanted = np.asarray(state.method_state.mask)
        state, info = step(state, batch(i, jnp.nan if i in BAD else None))
        assert wanted.any()
        # A NaN perturbs nothing, and so no layer of the mask.
        np.testing.assert_array_equal(info.mask, wanted & (i not in BAD))
    assert int(info.skipped) == len(BAD)


def test_a_scan_skips_as_the_loop_does():
    method = METHODS["layerwise"]
    batches = [batch(i, jnp.nan if i in BAD else None) for i in range(STEPS)]
    expected, _ = run(make(method()), batches)[-1]
    step = make(method())
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    state, infos = step.scan(start(step), stacked)
    np.testing.assert_array_equal(
        infos.skipped, np.cumsum([i in BAD for i in range(STEPS)])
    )
    assert list(infos.finite) == [i not in BAD for i in range(STEPS)]
    chex.assert_trees_all_close(what_stays(state), what_stays(expected), rtol=1e-5)
    chex.assert_tree_all_finite(what_stays(state))


def mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("data",))


@needs_eight
@pytest.mark.parametrize("name", ["layerwise", "momentum", "parts"])
@pytest.mark.parametrize("where", [lambda: "pmap", mesh], ids=["pmap", "mesh"])
def test_all_devices_skip_where_one_sees_a_nan(where, name):
    step = make(METHODS[name](), parallel=where())
    state, found = start(step), []
    for i in range(5):
        state, info = step(state, batch(i, jnp.nan if i in BAD else None))
        found.append(jax.device_get((what_stays(state), info.skipped, state.skipped)))
    assert [int(skipped) for _, skipped, _ in found] == [0, 0, 1, 2, 2]
    chex.assert_trees_all_equal(found[1][0], found[2][0], found[3][0])
    chex.assert_tree_all_finite(found[4][0])
    for leaf in jax.tree.leaves(state.params):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        for shard in shards[1:]:
            np.testing.assert_array_equal(shard, shards[0])
    expected = run(make(METHODS[name]()), [batch(i) for i in (0, 1, 4)])[-1][0]
    chex.assert_trees_all_close(found[4][0], what_stays(expected), rtol=1e-4, atol=1e-6)


def test_a_run_may_begin_to_skip_when_it_is_restored():
    """The state has the same fields, whatever is done about such steps."""
    report = make(METHODS["layerwise"](), on_nonfinite="report")
    state, _ = report(start(report), batch(0))
    skip = make(METHODS["layerwise"]())
    before = copied(state)
    state, info = skip(state, batch(1, jnp.nan))
    assert int(info.skipped) == 1
    chex.assert_trees_all_equal(what_stays(state), what_stays(before))


@pytest.mark.parametrize("value", ["raise", None, True])
def test_on_nonfinite_is_one_of_two(value):
    with pytest.raises(
        ValueError, match="`on_nonfinite` to be one of 'report', 'skip'"
    ):
        make(METHODS["layerwise"](), on_nonfinite=value)


# --- where only one of the two passes is not finite -------------------------------------


def stale(direction):
    class Given(lwsam.Stale):
        """A direction that a batch cannot spoil, but that may be none by itself."""

        def direction(self, kept, opt_state, params, key):
            return jax.tree.map(lambda x: jnp.full_like(x, direction), params)

    return lwsam.Method(lwsam.everything(), rho=0.1, ascent=Given())


def poisoned_part(batch, key):
    """A part of the batch whose own loss is not finite."""
    del key
    return {**batch, "x": batch["x"].at[0].set(jnp.nan)}


ONLY_THE_ASCENT = {
    "stale": lambda: stale(jnp.nan),
    "stale, inf": lambda: stale(jnp.inf),
    "a part of the batch": lambda: lwsam.Method(
        lwsam.everything(), rho=0.1, ascent=poisoned_part
    ),
    "a part of the batch, before a gate": lambda: lwsam.Method(
        lwsam.everything(),
        rho=0.1,
        ascent=poisoned_part,
        when=lwsam.unusual(STEPS),
    ),
    "the shape": lambda: lwsam.Method(
        lwsam.everything(),
        rho=0.1,
        shape=optax.chain(optax.scale(jnp.inf), lwsam.raw()),
    ),
    "the shape's state": lambda: lwsam.Method(
        lwsam.everything(),
        rho=0.1,
        shape=optax.chain(
            optax.stateless(lambda g, _: jax.tree.map(lambda x: x + jnp.inf, g)),
            optax.ema(0.5),
            optax.clip(1.0),
        ),
    ),
    "the radius": lambda: lwsam.Method(
        lwsam.top_k(1), rho=optax.constant_schedule(jnp.inf), combine=lwsam.mix(0.5)
    ),
}


@pytest.mark.parametrize("name", ONLY_THE_ASCENT)
def test_where_only_the_ascent_is_not_finite_the_step_is_plain(name):
    step = make(ONLY_THE_ASCENT[name](), base=optax.sgd(0.1, momentum=0.9))
    plain = make(lwsam.sam(0.0), base=optax.sgd(0.1, momentum=0.9))
    state, expected = start(step), start(plain)
    memory = copied(state.method_state.memory)
    for i in range(3):
        state, info = step(state, batch(i))
        expected, _ = plain(expected, batch(i))
        assert bool(info.finite)
        assert not np.any(info.mask)
        assert float(info.rho) == float(info.perturbation_norm) == 0
    assert int(info.skipped) == 0
    assert_close(state.params, expected.params, 1e-5)
    assert_close(state.model_state, expected.model_state, 1e-5)
    chex.assert_trees_all_equal(state.method_state.memory, memory)


def abyss(params, model_state, batch, key):
    """Finite where the run starts, and nowhere above."""
    value, aux = loss_fn(params, model_state, batch, key)
    return value * jnp.where(value > batch["edge"], jnp.inf, 1.0), aux


WHOLE_CLEAN_GRADIENT = {
    "sam": lambda: lwsam.sam(0.5),
    "gsam": lambda: lwsam.gsam(0.5, 0.4),
    "all": lambda: lwsam.LayerwiseSAM(
        k=1, rho=0.5, alpha=0.8, normalize="full", rule=lwsam.leaves
    ),
    "esam": lambda: lwsam.esam(0.5, keep=1.0),
    "gate": lambda: lwsam.ae_sam(0.5, STEPS),
}


@pytest.mark.parametrize("name", WHOLE_CLEAN_GRADIENT)
def test_where_only_the_descent_is_not_finite_the_clean_gradient_is_used(name):
    """Where it is known of all leaves; it is the plain step's."""
    base = optax.sgd(0.1, momentum=0.9)
    step = make(WHOLE_CLEAN_GRADIENT[name](), abyss, base)
    plain = make(lwsam.sam(0.0), abyss, base)
    first = loss_fn(PARAMS, {"running": jnp.zeros(5), "calls": 0}, batch(0), None)[0]
    given = {**batch(0), "edge": first * 1.001}
    model_state = {"running": jnp.zeros(5), "calls": jnp.zeros((), jnp.int32)}
    init = lambda step: step.init(PARAMS, model_state, given, key=KEY)
    state, info = step(init(step), given)
    expected, wanted = plain(init(plain), given)
    assert bool(info.finite)
    assert int(info.skipped) == 0
    assert not np.any(info.mask)
    assert float(info.value) == float(info.perturbed_value)
    assert float(info.gap) == float(info.perturbation_norm) == 0
    assert_close(state.params, expected.params, 1e-5)
    assert_close(state.model_state, expected.model_state, 1e-5)
    np.testing.assert_allclose(info.value, wanted.value, rtol=1e-6)


@pytest.mark.parametrize("covers", [1, 4])
def test_what_an_executable_may_know_beyond_the_mask_decides_nothing(covers):
    """One of the layers is perturbed: skipped, whatever the scan was compiled for."""
    method = lwsam.LayerwiseSAM(k=1, rho=5.0, alpha=0.8, rule=lwsam.leaves)
    step = make(method, abyss, optax.sgd(0.1))
    first = loss_fn(PARAMS, {"running": jnp.zeros(5), "calls": 0}, batch(0), None)[0]
    given = {**batch(0), "edge": first * 1.0001}
    model_state = {"running": jnp.zeros(5), "calls": jnp.zeros((), jnp.int32)}
    state = step.init(PARAMS, model_state, given, key=KEY)
    stacked = jax.tree.map(lambda x: x[None], given)
    state, infos = step.scan(state, stacked, covers=covers)
    assert list(infos.skipped) == [1]
    chex.assert_trees_all_equal(state.params, PARAMS)


def test_a_step_that_only_reports_is_not_changed_by_any_of_this():
    """The perturbation that is not finite is taken, and seen."""
    step = make(ONLY_THE_ASCENT["stale"](), on_nonfinite="report")
    _, info = step(start(step), batch(0))
    assert not bool(info.finite)
    assert np.all(info.mask)
