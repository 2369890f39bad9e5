"""Ascents on a part of the batch: whose examples, at what key, and no data moved."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import lwsam_jax as lwsam
import reference
import walk_reference as walk
from devices import DEVICES, needs_eight
from micro_batch_task import (
    BATCHES,
    KEY,
    loss_fn_over_devices,
    mesh,
    method,
    PARTS,
    run,
    SEVERAL,
    SIZE,
    start,
)
from plain import enable_x64
from walk_parts import base_optimizer, by_layer, differs, from_tree, loss_fn


# --- which examples -------------------------------------------------------------------


def matching(found, candidates):
    """Walks the oracle beside a run; the candidate that each step took, exactly one."""
    last, taken = walk.first(reference.mlp_params()), []
    for (params, _, info), batch in zip(found, BATCHES, strict=True):
        steps = {
            name: walk.step(PARTS, last, batch, tuple(walk.LAYERS), rows, {})
            for name, rows in candidates.items()
        }
        right = [
            n for n, s in steps.items() if not differs(from_tree(params), s.params)
        ]
        assert len(right) == 1, right
        last = steps[right[0]]
        np.testing.assert_allclose(info.ascent_value, last.ascent_value)
        np.testing.assert_allclose(info.perturbed_value, last.perturbed_value)
        assert not differs(by_layer(info.norms), last.norms)
        taken += right
    return taken


ASCENTS = {
    "fraction": lambda: lwsam.micro_batch(0.5),
    "size": lambda: lwsam.micro_batch(size=SIZE // 2),
}


@needs_eight
@pytest.mark.parametrize("ascent", ASCENTS)
@pytest.mark.parametrize("parallel", SEVERAL)
def test_each_device_takes_a_block_of_its_own_share(parallel, ascent):
    """The same block on each: example 0 or 1 of its two."""
    step = lwsam.TrainStep(
        loss_fn_over_devices,
        base_optimizer(),
        method(ASCENTS[ascent]()),
        SEVERAL[parallel](),
    )
    candidates = {i: np.arange(i, SIZE, 2) for i in range(2)}
    assert len(set(matching(run(step), candidates))) == 2


@pytest.mark.parametrize("ascent", ASCENTS)
def test_one_device_takes_a_block_of_the_batch(ascent):
    step = lwsam.TrainStep(loss_fn, base_optimizer(), method(ASCENTS[ascent]()))
    candidates = {i: np.arange(i, i + SIZE // 2) for i in (0, SIZE // 2)}
    assert len(set(matching(run(step), candidates))) == 2


@needs_eight
@pytest.mark.parametrize("parallel", SEVERAL)
def test_a_function_cuts_the_share_of_its_device(parallel):
    step = lwsam.TrainStep(
        loss_fn_over_devices,
        base_optimizer(),
        method(lambda batch, key: jax.tree.map(lambda x: x[1:], batch)),
        SEVERAL[parallel](),
    )
    matching(run(step), {"the second": np.arange(1, SIZE, 2)})


def test_a_function_draws_from_the_key_of_the_step():
    """Any examples that it likes, here four at random."""

    def draw(batch, key):
        rows = jax.random.permutation(key, SIZE)[:4]
        return jax.tree.map(lambda x: x[rows], batch)

    found = run(lwsam.TrainStep(loss_fn, base_optimizer(), method(draw)))
    again = run(lwsam.TrainStep(loss_fn, base_optimizer(), method(draw)))
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one[2].ascent_value, other[2].ascent_value)
    step = lwsam.TrainStep(loss_fn, base_optimizer(), method(draw))
    with enable_x64(True):
        state, values = start(step), set()
        for number in range(3):  # the same state and batch in another step
            now = jax.tree.map(jnp.copy, state)._replace(step=jnp.int32(number))
            values.add(float(step(now, BATCHES[0])[1].ascent_value))
    assert len(values) == 3


def test_every_block_is_drawn_and_none_crosses_another():
    batch = {"x": jnp.arange(11), "scale": jnp.float32(3.0)}
    ascent = lwsam.micro_batch(0.3)  # three of eleven, at 0, 3 or 6
    seen = set()
    for i in range(40):
        part = ascent.of(batch, jax.random.key(i))
        assert part["scale"] == 3.0
        seen.add(tuple(part["x"].tolist()))
    assert seen == {(0, 1, 2), (3, 4, 5), (6, 7, 8)}


@pytest.mark.parametrize(
    ("ascent", "count"),
    [
        (lwsam.micro_batch(0.1), 1),
        (lwsam.micro_batch(0.3), 3),
        (lwsam.micro_batch(0.7), 7),  # 0.7 * 10 is below 7 in floating point
        (lwsam.micro_batch(0.99), 9),
        (lwsam.micro_batch(size=4), 4),
    ],
    ids=str,
)
def test_the_number_of_examples_is_static(ascent, count):
    batch = jax.ShapeDtypeStruct((10, 3), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    part = jax.eval_shape(ascent.of, batch, key)
    assert part.shape == (count, 3)
    assert ascent.fraction(10) == count / 10


# --- no data moves --------------------------------------------------------------------


ROWS, FEATURES = 48, 5  # 6 rows a device, of which the ascent sees 3
WIDE = {
    "z_in": {"kernel": np.ones((FEATURES, 7))},
    "a_out": {"kernel": np.ones((7, 11))},
}
REDUCED = {1, 2, 3, FEATURES * 7, 7 * 11, FEATURES * 7 + 7 * 11}
MOVES = ("all-gather", "collective-permute", "all-to-all", "collective-broadcast")


def wide_loss(params, model_state, batch, key):
    del key
    h = jnp.tanh(batch @ params["z_in"]["kernel"].astype(batch.dtype))
    return jnp.mean((h @ params["a_out"]["kernel"]) ** 2), (model_state, {})


def collectives(compiled):
    """(name, number of elements) for each operand of each collective in the HLO."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(
            r"= (.*?) (all-reduce|reduce-scatter|" + "|".join(MOVES) + r")"
            r"(-start)?\(",
            line,
        )
        if match:
            for dims in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                size = math.prod(int(d) for d in dims.split(",") if d)
                found.append((match[2], size))
    return found


