"""The cut within a scan over stacked blocks: its gradients, and what it costs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

import lwsam_jax as lwsam
import stacked_nets as nets
from plain import assert_close, enable_x64, layer_of_leaves, two_gradients


LENGTH, WIDTH = 4, 3
HYPER = {"rho": 0.3, "alpha": 0.7}


@pytest.fixture
def x64():
    with enable_x64(True):
        yield


def by_depth(layers):
    return tuple(layers.names[i] for i in np.argsort(layers.depth))


def cover_from(layers, name):
    return lwsam.Cover(layers.from_depth(layers.depth[layers.names.index(name)]))


def flops(fn, *args):
    """FLOPs of the matrix products of a function, those in a scan times its length."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _products(needed)


def _products(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
            total += 2 * eqn.outvars[0].aval.size * inner
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                body = getattr(item, "jaxpr", item)
                if hasattr(body, "eqns"):
                    total += times * _products(body)
    return total


# --- what is found --------------------------------------------------------------------


def test_depth_runs_by_index_and_within_a_block_by_use():
    params, tokens = nets.make_params(2, mlp=False), nets.make_tokens()
    of = lambda **options: by_depth(
        lwsam.Layers.of(params, None, nets.scanned(**options), tokens)
    )
    block = lambda i: [f"blocks/{name}/{i}" for name in nets.WEIGHTS]
    assert of() == ("embed", *block(0), *block(1), "head")
    assert of(remat=True) == of(cast=jnp.bfloat16) == of()
    assert of(reverse=True) == ("embed", *block(1), *block(0), "head")


def test_a_form_that_does_not_see_the_loss_guesses_nothing():
    params = nets.make_params(2, mlp=False)
    assert "blocks/key" in lwsam.Layers.of(params).names
    tx = lwsam.layerwise_sam(k=1, rho=0.1, alpha=0.8)
    assert tx.init(params).mask.shape == (len(lwsam.Layers.of(params)),)


def test_the_rule_decides_alone_where_it_is_given():
    params, tokens = nets.make_params(2, mlp=False), nets.make_tokens()
    names = lwsam.Layers.of(params, lwsam.stacked("key"), nets.scanned(), tokens).names
    assert "blocks/key/1" in names
    assert "blocks/query" in names


def test_a_stack_is_found_within_a_scan_over_micro_batches():
    params, x = mlp_params(), jnp.ones((4, WIDTH))
    of = lambda name: lwsam.Layers.of(params, None, LOSSES[name], x)
    assert by_depth(of("with_outputs_of_each"))[1:3] == ("blocks/up/0", "blocks/down/0")
    assert of("accumulated").names == of("with_outputs_of_each").names


def counted(params, x):
    """A scan inside a `while` loop, which has no gradient in reverse."""
    x = x @ params["stem"]
    frozen = jax.lax.stop_gradient((x, params["blocks"]))
    once = lambda state: (state[0] + 1, run(state[1], frozen[1])[0])
    _, y = jax.lax.while_loop(lambda state: state[0] < 2, once, (0, frozen[0]))
    return finish(params, x + y)


@pytest.mark.parametrize("name", ["in_a_branch", "counted"])
def test_a_stack_inside_a_branch_or_a_loop_is_one_layer_unless_the_rule_says(name):
    loss = LOSSES.get(name, counted)
    params, x = mlp_params(), jnp.ones((4, WIDTH))
    names = ("blocks/down", "blocks/up", "head", "stem")
    assert lwsam.Layers.of(params, lwsam.leaves, loss, x).names == (
        "blocks/bias",
        *names,
    )
    rule = lwsam.stacked("^blocks/")
    assert "blocks/up/1" in lwsam.Layers.of(params, rule, loss, x).names


@pytest.mark.parametrize("name", ["in_a_branch", "counted"])
def test_and_it_has_the_gradients_of_two_passes_as_one_layer(name, x64):
    loss = LOSSES.get(name, counted)
    params = mlp_params()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, WIDTH)))
    # Under the default rule a stack of biases is a matrix.
    rule, selection = lwsam.leaves, ("blocks/up", "head")
    names = ["blocks/bias", "blocks/down", "blocks/up", "head", "stem"]
    split = lwsam.value_and_grad(loss, selection, has_aux=True, rule=rule, **HYPER)
    out = jax.jit(split)(params, x)
    plain = two_gradients(loss, params, (x,), selection, leaf_layers=names, **HYPER)
    assert_close(out.grads, plain.grads, rtol=1e-9)
    assert_close(out.perturbed_value, plain.perturbed_value, rtol=1e-9)


