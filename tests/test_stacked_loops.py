"""What a step on stacked blocks costs, and what it does in loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
import stacked_nets as nets
from plain import assert_close, two_gradients
from stacked_task import flops, HYPER


def cover_from(layers, name):
    return lwsam.Cover(layers.from_depth(layers.depth[layers.names.index(name)]))


# --- what it costs --------------------------------------------------------------------


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_a_decoder_of_twelve_blocks_costs_what_its_twin_does(remat, x64):
    """The top 4 of its 48 weight layers, on the cover of the twin."""
    params = nets.make_params(12, width=16, vocabulary=20, mlp=False)
    tokens = nets.make_tokens(2, 16, 20)
    own, twin = nets.scanned(remat), lambda p, t: nets.twin(p, t, remat)
    pair = nets.unstack(params)
    cost, other = (
        lwsam.step_cost(own, params, tokens),
        lwsam.step_cost(twin, pair, tokens),
    )
    layers = cost.layers
    is_block = np.array([name.startswith("blocks/") for name in layers.names])
    assert is_block.sum() == 48
    norms = layers.norms(jax.jit(jax.grad(own))(params, tokens))
    top = layers.selected(lwsam.top_k(4)(jnp.where(is_block, norms, -1.0), None))
    assert len(top) == 4
    first = min(top, key=lambda name: layers.depth[layers.names.index(name)])
    cover = cover_from(layers, first)
    cover_of_twin = lwsam.Cover(nets.names_of_twin(cover.names))
    assert cost.plain == pytest.approx(other.plain, rel=0.001)
    price = other.ratio(cover_of_twin)
    assert cost.ratio(cover) == pytest.approx(price, rel=0.02)
    assert cost.ratio(top) <= 1.02 * price

    mask = jnp.asarray(np.isin(layers.names, top))
    step = lwsam.value_and_grad(own, cover, **HYPER)
    step_of_twin = lwsam.value_and_grad(twin, cover_of_twin, **HYPER)
    own_flops = flops(lambda p: step(p, tokens, mask=mask).grads, params)
    assert own_flops == pytest.approx(
        flops(lambda p: step_of_twin(p, tokens).grads, pair), rel=0.02
    )
    plain_flops = flops(lambda p: jax.grad(own)(p, tokens), params)
    assert own_flops / plain_flops == pytest.approx(price, rel=0.02)

    out = jax.jit(lambda p: step(p, tokens, mask=mask))(params)
    plain = jax.jit(
        lambda p: two_gradients(
            twin, p, (tokens,), nets.names_of_twin(top), has_aux=False, **HYPER
        )
    )(pair)
    assert_close(nets.unstack(out.grads), plain.grads, rtol=1e-9)


def test_every_cover_has_the_price_of_the_twin():
    params, tokens = nets.make_params(5, width=16), nets.make_tokens(2, 24)
    cost = lwsam.step_cost(nets.scanned(), params, tokens)
    twin = lwsam.step_cost(nets.twin, nets.unstack(params), tokens)
    for name in cost.layers.names:
        cover = cover_from(cost.layers, name)
        same = lwsam.Cover(nets.names_of_twin(cover.names))
        for options in ({}, {"ascent": 0.25}, {"whole_ascent": True}):
            ours, theirs = cost.ratio(cover, **options), twin.ratio(same, **options)
            assert ours == pytest.approx(theirs, rel=0.02)
    assert sum(cost.forward) == pytest.approx(sum(twin.forward))
    assert sum(cost.weight_grad) == pytest.approx(sum(twin.weight_grad))


# --- loops ----------------------------------------------------------------------------


def train(loss, params, tokens, steps=4, parallel=None, then="report", **options):
    """Some steps of TrainStep; the parameters, what was perturbed, the prices."""
    as_step = lambda p, state, batch, key: (loss(p, batch), (state, {}))
    method = lwsam.Method(**{"select": lwsam.top_k(2), "rho": 0.3, **options})
    base = optax.sgd(0.1, momentum=0.9)
    step = lwsam.TrainStep(as_step, base, method, parallel, on_nonfinite=then)
    state = step.init(params, {}, tokens, key=jax.random.key(0))
    seen = []
    for _ in range(steps):
        state, info = step(state, tokens)
        seen.append((step.layers.selected(info.mask), float(info.overhead)))
    return state.params, seen, step


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_overhead": 0.5},
        {"select": lwsam.named("key.*[12]|[12].*key")},
        {"ascent": lwsam.micro_batch(0.5), "shape": lwsam.relative()},
        {"ascent": lwsam.momentum(), "shape": lwsam.relative()},
        {"combine": lwsam.descend_on_selected()},
        {"then": "skip", "rule": lwsam.leaves},
        {"ascent": lwsam.micro_batch(0.5), "combine": lwsam.descend_on_selected()},
    ],
    ids=[
        "top",
        "budget",
        "named",
        "micro-batch",
        "momentum",
        "still",
        "skip",
        "still, micro",
    ],
)
def test_a_train_step_does_what_it_does_on_the_twin(options, x64):
    params, tokens = nets.make_params(3, mlp=False), nets.make_tokens(4)
    one, seen, step = train(nets.scanned(), params, tokens, **options)
    two, wanted, _ = train(nets.twin, nets.unstack(params), tokens, **options)
    assert_close(nets.unstack(one), two, rtol=1e-9)
    for (names, price), (other, other_price) in zip(seen, wanted, strict=True):
        assert set(nets.names_of_twin(names)) == set(other)
        assert price == pytest.approx(other_price, abs=0.03)
    assert any(names for names, _ in seen)
    assert any("blocks/" in name for name in step.layers.names)
    if "max_overhead" in options:
        assert max(price for _, price in seen) <= 0.5


@pytest.mark.parametrize("parallel", ["pmap", "mesh", "sharded"])
def test_a_train_step_on_eight_devices(parallel):
    params, tokens = nets.make_params(3, mlp=False), nets.make_tokens(8)
    options = {"select": lwsam.named("blocks/out/2"), "steps": 2}
    one, _, _ = train(nets.scanned(), params, tokens, **options)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    given = params
    if parallel == "sharded":  # the outputs of each matrix
        spec = lambda w: jax.sharding.PartitionSpec(*[None] * (w.ndim - 1), "data")
        shard = lambda w: jax.sharding.NamedSharding(mesh, spec(w))
        blocks = params["blocks"]
        placed = {k: jax.device_put(blocks[k], shard(blocks[k])) for k in nets.WEIGHTS}
        given = {**params, "blocks": {**blocks, **placed}}
    over = "pmap" if parallel == "pmap" else mesh
    many, _, _ = train(nets.scanned(), given, tokens, parallel=over, **options)
    assert_close(jax.device_get(many), jax.device_get(one), rtol=1e-4)
    if parallel == "sharded":
        assert many["blocks"]["out"].sharding == given["blocks"]["out"].sharding


def test_steps_in_a_scan_are_those_of_the_loop():
    params, tokens = nets.make_params(3, mlp=False), nets.make_tokens(4)
    looped, _, step = train(nets.scanned(), params, tokens, steps=2)
    state = step.init(params, {}, tokens, key=jax.random.key(0))
    state, _ = step.scan(state, jnp.stack([tokens] * 2), covers=1)
    assert_close(state.params, looped, rtol=1e-5)
