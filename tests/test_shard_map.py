"""axis_name inside shard_map and pmap: exact, and only what is perturbed travels."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import lwsam_jax as lwsam
import nets
from devices import DEVICES, needs_eight
from plain import assert_close


pytestmark = needs_eight
CASE = nets.mlp()
X = nets.weight(16, 4, seed=9) * jnp.linspace(0.2, 3.0, 16)[:, None]
LAYERS = lwsam.Layers.of(CASE.params, None, CASE.loss, X)
MASK = np.isin(LAYERS.names, ("a_out",))


def penalized(selection, axis_name, normalize):
    """Everything but the aux, which no mean is taken of."""
    fn = lwsam.value_and_grad(
        CASE.loss,
        selection,
        rho=0.3,
        alpha=0.7,
        normalize=normalize,
        layers=LAYERS,
        has_aux=True,
        axis_name=axis_name,
    )

    def run(params, x):
        masked = isinstance(selection, lwsam.Cover) and selection.names
        out = fn(params, x, **({"mask": jnp.asarray(MASK)} if masked else {}))
        return out.value, out.grads, out.norms, out.perturbed_value

    return run


def updated(selection, axis_name, normalize):
    """The same from the transformation, with the loss of the local shard."""
    tx = lwsam.layerwise_sam(
        k=1,
        rho=0.3,
        alpha=0.7,
        normalize=normalize,
        layers=LAYERS,
        axis_name=axis_name,
    )

    def run(params, x):
        zeros = jax.tree.map(jnp.zeros_like, params)
        loss = lambda p: CASE.loss(p, x)
        updates, state = tx.update(
            zeros, tx.init(params), params, value_fn=loss, selection=selection
        )
        return updates, state.norms, state.value, state.mask

    return run


def by_shard_map(run, check_vma):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    )
    return jax.jit(mapped)(CASE.params, X)


def by_pmap(run):
    outs = jax.pmap(run, axis_name="data", in_axes=(None, 0))(
        CASE.params, X.reshape(DEVICES, -1, 4)
    )
    for leaf in jax.tree.leaves(outs):  # every device has the same
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], outs)


MAPS = {
    "shard_map, check_vma": functools.partial(by_shard_map, check_vma=True),
    "shard_map, no check_vma": functools.partial(by_shard_map, check_vma=False),
    "pmap": by_pmap,
}
SELECTIONS = {
    "tuple": ("a_out",),
    "cover": lwsam.Cover(("a_out", "m_mid")),
    "empty": (),
}


@functools.cache
def on_one_device(make, selection, normalize):
    return jax.jit(make(selection, None, normalize))(CASE.params, X)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("mapping", MAPS)
def test_value_and_grad_over_devices_is_that_of_the_whole_batch(mapping, selection):
    selection = SELECTIONS[selection]
    out = MAPS[mapping](penalized(selection, "data", "none"))
    assert_close(out, on_one_device(penalized, selection, "none"))


@pytest.mark.parametrize("normalize", ["selected", "full"])
@pytest.mark.parametrize("mapping", MAPS)
def test_the_norm_is_that_of_the_mean_gradient(mapping, normalize):
    out = MAPS[mapping](penalized(("a_out", "z_in"), "data", normalize))
    assert_close(out, on_one_device(penalized, ("a_out", "z_in"), normalize))


@pytest.mark.parametrize("selection", ["tuple", "traced"])
@pytest.mark.parametrize("mapping", MAPS)
def test_the_transformation_over_devices_is_that_of_the_whole_batch(mapping, selection):
    selection = SELECTIONS.get(selection)
    out = MAPS[mapping](updated(selection, "data", "none"))
    assert_close(out, on_one_device(updated, selection, "none"))


@pytest.mark.parametrize("mapping", MAPS)
def test_an_empty_selection_averages_as_any_other(mapping):
    """Else the replicas of a loop with `value_fn` drift apart in its plain steps."""
    updates, norms, value, _ = MAPS[mapping](updated((), "data", "none"))
    expected = on_one_device(penalized, (), "none")
    assert_close((value, updates, norms), expected[:3])


@pytest.mark.parametrize("selection", ["tuple", "empty"])
@pytest.mark.parametrize("mapping", MAPS)
def test_a_loss_may_average_itself(mapping, selection):
    selection = SELECTIONS[selection]
    loss = lambda p, x: jax.lax.pmean(CASE.loss(p, x)[0], "data")
    fn = lwsam.value_and_grad(
        loss, selection, rho=0.3, alpha=0.7, layers=LAYERS, axis_name="data"
    )

    def run(params, x):
        out = fn(params, x)
        return out.value, out.grads, out.norms, out.perturbed_value

    assert_close(MAPS[mapping](run), on_one_device(penalized, selection, "none"))


def test_a_loop_over_devices_may_average_by_grad_fn():
    """`grad_fn` must return averaged gradients; then no axis_name is needed."""
    tx = lwsam.layerwise_sam(k=1, rho=0.3, alpha=0.7, layers=LAYERS)

    def run(params, x):
        mean = lambda p: jax.lax.pmean(
            jax.grad(lambda p: CASE.loss(p, x)[0])(p), "data"
        )
        state = tx.init(params)
        updates, _ = tx.update(
            mean(params), state, params, grad_fn=mean, selection=("a_out",)
        )
        return updates

    expected = on_one_device(penalized, ("a_out",), "none")[1]
    assert_close(MAPS["pmap"](run), expected)
    assert_close(MAPS["shard_map, no check_vma"](run), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_several_axes_are_averaged_together(check_vma):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]).reshape(4, 2), ("one", "two"))
    run = penalized(("a_out",), ("one", "two"), "none")
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(P(), P(("one", "two"))),
        out_specs=P(),
        check_vma=check_vma,
    )
    out = jax.jit(mapped)(CASE.params, X)
    assert_close(out, on_one_device(penalized, ("a_out",), "none"))


def test_sharded_jit_needs_no_axis_name():
    """The compiler sees the whole batch; the arrays alone are sharded."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    put = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
    run = jax.jit(penalized(("a_out",), None, "none"))
    out = run(put(CASE.params, P()), put(X, P("data")))
    assert_close(out, on_one_device(penalized, ("a_out",), "none"))