def test_the_weights_of_a_recurrent_cell_are_no_stack():
    def loss(params, x):
        cell = lambda h, x: (jnp.tanh(x @ params["in"] + h @ params["hidden"]), None)
        return jnp.mean(jax.lax.scan(cell, jnp.zeros((2, 3)), x)[0] ** 2)

    params = {"hidden": jnp.ones((3, 3)), "in": jnp.ones((4, 3))}
    layers = lwsam.Layers.of(params, None, loss, jnp.ones((5, 2, 4)))
    assert layers.names == ("hidden", "in")


# --- gradients ------------------------------------------------------------------------


def mlp_body(x, w):
    h = jnp.tanh(x @ w["up"] + w["bias"])
    return x + h @ w["down"], jnp.mean(h)


def run(x, blocks, **options):
    return jax.lax.scan(mlp_body, x, blocks, **options)


def finish(params, x, *more):
    return jnp.mean((x @ params["head"]) ** 2), more


LOSSES = {}


def loss_of(make):
    LOSSES[make.__name__] = make
    return make


@loss_of
def with_outputs_of_each(params, x):
    """The outputs of each index reach aux and value."""
    x, means = run(x @ params["stem"], params["blocks"])
    value, _ = finish(params, x)
    return value + jnp.sum(means * jnp.arange(LENGTH)), means


@loss_of
def reverse(params, x):
    x, means = run(x @ params["stem"], params["blocks"], reverse=True)
    return finish(params, x, means)


@loss_of
def unrolled_in_pairs(params, x):
    return finish(params, run(x @ params["stem"], params["blocks"], unroll=2)[0])


@loss_of
def remat_of_each(params, x):
    body = jax.checkpoint(mlp_body)
    return finish(params, jax.lax.scan(body, x @ params["stem"], params["blocks"])[0])


@loss_of
def jitted_blocks_with_dropout(params, x):
    """The slices of what is no parameter: keys, and numbers of the loss itself."""
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), LENGTH)

    def body(x, inputs):
        w, key, scale = inputs
        y, _ = jax.jit(mlp_body)(x, w)
        return jnp.where(jax.random.bernoulli(key, 0.8, y.shape), y * scale, x), None

    inputs = (params["blocks"], keys, jnp.linspace(0.5, 1.0, LENGTH))
    return finish(params, jax.lax.scan(body, x @ params["stem"], inputs)[0])


@loss_of
def views_of_the_stack(params, x):
    """A cast, a scale, and a factor for each output."""
    blocks = dict(params["blocks"])
    blocks["up"] = (2.0 * blocks["up"]).astype(x.dtype) * params["stem"][0, 0]
    blocks["down"] = blocks["down"] * (1.0 + blocks["bias"])[:, None, :]
    return finish(params, run(x @ params["stem"], blocks)[0])


@loss_of
def two_towers(params, x):
    """Two scans over one stack, neither behind the other."""
    one, _ = run(x @ params["stem"], params["blocks"])
    two, _ = run(jnp.sin(x), params["blocks"])
    return finish(params, one * two)


@loss_of
def twice_through_the_stack(params, x):
    """What comes to the second scan depends on the first."""
    x, _ = run(x @ params["stem"], params["blocks"])
    return finish(params, run(x, params["blocks"], reverse=True)[0])


@loss_of
def penalty_on_the_whole_stack(params, x):
    x, _ = run(x @ params["stem"], params["blocks"])
    value, _ = finish(params, x)
    return value + 0.1 * jnp.sum(params["blocks"]["up"] ** 2), ()


@loss_of
def remat_around_the_scan(params, x):
    """It stays whole; right, if dearer."""
    through = jax.checkpoint(lambda x, blocks: run(x, blocks)[0])
    return finish(params, through(x @ params["stem"], params["blocks"]))


@loss_of
def accumulated(params, x):
    """A scan over micro-batches around it stays whole."""
    micro = lambda total, x: (total + with_outputs_of_each(params, x)[0], None)
    batches = jnp.stack([x, jnp.sin(x)])
    return jax.lax.scan(micro, jnp.zeros((), x.dtype), batches)[0], ()


@loss_of
def in_a_branch(params, x):
    """A scan inside a `cond` is not looked for."""
    through = lambda x, blocks: run(x, blocks)[0]
    x = x @ params["stem"]
    args = x, params["blocks"]
    return finish(params, jax.lax.cond(x[0, 0] < 9, through, lambda x, _: x, *args))


@loss_of
def no_view(params, x):
    """Each slice depends on the whole stack."""
    blocks = jax.tree.map(lambda w: w / jnp.linalg.norm(w), params["blocks"])
    return finish(params, run(x @ params["stem"], blocks)[0])


def mlp_params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / WIDTH**0.5)
    stack = {"up": draw(LENGTH, WIDTH, WIDTH), "down": draw(LENGTH, WIDTH, WIDTH)}
    stack["bias"] = draw(LENGTH, WIDTH)
    return {"stem": draw(WIDTH, WIDTH), "blocks": stack, "head": draw(WIDTH, 2)}


