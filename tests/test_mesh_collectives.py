"""What travels between the devices of a mesh, read from the compiled steps."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import lwsam_jax as lwsam
import mesh_task as task
from devices import DEVICES, needs_eight
from lwsam_jax._devices.mesh import OnMesh


pytestmark = needs_eight
# Layers of pairwise different size, all larger than anything else that travels.
WIDTHS = (8, 16, 24, 32, 40)
NAMES = ("a", "b", "c", "d")
SIZES = {name: WIDTHS[i] * WIDTHS[i + 1] for i, name in enumerate(NAMES)}
OF_SIZE = {size: name for name, size in SIZES.items()}
PARAMS = {
    name: np.random.default_rng(i)
    .normal(size=WIDTHS[i : i + 2], scale=0.2)
    .astype(np.float32)
    for i, name in enumerate(NAMES)
}
BATCH = np.ones((8 * DEVICES, WIDTHS[0]), np.float32)
FULLY = {name: P("data") for name in NAMES}
REPLICATED = {name: P() for name in NAMES}
GATHER, REDUCE = "all-gather", "all-reduce"
KINDS = (GATHER, REDUCE, "reduce-scatter", "collective-permute", "all-to-all")


def loss_fn(params, model_state, batch, key):
    """As one writes it for fully sharded weights: activations lie as the batch does."""
    del key
    x = batch
    for name in NAMES:
        x = jax.lax.with_sharding_constraint(jnp.tanh(x @ params[name]), P("data"))
    return jnp.mean(x**2), (model_state, {})


def travels(compiled):
    """How often which layer travels by what; other sizes as (kind, number)."""
    found = collections.Counter()
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match is None:
            continue
        for dims in re.findall(r"\w+\[([\d,]*)\]", match[1]):
            size = math.prod(int(d) for d in dims.split(",") if d)
            kind = REDUCE if match[2] == "reduce-scatter" else match[2]
            found[kind, OF_SIZE.get(size, size)] += 1
    return found


def make(specs, method, batch=BATCH):
    mesh = task.mesh("8")
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    step = lwsam.TrainStep(loss_fn, optax.sgd(0.1), method, mesh)
    params = jax.tree.map(place, PARAMS, specs)
    return step, step.init(params, {}, batch, key=jax.random.key(0))


@functools.cache
def of_step(specs, selection, ascent="whole"):
    parts = {"whole": lwsam.whole_batch(), "micro": lwsam.micro_batch(0.5)}
    method = lwsam.Method(lwsam.top_k(1), rho=0.1, ascent=parts[ascent])
    step, state = make({"fully": FULLY, "replicated": REPLICATED}[specs], method)
    found = travels(step.lower(state, BATCH, selection).compile())
    return {key: n for key, n in found.items() if isinstance(key[1], str)}, found


SELECTIONS = [("a",), ("c",), ("d",), ("a", "d"), lwsam.Cover(("c", "d"))]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_fully_sharded_a_perturbed_layer_is_gathered_once_more(selection):
    """And its ascent gradient is reduced; nothing else travels."""
    plain, _ = of_step("fully", ())
    assert plain == {(k, n): 1 for k in (GATHER, REDUCE) for n in NAMES}
    names = getattr(selection, "names", selection)
    wanted = collections.Counter(plain)
    wanted.update((kind, name) for kind in (GATHER, REDUCE) for name in names)
    assert of_step("fully", selection)[0] == wanted


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("ascent", ["whole", "micro"])
def test_replicated_the_ascent_reduces_what_is_perturbed(selection, ascent):
    names = getattr(selection, "names", selection)
    wanted = collections.Counter((REDUCE, name) for name in (*NAMES, *names))
    assert of_step("replicated", selection, ascent)[0] == wanted


@pytest.mark.parametrize("ascent", ["whole", "micro"])
@pytest.mark.parametrize("specs", ["fully", "replicated"])
def test_no_example_travels(specs, ascent):
    """Whatever else there is holds one number for each layer, at most."""
    _, found = of_step(specs, ("a", "d"), ascent)
    others = {key: n for key, n in found.items() if not isinstance(key[1], str)}
    assert others
    assert {kind for kind, _ in others} == {REDUCE}
    assert max(size for _, size in others) <= len(NAMES)


# --- an optimizer whose loop holds the perturbed parameters ----------------------------


def explicit_loss(params, batch):
    """Where axes are Explicit a loss says itself where a weight is gathered."""
    x = batch
    for name in NAMES:
        x = jnp.tanh(x @ task.gathered(params[name]))
    return jnp.mean(x**2)


def of_loop(tx, kind="Auto"):
    """What travels in a jitted step of one's own, with fully sharded weights."""
    mesh = task.mesh("8", kind)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params = jax.tree.map(place, PARAMS, FULLY)
    opt_state = tx.init(params)
    where = jax.tree.map(
        lambda x: (
            x.sharding
            if isinstance(x.sharding, NamedSharding)
            else NamedSharding(mesh, P())
        ),
        (params, opt_state),
    )
    loss = explicit_loss
    if kind == "Auto":
        loss = lambda p, batch: loss_fn(p, {}, batch, None)[0]

    def step(params, opt_state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    args = (*jax.device_put((params, opt_state), where), place(BATCH, P("data")))
    with OnMesh("test", mesh, None, donate=False).context():
        return travels(jax.jit(step, out_shardings=where).lower(*args).compile())


@pytest.mark.parametrize(
    ("ascent", "kind", "numbers"),
    [
        ("momentum", "Explicit", 1),  # each device adds up its own first
        ("momentum", "Auto", len(NAMES)),  # which XLA may put into one reduction
        ("random", "Auto", 2 * len(NAMES)),  # norms of the noise, and of the weights
    ],
)
def test_an_optimizer_that_perturbs_adds_numbers_alone(ascent, kind, numbers):
    base = optax.sgd(0.1, momentum=0.9)
    if ascent == "momentum":
        tx = lwsam.momentum_sam(base, rho=0.1)
    else:
        shape = lwsam.relative()
        tx = lwsam.perturbed(base, rho=0.1, ascent=lwsam.random(), shape=shape)
    added = of_loop(tx, kind)
    added.subtract(of_loop(base, kind))
    assert {key: n for key, n in added.items() if n} == {(REDUCE, 1): numbers}
