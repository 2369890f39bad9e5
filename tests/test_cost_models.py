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
    for one, many in (
        (("out",), ("out",)),
        (("stack",), stack),
        (("in", "out"), ("in", "out")),
        (("in", "out", "stack"), ("in", "out", *stack)),
    ):
        assert scan.ratio(one) == pytest.approx(loop.ratio(many), rel=0.02)
    plain = xla_flops(jax.value_and_grad(unrolled), written_out, x)
    assert scan.plain == pytest.approx(plain, rel=0.02)
