"""Methods of the family as points on the four axes, against oracles in float64 NumPy."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import family
import lwsam_jax as lwsam
import reference
from plain import enable_x64


STEPS = 7
RATE = 0.1
SHAPES = {name: leaf.shape for name, leaf in reference.mlp_params().items()}


def flat(leaves):
    return np.concatenate([np.ravel(leaves[name]) for name in SHAPES])


def unflat(w):
    ends = np.cumsum([np.prod(shape) for shape in SHAPES.values()])
    parts = np.split(w, ends[:-1])
    return {n: p.reshape(s) for (n, s), p in zip(SHAPES.items(), parts, strict=True)}


def gradient(w, batch):
    return flat(reference.mlp_value_and_grad(unflat(w), batch)[1])


def loss_fn(params, model_state, batch, key):
    del key
    h, labels = batch
    for name in reference.MLP_LAYERS:
        h = h @ params[f"{name}/kernel"] + params[f"{name}/bias"]
        h = jnp.tanh(h) if name != reference.MLP_LAYERS[-1] else h
    loss = optax.softmax_cross_entropy_with_integer_labels(h, labels)
    return jnp.mean(loss), (model_state, {})


def run(method, parallel=None, dtype=np.float64):
    """The parameters after each step, as flat vectors."""
    precision = enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
    with precision:
        params = {n: jnp.asarray(x, dtype) for n, x in reference.mlp_params().items()}
        batches = [(x.astype(dtype), y) for x, y in reference.mlp_batches(STEPS)]
        step = lwsam.TrainStep(loss_fn, optax.sgd(RATE), method, parallel)
        state = step.init(params, {}, batches[0], key=jax.random.key(0))
        path = []
        for batch in batches:
            state, info = step(state, batch)
            assert bool(info.finite)
            path.append(flat(state.params))
    return path


def everywhere(**arguments):
    return lwsam.LayerwiseSAM(select=lwsam.everything(), rule=lwsam.leaves, **arguments)


def look_sam(k, **arguments):
    arguments = {"rho": 0.2, "alpha": 1.0, "normalize": "selected", **arguments}
    return everywhere(**arguments, when=lwsam.every(k), reuse=0.7)


def follow_look_sam(k):
    return family.look_sam(
        gradient,
        flat(reference.mlp_params()),
        reference.mlp_batches(STEPS),
        rho=0.2,
        k=k,
        alpha=0.7,
        learning_rate=RATE,
    )


@pytest.mark.parametrize("normalized", [False, True])
def test_generalized_sam(normalized):
    expected = family.generalized_sam(
        gradient,
        flat(reference.mlp_params()),
        reference.mlp_batches(STEPS),
        r=0.1,
        alpha=0.8,
        normalized=normalized,
        learning_rate=RATE,
    )
    normalize = "selected" if normalized else "none"
    ours = run(everywhere(rho=0.1, alpha=0.8, normalize=normalize))
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3])
def test_look_sam(k):
    ours = run(look_sam(k))
    np.testing.assert_allclose(ours, follow_look_sam(k), rtol=1e-9, atol=1e-12)
    # The stored direction is what makes the difference to SAM in every k-th step.
    plain = run(
        everywhere(rho=0.2, alpha=1.0, normalize="selected", when=lwsam.every(k))
    )
    assert np.abs(ours[1] - plain[1]).max() > 1e-3


def test_look_sam_with_an_ascent_in_every_step_is_sam():
    sam = run(everywhere(rho=0.2, alpha=1.0, normalize="selected"))
    np.testing.assert_array_equal(run(look_sam(1)), sam)


def test_look_sam_over_devices():
    ours = run(look_sam(3), parallel="pmap", dtype=np.float32)
    np.testing.assert_allclose(ours, follow_look_sam(3), rtol=1e-4, atol=1e-5)


def test_look_sam_inside_a_compiled_loop():
    with enable_x64(True):
        params = {n: jnp.asarray(x) for n, x in reference.mlp_params().items()}
        batches = jax.tree.map(lambda *xs: np.stack(xs), *reference.mlp_batches(STEPS))
        step = lwsam.TrainStep(loss_fn, optax.sgd(RATE), look_sam(3))
        first = jax.tree.map(lambda x: x[0], batches)
        state = step.init(params, {}, first, key=jax.random.key(0))
        state, infos = step.scan(state, batches)
        last = flat(state.params)
    np.testing.assert_array_equal(infos.mask.all(axis=1), np.arange(STEPS) % 3 == 0)
    np.testing.assert_allclose(last, follow_look_sam(3)[-1], rtol=1e-9, atol=1e-12)


def test_without_a_radius_look_sam_is_the_base_optimizer():
    base = run(lwsam.LayerwiseSAM(k=0, rho=0.0, alpha=1.0))
    np.testing.assert_array_equal(run(look_sam(2, rho=0.0)), base)


def test_the_stored_direction_is_orthogonal_and_there_from_the_start():
    params = {n: jnp.asarray(x) for n, x in reference.mlp_params().items()}
    batch = reference.mlp_batches(1)[0]
    step = lwsam.TrainStep(loss_fn, optax.sgd(RATE), look_sam(3))
    state = step.init(params, {}, batch, key=jax.random.key(0))
    zero = state.method_state.direction
    assert len(zero) == len(params)
    assert not any(np.any(leaf) for leaf in zero)
    state, _ = step(state, batch)
    stored = np.concatenate([np.ravel(x) for x in state.method_state.direction])
    names = sorted(params)
    w = flat({n: np.asarray(x) for n, x in params.items()})
    ascent = unflat(gradient(w, batch))
    ascent = np.concatenate([np.ravel(ascent[n]) for n in names])
    cosine = stored @ ascent / np.linalg.norm(stored) / np.linalg.norm(ascent)
    assert abs(cosine) < 1e-4
    kept = [np.asarray(x) for x in state.method_state.direction]
    state, _ = step(state, batch)  # it reuses, and does not change, what is stored
    for before, after in zip(kept, state.method_state.direction, strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "arguments",
    [
        {"select": lwsam.everything()},
        {"k": 2, "when": lwsam.every(2)},
        {"select": lwsam.everything(), "when": lwsam.every(2), "max_overhead": 0.5},
    ],
    ids=["without when", "of some layers", "with a budget"],
)
def test_where_nothing_could_be_reused_it_is_refused(arguments):
    with pytest.raises(ValueError, match="`reuse`"):
        lwsam.LayerwiseSAM(**arguments, rho=0.1, alpha=1.0, reuse=0.7)


@pytest.mark.parametrize("weight", [-0.1, float("nan")])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match="finite and >= 0"):
        everywhere(rho=0.1, alpha=1.0, when=lwsam.every(2), reuse=weight)
