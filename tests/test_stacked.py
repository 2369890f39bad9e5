"""Stacked layers: each index of a scanned stack is a layer, as in the unrolled twin."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
import stacked_nets as nets
from plain import assert_close, two_gradients


LENGTH = 3
RULE = lwsam.stacked("^blocks/")
SELECTIONS = {
    "the last": ("blocks/out/2",),
    "some": ("blocks/query/1", "blocks/out/2", "blocks/value/1"),
    "with the head": ("blocks/down/0", "head"),
    "with the embedding": ("blocks/key/1", "embed"),
    "none": (),
}


def of_twin(layers, twin_layers, values):
    """Values [L] of the twin in the order of the stacked net."""
    names = nets.names_of_twin(layers.names)
    return jnp.asarray(values)[np.array([twin_layers.names.index(n) for n in names])]


def stacked_as(params, grads):
    """The twin's gradients as those of the stacked net."""
    stack = jax.tree.map(lambda *x: jnp.stack(x), *grads["blocks"])
    return jax.tree.map(lambda w, g: g, params, {**grads, "blocks": stack})


# --- names, and the rule --------------------------------------------------------------


def test_names_go_leaf_by_leaf_and_by_index():
    layers = lwsam.Layers.of(nets.make_params(2, mlp=False), RULE)
    assert layers.names == (
        *(f"blocks/{n}/{i}" for n in ("key", "out", "query", "value") for i in (0, 1)),
        "embed",
        "head",
    )
    # Depth, without a loss, goes from block to block.
    assert [layers.names[i] for i in np.argsort(layers.depth)] == [
        *(f"blocks/{n}/{i}" for i in (0, 1) for n in ("key", "out", "query", "value")),
        "embed",
        "head",
    ]


def test_the_rule_of_a_slice_decides():
    """A norm's scale [L, d] is a vector in each block; a module is one for each index."""
    params = {"stack": {"kernel": jnp.ones((3, 4, 5)), "b": jnp.ones((3, 5))}}
    of = lambda *args, **kwargs: lwsam.Layers.of(params, lwsam.stacked(*args, **kwargs))
    assert of("stack").names == ("stack/0", "stack/1", "stack/2")
    assert of("stack", lwsam.leaves).names == (
        *(f"stack/b/{i}" for i in range(3)),
        *(f"stack/{i}" for i in range(3)),
    )
    for rule in (lwsam.modules, lwsam.blocks("stack")):
        layers = of("stack", rule)
        assert layers.names == ("stack/0", "stack/1", "stack/2")
        assert layers.leaf_layer == (0, 0)
    assert of("kernel", lambda path, leaf: f"r{leaf.ndim}").names == (
        "r2",  # of the bias, which is no stack here
        "r2/0",
        "r2/1",
        "r2/2",
    )
    nested = lwsam.stacked("kernel", lwsam.stacked("stack/b", lwsam.leaves), axis=2)
    assert len(lwsam.Layers.of(params, nested)) == 5 + 3


def test_norms_of_slices(x64):
    params = nets.make_params(LENGTH)
    layers, twin = lwsam.Layers.of(params, RULE), lwsam.Layers.of(nets.unstack(params))
    expected = of_twin(layers, twin, twin.norms(nets.unstack(params)))
    np.testing.assert_allclose(layers.norms(params), expected, rtol=1e-12)


def test_another_axis(x64):
    """MaxText stacks along axis 1."""
    params = nets.make_params(LENGTH)
    turned = {**params}
    turned["blocks"] = jax.tree.map(lambda w: jnp.moveaxis(w, 0, 1), params["blocks"])
    layers = lwsam.Layers.of(turned, lwsam.stacked("^blocks/", axis=1))
    first = lwsam.Layers.of(params, RULE)
    assert layers.names == first.names
    np.testing.assert_allclose(layers.norms(turned), first.norms(params), rtol=1e-12)


BLOCKS = nets.make_params(2, mlp=False)


