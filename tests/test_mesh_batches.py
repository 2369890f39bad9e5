"""What of a batch is cut, what a step takes beside it, and where states may come from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import lwsam_jax as lwsam
import mesh_task as task
from devices import DEVICES, needs_eight


CLASSES = 4
ROWS = 32
X = np.random.default_rng(1).normal(size=(ROWS, 8)).astype(np.float32)
BATCH = {"x": X, "y": np.arange(ROWS) % CLASSES}
CLASS_WEIGHT = np.arange(1.0, CLASSES + 1, dtype=np.float32)
PARAMS = {"w": np.eye(8, CLASSES, dtype=np.float32)}
KEY = jax.random.key(0)
WAYS = {
    "one device": lambda: None,
    "pmap": lambda: "pmap",
    "mesh": lambda: task.mesh("8"),
    "mesh of two axes": lambda: task.mesh("4 x 2"),
}
SEVERAL = [name for name in WAYS if name != "one device"]


def weighted(params, x, y, class_weight):
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["w"], y)
    return jnp.mean(losses * jnp.asarray(class_weight)[y])


def loss_fn(params, model_state, batch, key):
    loss = weighted(params, batch["x"], batch["y"], batch["class_weight"])
    return loss, (model_state, {})


def with_constants(params, model_state, batch, key, class_weight, frozen):
    x = batch["x"] @ frozen["backbone"]
    return weighted(params, x, batch["y"], class_weight), (model_state, {})


def make(way, loss=loss_fn, method=None, **options):
    method = method or lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8)
    return lwsam.TrainStep(loss, optax.sgd(0.1), method, WAYS[way](), **options)


# --- the batch ------------------------------------------------------------------------


@needs_eight
def test_on_a_mesh_a_vector_that_is_no_batch_is_whole():
    """Where it was cut in silence the loss was 3.938."""
    batch = {**BATCH, "class_weight": CLASS_WEIGHT}
    values = []
    for way in ("one device", "mesh", "mesh of two axes"):
        step = make(way)
        _, info = step(step.init(PARAMS, {}, batch, key=KEY), batch)
        values.append(float(info.value))
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


@needs_eight
@pytest.mark.parametrize("length", [CLASSES, 2 * DEVICES])
@pytest.mark.parametrize(
    ("way", "method"),
    [
        ("pmap", None),
        ("mesh", "micro"),
        ("mesh of two axes", "micro"),
        ("mesh", "own"),
        ("one device", "micro"),
    ],
)
def test_where_a_batch_is_cut_it_raises_with_its_path(way, method, length):
    """Whether or not its length divides by the devices, or is that of a share."""
    cuts = {"micro": lwsam.micro_batch(0.5), "own": lambda batch, key: batch}
    if method is not None:
        method = lwsam.Method(lwsam.everything(), rho=0.1, ascent=cuts[method])
    step = make(way, method=method)
    batch = {**BATCH, "class_weight": np.ones(length, np.float32)}
    with pytest.raises(ValueError, match=r"`batch`.*32.*class_weight.*constant"):
        step(step.init(PARAMS, {}, batch, key=KEY), batch)


@needs_eight
def test_a_batch_that_is_sharded_already_stays_so():
    mesh = task.mesh("4 x 2")
    spec = NamedSharding(mesh, P("data", "model"))
    batch = {"x": jax.device_put(X, spec), "y": BATCH["y"]}
    step = make("mesh of two axes", with_constants, batch_axes="data")
    state = step.init(PARAMS, {}, batch, key=KEY, constants=CONSTANTS)
    compiled = step.lower(state, batch, constants=CONSTANTS).compile()
    placed = compiled.input_shardings[0][1]
    assert placed["x"] == spec
    assert placed["y"].is_equivalent_to(NamedSharding(mesh, P("data")), 1)


@needs_eight
@pytest.mark.parametrize("axes", [("model", "rows"), ("data", "data"), "rows"])
def test_axes_that_the_mesh_does_not_have_raise(axes):
    with pytest.raises(ValueError, match=r"`batch_axes`.*'data', 'model'"):
        make("mesh of two axes", batch_axes=axes)


def test_axes_without_a_mesh_raise():
    with pytest.raises(ValueError, match=r"`batch_axes`.*None without a mesh"):
        make("one device", batch_axes="data")


# --- constants ------------------------------------------------------------------------


CONSTANTS = (CLASS_WEIGHT, {"backbone": np.eye(8, dtype=np.float32) * 0.7})


def reference(steps, constants):
    """One device, with the constants in a closure."""
    values, state = [], None
    for class_weight, frozen in constants[:steps]:

        def loss(params, model_state, batch, key, c=class_weight, f=frozen):
            return with_constants(params, model_state, batch, key, c, f)

        step = make("one device", loss)
        state = state or step.init(PARAMS, {}, BATCH, key=KEY)
        state, info = step(state, BATCH)
        values.append(float(info.value))
    return values


def changing(count):
    return [
        (CLASS_WEIGHT + i, {"backbone": np.eye(8, dtype=np.float32) * (0.7 + i)})
        for i in range(count)
    ]


@needs_eight
@pytest.mark.parametrize("way", WAYS)
def test_constants_may_change_from_step_to_step(way):
    """The same executable runs them all, and they are still there afterwards."""
    traced = []

    def loss(*args):
        traced.append(1)
        return with_constants(*args)

    step, values, counts = make(way, loss), [], []
    constants = [jax.tree.map(jnp.asarray, c) for c in changing(3)]
    state = step.init(PARAMS, {}, BATCH, key=KEY, constants=constants[0])
    for own in constants:
        state, info = step(state, BATCH, *own)
        values.append(float(info.value))
        counts.append(len(traced))
    # jax.pmap traces again for a state that it made itself.
    assert way == "pmap" or len(set(counts)) == 1
    np.testing.assert_allclose(values, reference(3, changing(3)), rtol=1e-5)
    assert not any(x.is_deleted() for x in jax.tree.leaves(constants))


@needs_eight
@pytest.mark.parametrize("way", ["one device", "pmap", "mesh"])
def test_constants_of_other_shapes_compile_anew(way):
    step = make(way, with_constants)
    state = step.init(PARAMS, {}, BATCH, key=KEY, constants=CONSTANTS)
    state, _ = step(state, BATCH, *CONSTANTS)
    longer = np.append(CLASS_WEIGHT, 9.0).astype(np.float32)  # one class more
    _, info = step(state, BATCH, longer, CONSTANTS[1])
    expected = reference(2, [CONSTANTS, CONSTANTS])
    np.testing.assert_allclose(info.value, expected[1], rtol=1e-5)


TWO = {"z_in": np.eye(8, dtype=np.float32), "a_out": np.eye(8, 4, dtype=np.float32)}
Z, A = "z_in", "a_out"


def pulled(params, model_state, batch, key, anchor):
    """Toward the weights of before (L2-SP), which stands before all else."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(anchor), strict=True)
    penalty = sum(jnp.sum((w - a) ** 2) for w, a in pairs)
    y = jnp.tanh(batch["x"] @ params[Z]) @ params[A]
    return jnp.mean(y**2) + 0.1 * penalty, (model_state, {})


