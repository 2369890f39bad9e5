"""The library against the paper's equations in float64 NumPy, over many steps."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
import reference
from plain import enable_x64
from reference import LEAVES, MLP_LAYERS, WEIGHTS


STEPS = 30
HYPER = {"k": 2, "r": 0.3, "alpha": 0.8, "learning_rate": 0.3, "momentum": 0.9}
FORMS = ("grad_fn exact", "grad_fn cover", "grad_fn traced")
FORMS += tuple(form.replace("grad", "value") for form in FORMS)


# --- the oracle itself ----------------------------------------------------------------


def test_the_gradient_written_by_hand_is_the_slope_of_the_value():
    params, batch = reference.mlp_params(), reference.mlp_batches(1)[0]
    _, grads = reference.mlp_value_and_grad(params, batch)
    rng = np.random.default_rng(2)
    for name, leaf in params.items():
        direction = rng.normal(size=leaf.shape)
        ends = [
            reference.mlp_value_and_grad(
                {**params, name: leaf + step * direction}, batch
            )[0]
            for step in (1e-5, -1e-5)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(grads[name] * direction), slope, rtol=1e-7)


def test_on_a_quadratic_the_oracle_has_the_closed_form():
    """L = w.T A w / 2 with P onto w': d = A w' + (1-a) P A w, w' = w + r P A w."""
    rng = np.random.default_rng(3)
    root = rng.normal(size=(7, 7))
    matrix = root @ root.T
    w = rng.normal(size=7)
    params = {"first": w[:3], "second": w[3:]}
    project = np.diag([1.0] * 3 + [0.0] * 4)
    _, _, grads, descent = reference.penalized_gradient(
        reference.quadratic(matrix), params, None, ["first"], r=0.2, alpha=0.7
    )
    moved = w + 0.2 * project @ matrix @ w
    expected = matrix @ moved
    np.testing.assert_allclose(np.concatenate(list(descent.values())), expected)
    mixed = expected + 0.3 * project @ (matrix @ w - expected)
    np.testing.assert_allclose(np.concatenate(list(grads.values())), mixed)


def test_the_oracle_gives_ties_to_the_deepest():
    assert reference.top_k({"x": 0.0, "y": 0.0, "z": 0.0}, 2) == ("y", "z")
    assert reference.top_k({"x": 2.0, "y": 1.0, "z": 1.0}, 2) == ("x", "z")


# --- the library against it -----------------------------------------------------------


def loss_fn(params, batch):
    inputs, labels = batch
    h = inputs
    for name in MLP_LAYERS[:-1]:
        h = jnp.tanh(h @ params[name]["kernel"] + params[name]["bias"])
    last = params[MLP_LAYERS[-1]]
    log_probs = jax.nn.log_softmax(h @ last["kernel"] + last["bias"])
    return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=1))


def to_tree(flat, dtype):
    tree = {name: {} for name in MLP_LAYERS}
    for path, leaf in flat.items():
        name, key = path.split("/")
        tree[name][key] = jnp.asarray(leaf, dtype)
    return tree


def problem(dtype):
    """Parameters and batches, float64 in NumPy and the same numbers in JAX."""
    params = {n: w.astype(dtype) for n, w in reference.mlp_params().items()}
    batches = [(x.astype(dtype), y) for x, y in reference.mlp_batches(STEPS)]
    exact = {name: leaf.astype(np.float64) for name, leaf in params.items()}
    exact_batches = [(x.astype(np.float64), y) for x, y in batches]
    return params, batches, exact, exact_batches


def oracle(dtype, layers=WEIGHTS, **hyper):
    _, _, params, batches = problem(dtype)
    steps = reference.algorithm_1(
        reference.mlp_value_and_grad, params, batches, layers, **{**HYPER, **hyper}
    )
    assert min(step.gap for step in steps) > 1.001, "the selection is a toss-up"
    if layers is WEIGHTS and hyper.get("k", HYPER["k"]) < len(MLP_LAYERS):
        assert len({step.selected for step in steps}) > 1, "the selection never changes"
    return steps


def compare(record, step, dtype):
    """One step's selection, norms, value and parameters, with those of the oracle."""
    rtol = 1e-10 if dtype == np.float64 else 2e-4  # momentum amplifies rounding
    assert set(record["selected"]) == set(step.selected)
    np.testing.assert_allclose(record["value"], step.value, rtol=rtol)
    for name, norm in step.norms.items():
        ours = record["norms"][name.removesuffix("/kernel")]
        np.testing.assert_allclose(ours, norm, rtol=max(rtol, 1e-6))
    for path, leaf in step.params.items():
        name, key = path.split("/")
        ours = np.asarray(record["params"][name][key], np.float64)
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(ours, leaf, rtol=0, atol=rtol * scale, err_msg=path)


def precision(dtype):
    return enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def base_optimizer():
    return optax.sgd(HYPER["learning_rate"], momentum=HYPER["momentum"])