def assert_moves_nothing(compiled):
    found = collectives(compiled)
    assert found, "nothing is averaged over the devices"
    assert {name for name, _ in found} == {"all-reduce"}
    assert {size for _, size in found} <= REDUCED


def wide_params():
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), WIDE)


@needs_eight
@pytest.mark.parametrize("ascent", [lwsam.micro_batch(0.5), lwsam.micro_batch(size=24)])
@pytest.mark.parametrize("parallel", SEVERAL)
def test_a_train_step_moves_no_example(parallel, ascent):
    step = lwsam.TrainStep(
        wide_loss, optax.sgd(0.1), method(ascent), SEVERAL[parallel]()
    )
    batch = np.ones((ROWS, FEATURES), np.float32)
    state = step.init(wide_params(), {}, batch, key=KEY)
    assert_moves_nothing(step.lower(state, batch, ("a_out", "z_in")).compile())


def functional(cut):
    """The compiled gradient over a batch whose rows lie on eight devices."""
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh(), spec))
    ours = method(lwsam.micro_batch(0.5))
    fn = lwsam.value_and_grad(
        lambda p, x: wide_loss(p, {}, x, None)[0], ("a_out", "z_in"), method=ours
    )
    run = jax.jit(lambda params, x: fn(params, x, ascent_args=(cut(x),)))
    batch = np.arange(ROWS * FEATURES, dtype=np.float32).reshape(ROWS, FEATURES) / 100
    args = put(wide_params(), P()), put(batch, P("data"))
    return run.lower(*args).compile(), args


def first_half_of_each_shard(x):
    shards = x.reshape(DEVICES, ROWS // DEVICES, FEATURES)
    return shards[:, : ROWS // DEVICES // 2].reshape(ROWS // 2, FEATURES)


def by_shard_map(x):
    half = lambda x: x[: len(x) // 2]
    return jax.shard_map(half, mesh=mesh(), in_specs=P("data"), out_specs=P("data"))(x)


@needs_eight
@pytest.mark.parametrize("cut", [first_half_of_each_shard, by_shard_map])
def test_under_jit_a_cut_of_every_shard_moves_no_example(cut):
    compiled, args = functional(cut)
    assert_moves_nothing(compiled)
    out = compiled(*args)
    params, batch = jax.device_get(args)
    part = batch.reshape(DEVICES, -1, FEATURES)[:, :3].reshape(-1, FEATURES)
    np.testing.assert_allclose(
        out.ascent_value, wide_loss(params, {}, part, None)[0], rtol=1e-6
    )


@needs_eight
def test_a_cut_of_the_global_batch_would_move_examples():
    """What the others must not do, and what shows that they are read aright."""
    compiled, _ = functional(lambda x: x[: ROWS // 2])
    assert {name for name, _ in collectives(compiled)} & set(MOVES)