@pytest.mark.parametrize(
    ("params", "make", "match"),
    [
        (BLOCKS, lambda: lwsam.stacked("[("), r"stacked.*`pattern`.*\[\("),
        (BLOCKS, lambda: lwsam.stacked("block", axis=-1), "stacked.*`axis`.*-1"),
        (BLOCKS, lambda: lwsam.stacked("layers"), "`rule`.*'layers'.*blocks/key"),
        ({"s": jnp.ones(()), "w": jnp.ones((2, 2))}, lambda: lwsam.stacked("s"), "s"),
        (
            {"a": {"kernel": jnp.ones((2, 2, 2)), "bias": jnp.ones((3, 2))}},
            lambda: lwsam.stacked("a", lwsam.modules),
            "'a/0'",
        ),
    ],
    ids=["pattern", "axis", "not there", "scalar", "lengths"],
)
def test_wrong_rules_raise(params, make, match):
    with pytest.raises(ValueError, match=match):
        lwsam.Layers.of(params, make())


# --- the functional form --------------------------------------------------------------


@pytest.mark.parametrize("name", SELECTIONS)
def test_it_equals_two_gradients_of_the_twin(name, x64):
    params, tokens = nets.make_params(LENGTH), nets.make_tokens()
    selection = SELECTIONS[name]
    hyper = {"rho": 0.3, "alpha": 0.7}
    layers, twin = lwsam.Layers.of(params, RULE), lwsam.Layers.of(nets.unstack(params))
    cover, mask = lwsam.Cover(layers.names), np.isin(layers.names, selection)
    loss = nets.scanned()

    @jax.jit
    def run(params, tokens, mask):
        split = lambda s: lwsam.value_and_grad(loss, s, rule=RULE, **hyper)
        both = split(selection)(params, tokens), split(cover)(params, tokens, mask=mask)
        plain = two_gradients(
            nets.twin,
            nets.unstack(params),
            (tokens,),
            nets.names_of_twin(selection),
            has_aux=False,
            **hyper,
        )
        return both, plain

    both, plain = run(params, tokens, mask)
    for out in both:
        assert_close(out.grads, stacked_as(params, plain.grads), rtol=1e-9)
        norms = of_twin(layers, twin, plain.norms)
        np.testing.assert_allclose(out.norms, norms, rtol=1e-5)
        for one, other in (
            (out.value, plain.value),
            (out.perturbed_value, plain.perturbed_value),
        ):
            np.testing.assert_allclose(one, other, rtol=1e-9)


SHAPES = {
    "raw": lwsam.raw(),
    "normalized": lwsam.normalized(),
    "normalized all": lwsam.normalized("all"),
    "adaptive": lwsam.adaptive(0.01),
    "adaptive without biases": lwsam.adaptive(0.01, biases=False),
    "relative": lwsam.relative(),
    "relative filter": lwsam.relative("filter"),
    "centered": lwsam.gcsam(0.1).shape,
    "muP": lwsam.mup_perturbation(0.1, 2.0, per="layer").shape,
    "muP by role": lwsam.mup_perturbation(0.1, 2.0, role=lambda name: "output").shape,
    "proportional": lwsam.proportional(of="rms"),
    "trace": optax.chain(optax.trace(0.5), lwsam.relative()),
}
EVERY = {"stacked": lwsam.stacked("^blocks/", lwsam.leaves), "twin": lwsam.leaves}


