"""The cost model counts convolutions, attention and scans as XLA counts them."""

import jax
import jax.numpy as jnp
import pytest

import lwsam_jax as lwsam
from nets import weight


def xla_flops(fn, *args):
    cost = jax.jit(fn).lower(*args).compile().cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return cost["flops"]


def check(loss, params, *args):
    """Both arguments of the operation are layers, so that both gradients count."""
    cost = lwsam.step_cost(loss, params, *args)
    forward = xla_flops(loss, params, *args)
    assert sum(cost.forward) == pytest.approx(forward, rel=0.02)
    plain = xla_flops(jax.value_and_grad(loss), params, *args)
    assert cost.plain == pytest.approx(plain, rel=0.02)


CONVOLUTIONS = {
    "plain": {},
    "valid": {"padding": "VALID"},
    "strided": {"window_strides": (2, 2)},
    "dilated": {"rhs_dilation": (2, 2)},
    "transposed": {"lhs_dilation": (2, 2), "padding": ((2, 2), (2, 2))},
    "grouped": {"feature_group_count": 4},
    "depthwise": {"feature_group_count": 16},
    "strided and dilated": {"window_strides": (2, 1), "rhs_dilation": (1, 3)},
    "one side padded": {"padding": ((2, 0), (0, 2))},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    options = {"window_strides": (1, 1), "padding": "SAME", **CONVOLUTIONS[name]}
    groups = options.get("feature_group_count", 1)

    def loss(params, target):
        y = jax.lax.conv_general_dilated(
            params["x"],
            params["w"],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            **options,
        )
        return jnp.sum(y * target[:, : y.shape[1], : y.shape[2]])

    params = {"x": weight(4, 12, 12, 16), "w": weight(3, 3, 16 // groups, 32)}
    check(loss, params, weight(4, 32, 32, 32))


def test_convolution_in_one_dimension():
    def loss(params, target):
        y = jax.lax.conv_general_dilated(
            params["x"],
            params["w"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return jnp.sum(y * target)

    check(loss, {"x": weight(4, 40, 16), "w": weight(5, 16, 24)}, weight(4, 40, 24))


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal):
    def loss(params, target):
        y = jax.nn.dot_product_attention(
            params["query"], params["key"], params["value"], is_causal=causal
        )
        return jnp.sum(y * target)

    params = {name: weight(2, 48, 4, 32) for name in ("query", "key", "value")}
    check(loss, params, weight(2, 48, 4, 32))


def test_matrix_products_with_batches():
    loss = lambda p, target: jnp.sum(
        jnp.einsum("bik,bkj->bij", p["a"], p["b"]) * target
    )
    params = {"a": weight(3, 20, 30), "b": weight(3, 30, 40)}
    check(loss, params, weight(3, 20, 40))


def test_nothing_flows_back_through_a_stop_gradient():
    """Frozen weights, and outputs that are held: forward passes alone."""

    def loss(params, x):
        hidden = jnp.tanh(x @ jax.lax.stop_gradient(params["frozen"]))
        held = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
        return jnp.mean((hidden @ params["w"] - jax.lax.stop_gradient(held)) ** 2)

    params = {name: weight(32, 32) for name in ("frozen", "a", "b", "w")}
    check(loss, params, weight(64, 32))


def test_a_scan_counts_by_its_length():
    """XLA counts its body once, so the loop written out stands for it."""
    # Many: in the first iteration, too, a scan takes the gradient of its carry.
    layers = 24
    params = {
        "in": weight(8, 16),
        "stack": weight(layers, 16, 16),
        "out": weight(16, 8),
    }

    def layer(x, w):
        return jnp.tanh(x @ w), None

    def scanned(params, x):
        x, _ = jax.lax.scan(layer, x @ params["in"], params["stack"])
        return jnp.mean((x @ params["out"]) ** 2)

    def unrolled(params, x):
        x = x @ params["in"]
        for w in params["stack"]:
            x, _ = layer(x, w)
        return jnp.mean((x @ params["out"]) ** 2)

    x = weight(64, 8)
    written_out = {**params, "stack": list(params["stack"])}
    scan = lwsam.step_cost(scanned, params, x)
    loop = lwsam.step_cost(unrolled, written_out, x)
    assert sum(scan.forward) == pytest.approx(sum(loop.forward), rel=0.02)
    assert scan.plain == pytest.approx(loop.plain, rel=0.02)
    stack = tuple(f"stack/{i}" for i in range(layers))
    for names in (
        ("out",),
        stack,
        stack[10:],
        stack[-1:],
        (*stack[3:], "out"),
        ("in", "out"),
        ("in", "out", *stack),
    ):
        assert scan.ratio(names) == pytest.approx(loop.ratio(names), rel=0.02)
    plain = xla_flops(jax.value_and_grad(unrolled), written_out, x)
    assert scan.plain == pytest.approx(plain, rel=0.02)


PARAMS = {"in": weight(4, 8), "out": weight(8, 2)}
COST_ARGS = (jax.ShapeDtypeStruct((6, 4), jnp.float32),)


def two_layers(params, x, *others):
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"]) ** 2)


def test_fractions_of_the_batch():
    cost = lwsam.step_cost(two_layers, PARAMS, *COST_ARGS)
    whole = cost.ratio(("out",))
    assert cost.ratio(("out",), 1) == cost.ratio(("out",), 1.0) == whole
    # No pass: the direction is at hand. With one of its own, nothing is shared.
    assert cost.ratio(("in", "out"), 0) == 1.0
    assert cost.prices(0) == (0.0, 0.0)
    assert 1.0 < cost.ratio(("out",), 0.01) < 1.01
    for options in ({}, {"ascent": 0.3}, {"whole_ascent": True}, {"descent": 0.7}):
        # In depth "in" comes first, so its cover has both.
        covers = (lwsam.Cover(("in", "out")), lwsam.Cover(("out",)))
        prices = tuple(cost.ratio(cover, **options) - 1 for cover in covers)
        assert cost.prices(**options) == prices
        assert cost.ratio((), **options) == 1.0
    assert cost.ratio(("in", "out"), 0.5, whole_ascent=True) == pytest.approx(1.5)
    assert cost.ratio(("out",), whole_ascent=True) > cost.ratio(("out",))


RAW_KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)
STATE = {"mean": jnp.zeros(8), "var": jnp.zeros(8), "count": jnp.zeros(())}


@pytest.mark.parametrize(
    ("args", "examples"),
    [
        (({"x": jnp.ones((6, 4)), "y": jnp.ones(6), "classes": jnp.ones(3)},), 6),
        ((STATE, {"x": jnp.ones((6, 4)), "y": jnp.ones(6)}, jax.random.key(0)), 6),
        ((STATE, jnp.ones((6, 4)), RAW_KEY), 6),
        ((STATE, jnp.ones((6, 4)), 0.5), 6),
        ((), None),
        ((jnp.ones(()), None), None),
    ],
    ids=["dict", "state", "raw key", "number", "none", "scalars"],
)
def test_the_batch_is_found_among_the_arguments(args, examples):
    loss = lambda p, *args: jnp.sum(p["out"] ** 2)
    assert lwsam.step_cost(loss, PARAMS, *args).examples == examples


class Tenth:
    def fraction(self, examples):
        return 0.1

    def __repr__(self):  # a name for the test that is the same in every worker
        return "Tenth()"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ascent": -0.1}, ValueError, r"`ascent`.*-0\.1"),
        ({"ascent": 1.1}, ValueError, r"`ascent`.*1\.1"),
        ({"ascent": float("nan")}, ValueError, "`ascent`.*nan"),
        ({"ascent": "half"}, TypeError, "`ascent`.*half"),
        ({"ascent": True}, TypeError, "`ascent`.*True"),
        ({"ascent": Tenth()}, ValueError, "`ascent`.*examples"),
        ({"descent": 1.5}, ValueError, r"`descent`.*1\.5"),
        ({"descent": None}, ValueError, "`descent`.*None"),
    ],
    ids=str,
)
def test_fractions_out_of_range_raise(options, error, match):
    cost = lwsam.step_cost(lambda p: two_layers(p, jnp.ones((6, 4))), PARAMS)
    with pytest.raises(error, match=match):
        cost.ratio(("out",), **options)
    with pytest.raises(error, match=match):
        cost.prices(**options)


def test_the_sets_of_resnet20_cost_what_is_promised():
    """At batch 128; the counts of XLA are at most 0.3 % below the model's."""
    nnx = pytest.importorskip("flax.nnx")
    from lwsam_bench.models.network import Network
    from lwsam_bench.models.resnet import ResNet
    from lwsam_bench.training.recipe import make_loss_fn

    network = Network.of(ResNet(3, 10, projection=True, rngs=nnx.Rngs(0)))
    batch = {
        "image": jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((128,), jnp.int32),
    }
    args = (network.params, network.model_state, batch, jax.random.key(0))
    cost = lwsam.step_cost(make_loss_fn(network), *args)
    assert cost.examples == 128
    third = tuple(n for n in cost.layers.names if n.startswith("stage3"))
    assert cost.ratio(("dense",)) <= 1.0005
    assert cost.ratio(("dense", "stage3_block3/conv2")) <= 1.036
    assert cost.ratio(("dense", *third)) <= 1.284 * 1.003
    # A tenth of the batch: whatever is perturbed, a tenth at most.
    assert max(cost.prices(0.1)) <= 0.1
