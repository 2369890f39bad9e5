"""Train steps whose ascent sees a part of the batch, and their oracle."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import lwsam_jax as lwsam
import reference
import walk_combinations as combinations
import walk_reference as walk
from devices import DEVICES
from plain import enable_x64
from walk_parts import loss_fn, to_tree


KEY = jax.random.key(11)
SIZE = 2 * DEVICES
BATCHES = reference.mlp_batches(4, SIZE, seed=5)
PARTS = combinations.Parts(ascent="fraction", combine="mix")


def mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("data",))


PARALLEL = {"one device": lambda: None, "pmap": lambda: "pmap", "mesh": mesh}
SEVERAL = {name: PARALLEL[name] for name in ("pmap", "mesh")}


def method(ascent, **changes):
    return lwsam.Method(
        **{
            "select": lwsam.everything(),
            "rho": PARTS.rho,
            "ascent": ascent,
            "combine": lwsam.mix(walk.ALPHA["mix"]),
            **changes,
        }
    )


def start(step, loss_state=0):
    params = to_tree(reference.mlp_params())
    return step.init(params, jnp.int32(loss_state), BATCHES[0], key=KEY)


def run(step, batches=BATCHES, state=None):
    with enable_x64(True):
        state, found = start(step) if state is None else state, []
        for batch in batches:
            state, info = step(state, batch)
            found.append(jax.device_get((state.params, state.model_state, info)))
    return found


def loss_fn_over_devices(params, model_state, batch, key):
    """The metrics of each example stay on its device."""
    loss, (model_state, metrics) = loss_fn(params, model_state, batch, key)
    return loss, (model_state, {"point": metrics["point"]})
