"""The small network under `layerwise_sam` in an Optax chain, and its course."""

import functools

import jax
import optax

import lwsam_jax as lwsam
import nets
from plain import take_step


CASE = nets.mlp()
PARAMS = CASE.params
LOSS = lambda p: CASE.loss(p, *CASE.args)[0]
HYPER = {"k": 2, "rho": 0.3, "alpha": 0.7}


def chained(*after, **options):
    after = after or (optax.sgd(0.1, momentum=0.9),)
    return optax.chain(lwsam.layerwise_sam(**{**HYPER, **options}), *after)


def jitted_step(tx, *, form="value_fn", **jit_options):
    jit = functools.partial(jax.jit, static_argnames="selection", **jit_options)

    @jit
    def step(params, opt_state, selection=None):
        return take_step(tx, LOSS, params, opt_state, form=form, selection=selection)

    return step


@functools.cache
def trained(steps=3):
    """What every use below must come to: a few steps with the traced selection."""
    tx = chained()
    step = jitted_step(tx)
    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return params, opt_state
