"""What a step says of itself: gap, norm of the perturbation, cosine; and their price."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from plain import assert_close, global_norm
from test_nonfinite import (
    batch,
    KEY,
    loss_fn,
    make,
    METHODS,
    PARAMS as SYMMETRIC,
    run,
    start,
)


RADIUS = 1.5
PARAMS = jax.tree.map(
    lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), SYMMETRIC
)


def by_hand(selected, rho, data):
    """Gap, norm and cosine of one step from PARAMS, in two plain gradients."""
    model_state = {"running": jnp.zeros(5), "calls": jnp.zeros((), jnp.int32)}
    value_of = lambda p: loss_fn(p, model_state, data, KEY)[0]
    value, grads = jax.value_and_grad(value_of)(PARAMS)
    part = lambda tree: [tree[layer][leaf] for layer, leaf in selected]
    size = global_norm(part(grads))
    moved = jax.tree.map(jnp.copy, PARAMS)
    for layer, leaf in selected:
        moved[layer][leaf] += rho * grads[layer][leaf] / size
    perturbed, descent = jax.value_and_grad(value_of)(moved)
    product = sum(
        jnp.vdot(a, b) for a, b in zip(part(grads), part(descent), strict=True)
    )
    cosine = product / size / global_norm(part(descent))
    return perturbed - value, rho, cosine


ALL = [(layer, leaf) for layer in PARAMS for leaf in PARAMS[layer]]
LAST = [("last", "kernel")]


@pytest.mark.parametrize("parallel", [None, "pmap"])
def test_they_are_those_of_two_plain_gradients(parallel):
    cases = [
        (lwsam.sam(RADIUS), ALL),
        (lwsam.LayerwiseSAM(k=1, rho=RADIUS, alpha=0.8, normalize="selected"), LAST),
    ]
    for method, selected in cases:
        step = make(method, parallel=parallel, on_nonfinite="report")
        state = start(step)._replace(params=jax.tree.map(jnp.copy, PARAMS))
        _, info = step(state, batch(0))
        found = (info.gap, info.perturbation_norm, info.cosine)
        wanted = by_hand(selected, RADIUS, batch(0))
        np.testing.assert_allclose(found, wanted, rtol=2e-4)
        assert float(info.cosine) < 0.999, "the test could not tell"


def test_a_mask_within_a_cover_counts_what_it_picks():
    """As the tuple does, and as no mask that picks nothing does."""
    names = lwsam.Layers.of(PARAMS).names
    model_state = {"running": jnp.zeros(5), "calls": jnp.zeros((), jnp.int32)}
    form = functools.partial(
        lwsam.value_and_grad, loss_fn, method=lwsam.sam(0.4, rule=None), has_aux=True
    )
    args = (PARAMS, model_state, batch(0), KEY)
    exact = jax.jit(form(("last",)))(*args)
    cover = jax.jit(form(lwsam.Cover(names)))
    mask = jnp.asarray([name == "last" for name in names])
    some, none = (cover(*args, mask=m) for m in (mask, jnp.zeros_like(mask)))
    what = lambda out: (out.perturbation_norm, out.cosine, out.finite)
    chex.assert_trees_all_close(what(some), what(exact), rtol=1e-5)
    assert [float(x) for x in what(none)] == [0, 1, 1]
    np.testing.assert_array_equal(some.mask, mask)
    assert not np.any(none.mask)
    plain = jax.jit(form(()))(*args)
    assert [float(x) for x in what(plain)] == [0, 1, 1]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_those_that_it_can_have(name):
    """The gap needs both losses on one batch, the cosine a gradient of the ascent."""
    (_, info), *_ = run(make(METHODS[name]()), [batch(0)])
    stale = name in ("momentum", "previous", "random", "noisy parts")
    gap, cosine = not (stale or name == "micro"), not stale
    assert (info.gap is not None) == gap
    assert (info.cosine is not None) == cosine
    if gap:
        assert float(info.gap) == float(info.perturbed_value - info.value)
    assert float(info.perturbation_norm) >= 0
    # The moment and the gradient before are 0 at first.
    at_rest = name in ("plain", "momentum", "previous")
    assert (float(info.perturbation_norm) == 0) == at_rest


def test_an_infinite_ascent_is_seen_through_a_shape_that_hides_it():
    """A sign is finite, whatever it is of."""
    sign = optax.stateless(lambda g, params: jax.tree.map(jnp.sign, g))
    method = lwsam.Method(lwsam.everything(), rho=1e-3, shape=sign)
    loss = lambda p: jnp.sum(jnp.sqrt(p["w"])) + jnp.sum(p["w"] ** 2)
    out = lwsam.value_and_grad(loss, ("w",), method=method)(
        {"w": jnp.zeros((2, 2)).at[0, 0].set(1.0)}
    )
    assert np.isfinite(out.value)
    assert np.isfinite(out.perturbed_value)
    assert np.all(np.isfinite(out.grads["w"]))
    assert not bool(out.finite)


# --- their price ------------------------------------------------------------------------


def conv_loss(params, model_state, batch, key):
    del key
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    h = batch["x"]
    for name in ("a", "b", "c"):
        h = jax.nn.relu(conv(h, params[name], (1, 1)))
    logits = jnp.mean(h, (1, 2)) @ params["d"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return jnp.mean(losses), (model_state, {})


def test_they_cost_less_than_a_thousandth():
    """FLOPs by XLA of a compiled step, against one whose info has none of them."""
    sizes = {"a": (3, 3, 3, 8), "b": (3, 3, 8, 8), "c": (3, 3, 8, 8), "d": (8, 4)}
    params = {
        name: jax.random.normal(jax.random.key(i), shape) / 8
        for i, (name, shape) in enumerate(sizes.items())
    }
    data = {
        "x": jax.random.normal(KEY, (32, 12, 12, 3)),
        "y": jnp.zeros(32, jnp.int32),
    }
    form = lwsam.value_and_grad(
        conv_loss, tuple(sizes), method=lwsam.sam(0.05), has_aux=True
    )

    def compiled(select):
        run = lambda params, data: select(form(params, {}, data, KEY))
        return jax.jit(run).lower(params, data).compile()

    def flops(executable):
        analysis = executable.cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    nothing = {"perturbation_norm": None, "cosine": None, "finite": None}
    whole = compiled(lambda out: (out, out.perturbed_value - out.value))
    bare = compiled(lambda out: out._replace(**nothing))
    assert flops(bare) < flops(whole) < 1.001 * flops(bare)
    # And nothing else depends on whether they are read.
    found, _ = whole(params, data)
    assert_close(found._replace(**nothing), bare(params, data), 1e-6)
