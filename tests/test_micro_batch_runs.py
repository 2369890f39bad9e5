"""What a step with a part of the batch reports, resumes and refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
import reference
from devices import needs_eight
from micro_batch_task import (
    BATCHES,
    KEY,
    loss_fn_over_devices,
    method,
    PARALLEL,
    PARTS,
    run,
    SEVERAL,
    start,
)
from plain import enable_x64
from walk_parts import base_optimizer, differs, from_tree, loss_fn, mean_loss


# --- what a step reports --------------------------------------------------------------


def noisy_loss(params, model_state, batch, key):
    """Its draw, the number of its rows and its point can be read from outside."""
    drawn = jax.random.uniform(key)
    kernel = params["kernel"]
    loss = drawn + 0.01 * jnp.mean((batch["x"] @ kernel) ** 2 * batch["scale"])
    model_state = {
        "rows": jnp.int32(len(batch["x"])),
        "mean": 0.5 * model_state["mean"] + 0.5 * jnp.mean(batch["x"], axis=0),
    }
    return loss, (model_state, {"drawn": drawn, "point": kernel})


NOISY_BATCH = {
    "x": np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32),
    "scale": np.float32(2.0),
}


def noisy_step(ascent, parallel=None, **changes):
    ours = method(ascent, **{"shape": lwsam.relative(), **changes})
    step = lwsam.TrainStep(noisy_loss, optax.sgd(0.1, momentum=0.9), ours, parallel)
    model_state = {"rows": jnp.int32(0), "mean": jnp.zeros(3)}
    params = {"kernel": jnp.ones((3, 2))}
    return step, step.init(params, model_state, NOISY_BATCH, key=KEY)


@pytest.mark.parametrize(
    "parallel",
    [p if p == "one device" else pytest.param(p, marks=needs_eight) for p in PARALLEL],
)
def test_both_passes_draw_from_one_key(parallel):
    step, state = noisy_step(lwsam.micro_batch(0.5), PARALLEL[parallel]())
    draws = []
    for _ in range(3):
        before = np.asarray(state.params["kernel"])
        state, info = step(state, NOISY_BATCH)
        draws.append(float(info.metrics["drawn"]))
        if parallel == "one device":
            rows = [slice(0, 8), slice(8, 16)]
            x, scale = NOISY_BATCH["x"], NOISY_BATCH["scale"]
            rest = [0.01 * np.mean((x[r] @ before) ** 2 * scale) for r in rows]
            left = [float(info.ascent_value) - draws[-1] - r for r in rest]
            assert min(map(abs, left)) < 1e-6
        else:  # the draws differ among devices, and their mean is the same in both
            small = float(info.ascent_value) - draws[-1]
            other = float(info.perturbed_value) - draws[-1]
            assert 0 < small < 0.4
            assert 0 < other < 0.4
    assert len(set(draws)) == 3


def test_what_is_reported_is_that_of_the_descent():
    step, state = noisy_step(lwsam.micro_batch(0.25))
    for _ in range(2):
        before = np.asarray(state.params["kernel"])
        mean = np.asarray(state.model_state["mean"])
        state, info = step(state, NOISY_BATCH)
        assert info.value == info.perturbed_value != info.ascent_value
        moved = np.asarray(info.metrics["point"]) - before
        size = np.linalg.norm(before)
        np.testing.assert_allclose(np.linalg.norm(moved), PARTS.rho * size, rtol=1e-5)
        assert state.model_state["rows"] == 16
        expected = 0.5 * mean + 0.5 * NOISY_BATCH["x"].mean(axis=0)
        np.testing.assert_allclose(state.model_state["mean"], expected, rtol=1e-5)


def test_the_whole_batch_reports_one_clean_value():
    step, state = noisy_step(lwsam.whole_batch())
    before = np.asarray(state.params["kernel"])
    _, info = step(state, NOISY_BATCH)
    assert info.ascent_value == info.value != info.perturbed_value
    np.testing.assert_array_equal(info.metrics["point"], before)


@pytest.mark.parametrize("ascent", [lwsam.momentum(), lwsam.previous(), lwsam.random()])
def test_without_a_pass_there_is_no_ascent_value(ascent):
    step, state = noisy_step(ascent, combine=lwsam.descend())
    for _ in range(2):
        state, info = step(state, NOISY_BATCH)
        assert info.ascent_value is None
        assert info.value == info.perturbed_value


def test_a_step_costs_what_it_sees():
    step, state = noisy_step(lwsam.micro_batch(0.25))
    _, info = step(state, NOISY_BATCH)
    names = step.layers.names
    assert info.overhead == pytest.approx(step.cost.ratio(names, 0.25) - 1)
    assert 0 < info.overhead <= 0.25


# --- runs that were cut off -----------------------------------------------------------


RESUMED = {
    "micro_batch": lambda: method(lwsam.micro_batch(0.25), shape=lwsam.relative()),
    "function": lambda: method(
        lambda batch, key: jax.tree.map(
            lambda x: x[jax.random.permutation(key, 2)[:1]] if x.ndim else x, batch
        )
    ),
    "random": lambda: method(lwsam.random(), combine=lwsam.descend()),
    "momentum": lambda: method(lwsam.momentum(), combine=lwsam.descend()),
    "previous": lambda: method(lwsam.previous(), combine=lwsam.descend()),
    "chain": lambda: method(
        lwsam.micro_batch(0.25),
        shape=optax.chain(optax.trace(0.5), lwsam.normalized()),
    ),
    "reuse": lambda: method(
        lwsam.micro_batch(0.25), combine=lwsam.reuse(0.7), when=lwsam.every(2)
    ),
}


def frozen(state):
    """As a checkpoint has it: arrays of NumPy, and the layers' node as it is."""
    keyless = state._replace(key=jax.random.key_data(state.key))
    return jax.tree.map(lambda x: np.array(x), jax.device_get(keyless))