@pytest.mark.parametrize("name", LOSSES)
def test_the_cut_gives_the_gradients_of_two_passes(name, x64):
    loss, params = LOSSES[name], mlp_params()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, WIDTH)))
    names = layer_of_leaves(params, "^blocks/")
    rule = lwsam.stacked("^blocks/")
    selections = [("blocks/down/2",), ("blocks/up/1", "blocks/down/3", "head")]
    if name == "with_outputs_of_each":
        selections += [("blocks/down/0",), ("blocks/up/2", "stem")]

    @jax.jit
    def run(params, x):
        found = []
        for selection in selections:
            split = lwsam.value_and_grad(
                loss, selection, has_aux=True, rule=rule, **HYPER
            )
            plain = two_gradients(
                loss, params, (x,), selection, leaf_layers=names, **HYPER
            )
            found.append((split(params, x), plain))
        return found

    for out, plain in run(params, x):
        assert_close(out.grads, plain.grads, rtol=1e-9)
        assert_close(out.aux, plain.aux, rtol=1e-9)
        assert_close(out.perturbed_value, plain.perturbed_value, rtol=1e-9)
        np.testing.assert_allclose(out.norms, plain.norms, rtol=1e-5)


WHOLE = {"no_view", "remat_around_the_scan", "accumulated", "in_a_branch"}
CUT = set(LOSSES) - WHOLE


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_before_the_cut_runs_once(name):
    """By the matrix products of the traced step, and by the model."""
    loss, params, x = LOSSES[name], mlp_params(), jnp.ones((64, WIDTH))
    value = lambda p, x: loss(p, x)[0]
    last = "0" if name == "reverse" else str(LENGTH - 1)
    selection = (f"blocks/down/{last}", "head")
    step = lwsam.value_and_grad(
        value, selection, rho=0.1, alpha=1.0, rule=lwsam.stacked("^blocks/")
    )
    ratio = flops(lambda p: step(p, x).grads, params)
    ratio /= flops(lambda p: jax.grad(value)(p, x), params)
    layers = lwsam.Layers.of(params, lwsam.stacked("^blocks/"), value, x)
    model = lwsam.step_cost(value, params, x, layers=layers).ratio(selection)
    assert ratio == pytest.approx(model, rel=0.04)
    if name == "twice_through_the_stack":
        assert 1.4 < ratio < 1.7
    elif name in CUT:
        assert ratio < 1.25
    else:
        assert ratio > 1.4


def test_a_stack_along_another_axis_is_cut(x64):
    """MaxText stacks along axis 1, and Flax turns it to the front."""
    params, tokens = nets.make_params(3, mlp=False), nets.make_tokens()
    turn = lambda tree, a, b: {
        **tree,
        "blocks": jax.tree.map(lambda w: jnp.moveaxis(w, a, b), tree["blocks"]),
    }
    turned, loss = turn(params, 0, 1), nets.scanned()
    of_turned = lambda p, t: loss(turn(p, 1, 0), t)
    selection = ("blocks/out/1", "blocks/key/2")

    @jax.jit
    def run(params, turned):
        grad = lambda loss: lwsam.value_and_grad(loss, selection, **HYPER)
        return grad(loss)(params, tokens), grad(of_turned)(turned, tokens)

    one, two = run(params, turned)
    assert_close(turn(two.grads, 1, 0), one.grads, rtol=1e-9)
    np.testing.assert_allclose(one.norms, two.norms, rtol=1e-6)
    of = lambda loss, p: lwsam.step_cost(loss, p, tokens)
    price = of(of_turned, turned).ratio(selection)
    assert price == pytest.approx(of(loss, params).ratio(selection), rel=0.02)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    params, x = mlp_params(), jnp.ones((8, WIDTH)) * jnp.arange(1.0, 9.0)[:, None]
    split = lambda axis: lwsam.value_and_grad(
        lambda p, x: with_outputs_of_each(p, x)[0],
        ("blocks/down/2", "head"),
        axis_name=axis,
        **HYPER,
    )
    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        lambda p, x: split("data")(p, x).grads,
        mesh=jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",)),
        in_specs=(spec(), spec("data")),
        out_specs=spec(),
        check_vma=check_vma,
    )
    expected = jax.jit(split(None))(params, x).grads
    assert_close(jax.jit(sharded)(params, x), expected, rtol=1e-5)


def test_jax_can_search_a_stack_for_nan():
    """Then the loss runs as it is, with the pieces of a stack put together."""
    params, x = mlp_params(), jnp.ones((4, WIDTH))
    value = lambda p: remat_of_each(p, x)[0]
    split = lwsam.value_and_grad(value, ("blocks/down/2",), **HYPER)
    expected = split(params)
    jax.config.update("jax_debug_nans", True)
    try:
        found = split(params)
    finally:
        jax.config.update("jax_debug_nans", False)
    assert_close(found.grads, expected.grads, rtol=1e-5)


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