def rules(kind):
    return (RULE, lwsam.weights) if kind == "weights" else tuple(EVERY.values())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "leaves") for name in SHAPES if name != "trace"),
        *((name, "weights") for name in ("normalized all", "relative", "centered")),
    ],
)
def test_every_shape_sees_the_layers(name, kind, x64):
    """The library on the twin is the reference: it is tested against NumPy."""
    params, tokens = nets.make_params(LENGTH), nets.make_tokens()
    names = ("blocks/query/1", "blocks/out/2", "blocks/up/0", "head")
    own, other = rules(kind)
    method = lambda rule: lwsam.Method(
        lwsam.everything(), rho=0.3, shape=SHAPES[name], rule=rule
    )

    @jax.jit
    def run(params, tokens):
        one = lwsam.value_and_grad(nets.scanned(), names, method=method(own))
        two = lwsam.value_and_grad(
            nets.twin, nets.names_of_twin(names), method=method(other)
        )
        return one(params, tokens), two(nets.unstack(params), tokens)

    one, two = run(params, tokens)
    assert_close(one.grads, stacked_as(params, two.grads), rtol=1e-9)
    np.testing.assert_allclose(one.perturbed_value, two.perturbed_value, rtol=1e-9)


# --- loops ----------------------------------------------------------------------------


def train(tx, params, loss, tokens, extra):
    """Three steps; the parameters after each, and the state."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params, tokens)
        more = {"value_fn": lambda p: loss(p, tokens)} if extra else {}
        updates, state = tx.update(grads, state, params, **more)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    carry = params, tx.init(params)
    (params, state), all_params = jax.lax.scan(step, carry, None, length=3)
    return all_params, params, state


@pytest.mark.parametrize("name", ["normalized", "relative filter", "trace"])
def test_as_optax_trains_as_on_the_twin(name, x64):
    params, tokens = nets.make_params(LENGTH), nets.make_tokens()
    select = lwsam.named("query.*1|1.*query|head|out")
    tx = lambda rule: optax.chain(
        lwsam.as_optax(lwsam.Method(select, rho=0.1, shape=SHAPES[name], rule=rule)),
        optax.sgd(0.1, momentum=0.9),
    )

    @jax.jit
    def run(params, tokens):
        one = train(tx(RULE), params, nets.scanned(), tokens, True)[1]
        two = train(tx(None), nets.unstack(params), nets.twin, tokens, True)[1]
        return one, two

    one, two = run(params, tokens)
    assert_close(one, stacked_as(params, two), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("normalized", "weights"),
        ("adaptive", "leaves"),
        ("relative", "weights"),
        ("relative filter", "leaves"),
    ],
)
def test_perturbed_trains_as_on_the_twin(name, kind, x64):
    params, tokens = nets.make_params(LENGTH), nets.make_tokens()
    base = optax.sgd(0.1, momentum=0.9)
    tx = lambda rule: lwsam.perturbed(base, 0.1, shape=SHAPES[name], k=4, rule=rule)
    own, other = rules(kind)

    @jax.jit
    def run(params, tokens):
        found = []
        for tree, loss, rule in (
            (params, nets.scanned(), own),
            (nets.unstack(params), nets.twin, other),
        ):
            _, held, state = train(tx(rule), tree, loss, tokens, False)
            free = lwsam.eval_params(state, held)
            found.append((held, free, lwsam.train_params(state, free)))
        return found

    one, two = run(params, tokens)
    for a, b in zip(one, two, strict=True):
        assert_close(a, stacked_as(params, b), rtol=1e-9)
    assert_close(one[0], one[2], rtol=1e-9)


def test_sharpness_is_measured_index_by_index():
    params = {"stack": jnp.ones((3, 2, 2)) / 2, "out": jnp.ones((2, 1))}
    body = lambda x, w: (x + jnp.tanh(x @ w), None)
    loss = lambda p, x: jnp.mean((jax.lax.scan(body, x, p["stack"])[0] @ p["out"]) ** 2)
    unrolled = lambda p, x: loss({**p, "stack": jnp.stack(p["stack"])}, x)
    x, options = jnp.eye(2), {"iterations": 4, "samples": 1}
    one = lwsam.sharpness(loss, params, x, **options)
    two = lwsam.sharpness(
        unrolled, {**params, "stack": [*params["stack"]]}, x, **options
    )
    assert one.names == two.names == ("out", "stack/0", "stack/1", "stack/2")
    np.testing.assert_allclose(one.layers.gradient, two.layers.gradient, 1e-3)