def thawed(state):
    state = jax.tree.map(jnp.asarray, state)
    return state._replace(key=jax.random.wrap_key_data(state.key))


@pytest.mark.parametrize(
    ("name", "parallel"),
    [(name, "one device") for name in RESUMED]
    + [pytest.param("random", p, marks=needs_eight) for p in SEVERAL]
    + [pytest.param("function", p, marks=needs_eight) for p in SEVERAL],
)
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(name, parallel):
    make = functools.partial(
        lwsam.TrainStep, loss_fn_over_devices, base_optimizer(), RESUMED[name]()
    )
    params = jax.tree.map(jnp.float32, to_tree_f32())
    batches = [(x.astype(np.float32), y) for x, y in BATCHES]
    step = make(PARALLEL[parallel]())
    state = step.init(params, jnp.int32(0), batches[0], key=KEY)
    for number, batch in enumerate(batches):
        state, _ = step(state, batch)
        if number == 1:
            saved = frozen(state)
    del step
    again, fresh = thawed(saved), make(PARALLEL[parallel]())
    for batch in batches[2:]:
        again, _ = fresh(again, batch)
    ours, theirs = jax.tree.leaves(frozen(state)), jax.tree.leaves(frozen(again))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def to_tree_f32():
    tree = {}
    for path, leaf in reference.mlp_params().items():
        layer, key = path.split("/")
        tree.setdefault(layer, {})[key] = np.float32(leaf)
    return tree


def test_a_scan_takes_the_same_examples_as_the_loop():
    make = lambda: lwsam.TrainStep(
        loss_fn, base_optimizer(), method(lwsam.micro_batch(0.25))
    )
    found = run(make())
    step = make()
    with enable_x64(True):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *BATCHES)
        state, infos = step.scan(start(step), stacked)
        np.testing.assert_allclose(
            infos.ascent_value, [info.ascent_value for *_, info in found], rtol=1e-9
        )
        assert not differs(from_tree(state.params), from_tree(found[-1][0]))


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "ascent", "message"),
    [
        ("one device", lwsam.micro_batch(0.05), r"0\.05, which is 0 of 16 examples"),
        (
            "one device",
            lwsam.micro_batch(size=17),
            r"size=17, which is 17 of 16 examples",
        ),
        pytest.param(
            "mesh",
            lwsam.micro_batch(0.4),
            r"0\.4, which is 0 of 2 examples on each of 8 devices",
            marks=needs_eight,
        ),
        pytest.param(
            "pmap",
            lwsam.micro_batch(size=7),
            r"size=7, which is 0 of 2 examples on each of 8 devices",
            marks=needs_eight,
        ),
    ],
)
def test_a_share_without_an_example_raises_with_the_numbers(parallel, ascent, message):
    with pytest.raises(
        ValueError, match=rf"`(fraction|size)`.*{message}\. .*Take a larger"
    ):
        noisy_step(ascent, PARALLEL[parallel]())


def test_a_leaf_with_another_first_axis_is_named():
    batch = {"x": jnp.ones((8, 3)), "y": jnp.ones(8), "table": jnp.ones((5, 2))}
    with pytest.raises(ValueError, match=r"8 examples.*\['table'\].*is 5.*constant"):
        lwsam.micro_batch(0.5).of(batch, KEY)
    step = lwsam.TrainStep(
        lambda p, m, b, k: (jnp.sum(p["w"]) * jnp.mean(b["x"]), (m, {})),
        optax.sgd(0.1),
        method(lwsam.micro_batch(0.5)),
    )
    with pytest.raises(ValueError, match=r"\['table'\]"):
        step.init({"w": jnp.ones((2, 2))}, {}, batch, key=KEY)


def test_a_batch_without_examples_is_refused():
    with pytest.raises(ValueError, match="`batch`.*batch axis"):
        lwsam.micro_batch(0.5).of({"scale": jnp.float32(1.0)}, KEY)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "`fraction`.*neither"),
        ({"fraction": 0.5, "size": 3}, ValueError, "`fraction`.*both"),
        ({"fraction": 0.0}, ValueError, r"`fraction`.*\(0, 1\]"),
        ({"fraction": 1.5}, ValueError, r"`fraction`.*\(0, 1\]"),
        ({"fraction": float("nan")}, ValueError, r"`fraction`.*\(0, 1\]"),
        ({"fraction": "0.1"}, ValueError, r"`fraction`.*\(0, 1\]"),
        ({"fraction": True}, ValueError, r"`fraction`.*\(0, 1\]"),
        ({"size": 0}, ValueError, "`size`"),
        ({"size": -1}, ValueError, "`size`"),
        ({"size": 2.5}, TypeError, "`size`.*integer"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        lwsam.micro_batch(**arguments)


def test_the_functional_form_has_to_be_told_what_the_ascent_sees():
    fn = lwsam.value_and_grad(
        mean_loss, ("a_out",), method=method(lwsam.micro_batch(0.5))
    )
    with pytest.raises(TypeError, match="`ascent_args`.*Pass ascent_args="):
        fn(to_tree_f32(), BATCHES[0])


@pytest.mark.parametrize("form", ["value_fn", "grad_fn"])
def test_and_so_has_the_transformation(form):
    tx = lwsam.as_optax(method(lwsam.micro_batch(0.5)))
    params = jax.tree.map(jnp.asarray, to_tree_f32())
    loss = lambda p: mean_loss(p, BATCHES[0])
    extra = {form: loss if form == "value_fn" else jax.grad(loss)}
    with pytest.raises(ValueError, match="`ascent_value_fn`.*Pass value_fn="):
        tx.update(params, tx.init(params), params, **extra)