# --- what travels ---------------------------------------------------------------------

# Layers of pairwise different size, all larger than anything else that is reduced.
SIZES = {"a_out": 11 * 3, "m_mid": 7 * 11, "z_in": 4 * 7}
WIDE = {
    "a_out": {"kernel": nets.weight(11, 3)},
    "m_mid": {"kernel": nets.weight(7, 11)},
    "z_in": {"kernel": nets.weight(4, 7)},
}


def wide_loss(params, model_state, batch, key):
    h = jnp.tanh(batch @ params["z_in"]["kernel"])
    y = jnp.tanh(h @ params["m_mid"]["kernel"]) @ params["a_out"]["kernel"]
    return jnp.mean(y**2), (model_state, {})


def reduced_sizes(compiled):
    """The number of elements of each operand of each all-reduce in the HLO text."""
    sizes = []
    for line in compiled.as_text().splitlines():
        found = re.search(r"= (.*?) all-reduce(-start)?\(", line)
        if found:
            for dims in re.findall(r"\w+\[([\d,]*)\]", found[1]):
                sizes.append(math.prod(int(d) for d in dims.split(",") if d))
    return sizes


def how_often(compiled):
    sizes = reduced_sizes(compiled)
    return {name: sizes.count(size) for name, size in SIZES.items()}


@pytest.mark.parametrize(
    ("selection", "perturbed"),
    [
        ((), ()),
        (("a_out",), ("a_out",)),
        (("m_mid",), ("m_mid",)),
        (("z_in",), ("z_in",)),
        (("a_out", "z_in"), ("a_out", "z_in")),
        (lwsam.Cover(("a_out", "m_mid")), ("a_out", "m_mid")),
        (lwsam.Cover(("a_out", "m_mid", "z_in")), ("a_out", "m_mid", "z_in")),
    ],
    ids=str,
)
@pytest.mark.parametrize("parallel", ["pmap", "mesh"])
def test_the_ascent_reduces_what_is_perturbed_and_no_more(
    parallel, selection, perturbed
):
    """Every layer travels once for the descent; those perturbed once more before it."""
    if parallel == "mesh":
        parallel = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    method = lwsam.LayerwiseSAM(k=1, rho=0.3, alpha=0.7)
    step = lwsam.TrainStep(wide_loss, optax.sgd(0.1), method, parallel)
    batch = nets.weight(16, 4, seed=9)
    state = step.init(WIDE, {}, batch, key=jax.random.key(0))
    compiled = step.lower(state, batch, selection).compile()
    expected = {name: 1 + (name in perturbed) for name in SIZES}
    assert how_often(compiled) == expected


def test_value_and_grad_under_pmap_reduces_what_is_perturbed_and_no_more():
    fn = lwsam.value_and_grad(
        wide_loss, ("m_mid",), rho=0.3, alpha=0.7, has_aux=True, axis_name="data"
    )
    run = lambda params, x: fn(params, {}, x, None).grads
    mapped = jax.pmap(run, axis_name="data", in_axes=(None, 0))
    compiled = mapped.lower(WIDE, nets.weight(DEVICES, 2, 4)).compile()
    assert how_often(compiled) == {"a_out": 1, "m_mid": 2, "z_in": 1}
