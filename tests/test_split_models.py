"""The split step equals the plain two-gradient form, whatever the loss is made of."""

import functools

import jax
import numpy as np
import pytest

import framework_nets
import layer_nets
import lwsam_jax as lwsam
import nets
from plain import assert_close, depth_order, two_gradients


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
    cover, mask = lwsam.Cover(layers.names), np.isin(layers.names, case.selected)

    @jax.jit
    def run(params, args, mask):
        outs = [split(selection=case.selected)(params, *args)]
        if name in PLAIN:  # one compilation less for the large ones
            outs.append(split(selection=cover)(params, *args, mask=mask))
        return two_gradients(case.loss, params, args, case.selected, **hyper), outs

    plain, outs = run(case.params, case.args, mask)
    for out in outs:
        assert_close(as_plain_fields(out), plain[:5])
    moved = abs(float(plain.perturbed_value) - float(plain.value))
    assert moved > 1e-4 * abs(float(plain.value)), "the case perturbs nothing"


@pytest.mark.parametrize("name", MAKERS)
def test_names_are_in_pytree_order(name):
    assert layers_of(name).names == made(name).names


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "layer_used_only_in_aux"])
def test_depth_runs_from_the_input_to_the_output(name):
    assert depth_order(made(name).params, layers_of(name)) == made(name).depth