def method_options(layers, hyper):
    """The library's arguments for the oracle's; the paper's r is our rho."""
    hyper = {**HYPER, **hyper}
    names = {"r": "rho", "k": "k", "alpha": "alpha", "normalize": "normalize"}
    options = {ours: hyper[paper] for paper, ours in names.items() if paper in hyper}
    options["rule"] = lwsam.leaves if layers is LEAVES else None
    return options | ({"when": hyper["when"]} if "when" in hyper else {})


def run_transform(form, dtype, layers=WEIGHTS, **hyper):
    """One record a step, from a chain in one of the forms of its update."""
    which, how = form.split()
    params, batches, _, _ = problem(dtype)
    params = to_tree(params, dtype)
    options = method_options(layers, hyper)
    found = lwsam.Layers.of(params, options["rule"], loss_fn, batches[0])
    tx = optax.chain(lwsam.layerwise_sam(**options, layers=found), base_optimizer())

    @functools.partial(jax.jit, static_argnames="selection")
    def update(params, opt_state, batch, selection):
        loss = lambda p: loss_fn(p, batch)
        value, grads = jax.value_and_grad(loss)(params)
        fn = loss if which == "value_fn" else jax.grad(loss)
        updates, opt_state = tx.update(
            grads, opt_state, params, selection=selection, **{which: fn}
        )
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = tx.init(params)
    for batch in batches:
        selected = lwsam.selection(opt_state)
        selection = {
            "exact": selected,
            "cover": lwsam.selection(opt_state, cover="depth"),
            "traced": None,
        }[how]
        params, opt_state, value = update(params, opt_state, batch, selection)
        if which == "value_fn":
            value = lwsam.value(opt_state)
        norms = dict(zip(found.names, np.asarray(opt_state[0].norms), strict=True))
        yield {"selected": selected, "value": value, "norms": norms, "params": params}


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((form, np.float64) for form in FORMS),
        ("value_fn cover", np.float32),
        ("grad_fn traced", np.float32),
    ],
)
def test_transform_follows_algorithm_1(form, dtype):
    with precision(dtype):
        for record, step in zip(run_transform(form, dtype), oracle(dtype), strict=True):
            compare(record, step, dtype)


@pytest.mark.parametrize("normalize", ["selected", "full"])
@pytest.mark.parametrize("form", ["value_fn traced", "grad_fn traced"])
def test_normalized_perturbations_follow_eq_2(form, normalize):
    options = {"normalize": normalize, "r": 0.2}
    steps = oracle(np.float64, **options)
    with precision(np.float64):
        records = run_transform(form, np.float64, **options)
        for record, step in zip(records, steps, strict=True):
            compare(record, step, np.float64)


def test_every_leaf_may_be_a_layer():
    with precision(np.float64):
        records = run_transform("value_fn traced", np.float64, LEAVES, k=3)
        for record, step in zip(records, oracle(np.float64, LEAVES, k=3), strict=True):
            record["selected"] = [
                name if name.endswith("bias") else f"{name}/kernel"
                for name in record["selected"]
            ]
            compare(record, step, np.float64)


def test_schedules_and_when_follow_the_step_count():
    """`when` in the oracle is "k = 0 in the other steps"."""
    rho = lambda step: 0.1 + 0.02 * step
    alpha = lambda step: 0.9 - 0.01 * step
    when = lambda step: step % 3 == 0
    steps = oracle(np.float64, k=2, r=rho, alpha=alpha, when=when)
    with precision(np.float64):
        options = {"r": rho, "alpha": alpha, "when": lwsam.every(3)}
        records = run_transform("value_fn traced", np.float64, **options)
        for record, step in zip(records, steps, strict=True):
            compare(record, step, np.float64)


@pytest.mark.parametrize(
    ("normalize", "dtype"), [("none", np.float64), ("selected", np.float32)]
)
def test_train_step_follows_algorithm_1(normalize, dtype):
    def loss(params, model_state, batch, key):
        del key
        return loss_fn(params, batch), (model_state, {})

    with precision(dtype):
        params, batches, _, _ = problem(dtype)
        options = method_options(WEIGHTS, {"normalize": normalize})
        method = lwsam.LayerwiseSAM(**options)
        step = lwsam.TrainStep(loss, base_optimizer(), method)
        tree = to_tree(params, dtype)
        state = step.init(tree, {}, batches[0], key=jax.random.key(0))
        expected = oracle(dtype, normalize=normalize)
        for batch, exact in zip(batches, expected, strict=True):
            selected = lwsam.selection(state)
            state, info = step(state, batch)
            norms = dict(zip(step.layers.names, np.asarray(info.norms), strict=True))
            assert step.layers.selected(info.mask) == selected
            np.testing.assert_allclose(
                info.perturbed_value, exact.perturbed_value, rtol=3e-5
            )
            record = {"selected": selected, "value": info.value, "norms": norms}
            compare({**record, "params": state.params}, exact, dtype)
