"""Which layers and depths are found where blocks are scanned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lwsam_jax as lwsam
import stacked_nets as nets
from plain import assert_close, two_gradients
from stacked_task import finish, HYPER, LOSSES, mlp_params, run, WIDTH


def by_depth(layers):
    return tuple(layers.names[i] for i in np.argsort(layers.depth))


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
