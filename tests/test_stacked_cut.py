"""A scan over stacked blocks is cut: gradients of two passes, and what runs once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lwsam_jax as lwsam
import stacked_nets as nets
from plain import assert_close, layer_of_leaves, two_gradients
from stacked_task import (
    flops,
    HYPER,
    LENGTH,
    LOSSES,
    mlp_params,
    remat_of_each,
    WIDTH,
    with_outputs_of_each,
)


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