def of_one_batch(params, model_state, batch, key, x):
    """The data are a constant: there are no others."""
    return jnp.mean((jnp.tanh(x @ params[Z]) @ params[A]) ** 2), (model_state, {})


@pytest.mark.parametrize(
    ("loss", "batch", "constant"),
    [(pulled, BATCH, TWO), (of_one_batch, {}, X), (of_one_batch, BATCH, X)],
)
def test_a_constant_is_no_data_for_the_depth_of_a_layer(loss, batch, constant):
    """But for a layer that meets no other; then the last layer has no price."""
    step = make("one device", loss)
    step.init(TWO, {}, batch, key=KEY, constants=(constant,))
    assert dict(zip(step.layers.names, step.layers.depth, strict=True)) == {A: 1, Z: 0}
    assert step.cost.ratio(lwsam.Cover((A,))) < step.cost.ratio(lwsam.Cover((A, Z)))
    found = lwsam.Layers.of(TWO, None, loss, {}, batch, KEY, constants=(constant,))
    assert found == step.layers


@needs_eight
def test_constants_lie_as_they_are_given():
    mesh = task.mesh("8")
    cut = NamedSharding(mesh, P(None, "data"))
    constants = (CLASS_WEIGHT, jax.device_put(CONSTANTS[1], cut))
    step = make("mesh", with_constants)
    state = step.init(PARAMS, {}, BATCH, key=KEY, constants=constants)
    compiled = step.lower(state, BATCH, constants=constants).compile()
    weight, frozen = compiled.input_shardings[0][2]
    assert frozen["backbone"].is_equivalent_to(cut, 2)
    assert weight.is_fully_replicated


