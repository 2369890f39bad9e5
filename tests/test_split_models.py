"""The split step equals the plain two-gradient form, whatever the loss is made of."""

import functools

import jax
import numpy as np
import pytest

import framework_nets
import layer_nets
import lwsam_jax as lwsam
import nets
from plain import assert_close, depth_order, layer_of_leaves, two_gradients


PLAIN = {**nets.CASES, **layer_nets.CASES}
MAKERS = {**PLAIN, **framework_nets.CASES}


@functools.cache
def made(name):
    return MAKERS[name]()


@functools.cache
def layers_of(name):
    case = made(name)
    return lwsam.Layers.of(case.params, None, case.loss, *case.args)


def as_plain_fields(out):
    return (out.value, out.aux, out.grads, out.norms, out.perturbed_value)


@pytest.mark.parametrize("name", MAKERS)
def test_split_equals_two_plain_gradients(name):
    """For the tuple, and for the cover of all layers in which a mask picks it."""
    case, layers = made(name), layers_of(name)
    hyper = {"rho": 0.3, "alpha": 0.7}
    split = functools.partial(
        lwsam.value_and_grad, case.loss, layers=layers, has_aux=True, **hyper
    )
    names = layer_of_leaves(case.params, case.stack)
    cover, mask = lwsam.Cover(layers.names), np.isin(layers.names, case.selected)

    @jax.jit
    def run(params, args, mask):
        outs = [split(selection=case.selected)(params, *args)]
        if name in PLAIN:  # one compilation less for the large ones
            outs.append(split(selection=cover)(params, *args, mask=mask))
        plain = two_gradients(
            case.loss, params, args, case.selected, leaf_layers=names, **hyper
        )
        return plain, outs

    plain, outs = run(case.params, case.args, mask)
    for out in outs:
        assert_close(as_plain_fields(out), plain[:5])
    moved = abs(float(plain.perturbed_value) - float(plain.value))
    assert moved > 1e-4 * abs(float(plain.value)), "the case perturbs nothing"


@pytest.mark.parametrize("name", MAKERS)
def test_names_are_in_pytree_order(name):
    assert layers_of(name).names == made(name).names


def test_the_other_rules_name_modules_and_leaves():
    """A BatchNorm owns no weight and is no module of its own; its leaves are leaves."""
    params = made("linen_residual_cnn").params
    names = lwsam.Layers.of(params, lwsam.modules).names
    assert names == ("Block_0/Conv_0", "Block_0/Conv_1", "Conv_0", "Dense_0")
    assert lwsam.Layers.of(params, lwsam.leaves).names == (
        "Block_0/BatchNorm_0/bias",
        "Block_0/BatchNorm_0/scale",
        "Block_0/Conv_0",
        "Block_0/Conv_1",
        "Conv_0/bias",
        "Conv_0",
        "Dense_0/bias",
        "Dense_0",
    )


@pytest.mark.parametrize("rule", [lwsam.weights, lwsam.modules, lwsam.leaves])
def test_nnx_states_and_pure_trees_have_the_same_names(rule):
    nnx = pytest.importorskip("flax.nnx")
    params = made("nnx_residual_cnn").params
    names = lwsam.Layers.of(params, rule).names
    assert not any("value" in name or "kernel" in name for name in names)
    assert lwsam.Layers.of(nnx.to_pure_dict(params), rule).names == names


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "layer_used_only_in_aux"])
def test_depth_runs_from_the_input_to_the_output(name):
    assert depth_order(made(name).params, layers_of(name)) == made(name).depth