@needs_eight
@pytest.mark.parametrize("way", ["one device", "pmap", "mesh"])
def test_scan_and_refresh_take_constants(way):
    def loss(params, model_state, batch, key, *constants):
        value, _ = with_constants(params, model_state, batch, key, *constants)
        return value, ({"last": constants[0][0]}, {})

    step = make(way, loss)
    start = lambda: step.init(
        PARAMS, {"last": np.float32(0)}, BATCH, key=KEY, constants=CONSTANTS
    )
    twice = jax.tree.map(lambda x: np.stack([x, x]), BATCH)
    state, infos = step.scan(start(), twice, constants=CONSTANTS)
    expected = reference(2, [CONSTANTS, CONSTANTS])
    np.testing.assert_allclose(infos.value, expected, rtol=1e-5)
    other = (CLASS_WEIGHT + 4, CONSTANTS[1])
    state = step.refresh(state, [BATCH, BATCH], other)
    assert float(state.model_state["last"]) == 5.0


def test_what_it_costs_is_told_with_constants():
    step = make("one device", with_constants)
    step.init(PARAMS, {}, BATCH, key=KEY, constants=CONSTANTS)
    assert step.cost is not None
    assert step.cost.examples == ROWS
    assert step.cost.ratio(("w",)) > 1.5


# --- states ---------------------------------------------------------------------------


@needs_eight
@pytest.mark.parametrize("way", SEVERAL)
def test_a_state_of_one_device_is_placed(way):
    """As a checkpoint that was restored without shardings."""
    batch = BATCH if way == "pmap" else {**BATCH, "class_weight": CLASS_WEIGHT}
    loss = loss_fn
    if way == "pmap":
        loss = lambda p, m, b, k: loss_fn(p, m, {**b, "class_weight": CLASS_WEIGHT}, k)
    one = make("one device", loss)
    state, _ = one(one.init(PARAMS, {}, batch, key=KEY), batch)
    kept = jax.tree.map(jnp.copy, state)
    _, expected = one(state, batch)
    _, info = make(way, loss)(kept, batch)
    np.testing.assert_allclose(info.value, expected.value, rtol=1e-6)


@needs_eight
def test_a_state_is_put_where_that_of_init_was():
    mesh = task.mesh("8")
    cut = NamedSharding(mesh, P("data"))
    params = jax.device_put(PARAMS, cut)
    batch = {**BATCH, "class_weight": CLASS_WEIGHT}
    step = make("mesh")
    state, _ = step(step.init(params, {}, batch, key=KEY), batch)
    host = jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))
    step.init(params, {}, batch, key=KEY)
    restored = host._replace(key=jax.random.wrap_key_data(host.key))
    state, _ = step(restored, batch)
    assert state.params["w"].sharding == cut


@needs_eight
def test_a_state_that_is_cut_over_another_mesh_raises():
    other = NamedSharding(task.mesh("4 x 2"), P("model"))
    step = make("mesh")
    batch = {**BATCH, "class_weight": CLASS_WEIGHT}
    with pytest.raises(ValueError, match=r"\['w'\].*mesh.*device_put"):
        step.init(jax.device_put(PARAMS, other), {}, batch, key=KEY)


@needs_eight
@pytest.mark.parametrize("way", WAYS)
def test_a_donated_state_that_is_used_twice_raises(way):
    step = make(way, with_constants)
    state = step.init(PARAMS, {}, BATCH, key=KEY, constants=CONSTANTS)
    step(state, BATCH, *CONSTANTS)
    with pytest.raises(ValueError, match=r"`state`.*donated.*donate=False"):
        step(state, BATCH, *CONSTANTS)


@needs_eight
@pytest.mark.parametrize("way", WAYS)
def test_without_donation_a_state_can_be_used_twice(way):
    step = make(way, with_constants, donate=False)
    state = step.init(PARAMS, {}, BATCH, key=KEY, constants=CONSTANTS)
    first, _ = step(state, BATCH, *CONSTANTS)
    again, _ = step(state, BATCH, *CONSTANTS)
    np.testing.assert_array_equal(first.params["w"], again.params["w"])
