"""What people meet: NaN under JAX's debugger, and models whose leaves have odd names."""

import re
import subprocess
import sys
import traceback

import jax
import jax.numpy as jnp
import pytest

import lwsam_jax as lwsam
import nets
from lwsam_jax._engine.rules import blocks
from plain import assert_close, two_gradients


# --- a NaN, and the line that it is from ----------------------------------------------

X = jnp.linspace(0.1, 1.0, 8)[:, None]
PARAMS = {"w1": jnp.eye(1, 4) + 0.1, "w2": jnp.ones((4, 1))}


@pytest.fixture
def debug():
    """A function that turns one of JAX's debuggers on, as the variable of the shell."""
    names = ("jax_debug_nans", "jax_debug_infs")
    yield lambda name: jax.config.update(name, True)
    for name in names:
        jax.config.update(name, False)


@jax.jit
def root_or_zero(x):
    """NaN on the way, none in what comes out: that is meant."""
    return jnp.nan_to_num(jnp.sqrt(jax.lax.stop_gradient(x) - 100.0))


def loss_of(params, root):
    offset = root_or_zero(params["w2"])
    h = jnp.sqrt(root(X @ params["w1"], params["w2"]))  # the culprit
    return jnp.mean((h @ (params["w2"] + offset)) ** 2)


# Where the square root is of a negative number.
ROOTS = {
    "prefix": lambda h, w2: h - 0.5,
    "suffix": lambda h, w2: h - jnp.sum(w2),
    "perturbed point": lambda h, w2: h + 30.0 - jnp.sum(w2**2),
}


def line_of_the_nan(fn, *args):
    """The primitive that JAX names, and the innermost line of this file."""
    with pytest.raises(FloatingPointError) as caught:
        jax.block_until_ready(fn(*args))
    frames = traceback.extract_tb(caught.value.__traceback__)
    lines = [frame.line for frame in frames if frame.filename == __file__]
    return re.search(r"encountered in (\w+)", str(caught.value))[1], lines[-1]


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("where", ROOTS)
def test_a_nan_is_found_in_the_line_of_the_user(where, jit, debug):
    loss = lambda p: loss_of(p, ROOTS[where])
    fn = jit(lwsam.value_and_grad(loss, ("w2",), rho=50.0, alpha=1.0))
    debug("jax_debug_nans")
    primitive, line = line_of_the_nan(fn, PARAMS)
    assert primitive == "sqrt"
    assert line.endswith("# the culprit")


LATER = """
import jax, jax.numpy as jnp, lwsam_jax as lwsam
jax.config.update("jax_debug_nans", True)
x = jnp.linspace(0.1, 1.0, 8)[:, None]
params = {"w1": jnp.eye(1, 4) + 0.1, "w2": jnp.ones((4, 1))}

def loss(p):
    h = jnp.sqrt(x @ p["w1"] + 30.0 - jnp.sum(p["w2"] ** 2))
    return jnp.mean((h @ p["w2"]) ** 2)

fn = jax.jit(lwsam.value_and_grad(loss, ("w2",), rho=0.0 * x[0, 0], alpha=1.0))
for _ in range(2):
    jax.block_until_ready(fn(params))
try:
    jax.block_until_ready(fn({**params, "w2": 50 * params["w2"]}))
except FloatingPointError as error:
    print(error)
"""


def test_a_nan_of_a_later_step_is_found():
    """What is compiled stays under JAX's checks after we have traced it.

    In a process of its own: whatever traced with `jaxpr_as_fun` before, JAX's own code
    too, leaves compiled functions unchecked in JAX 0.10.
    """
    done = subprocess.run(
        [sys.executable, "-c", LATER], capture_output=True, text=True, timeout=300
    )
    assert "encountered in sqrt" in done.stdout, done.stderr[-2000:]


def test_an_infinity_is_found_in_the_line_of_the_user(debug):
    def loss(p):
        h = jnp.tanh(X @ p["w1"])
        h = jnp.log(0 * h)  # the culprit
        return jnp.mean(h @ p["w2"])

    fn = jax.jit(lwsam.value_and_grad(loss, ("w2",), rho=0.1, alpha=1.0))
    debug("jax_debug_infs")
    primitive, line = line_of_the_nan(fn, PARAMS)
    assert primitive == "log"
    assert line.endswith("# the culprit")


# --- names ----------------------------------------------------------------------------


def test_a_matrix_named_b_is_a_weight_and_a_bias_of_that_name_is_none():
    adapters = {"up": {"a": nets.weight(8, 2), "b": nets.weight(2, 16)}}
    assert lwsam.Layers.of(adapters).names == ("up/a", "up/b")
    haiku = {"linear": {"w": nets.weight(8, 2), "b": jnp.zeros(2)}}
    assert lwsam.Layers.of(haiku).names == ("linear/w",)


def linen_lstm():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.RNN(nn.LSTMCell(3), name="encoder")(x))

    shapes = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((2, 4, 5)))
    return Net(), shapes["params"]


def test_an_lstm_cell_is_one_layer_under_blocks():
    net, params = linen_lstm()
    assert len(lwsam.Layers.of(params).names) == 9
    assert len(lwsam.Layers.of(params, lwsam.modules).names) == 9
    loss = lambda p, x: jnp.mean(net.apply({"params": p}, x) ** 2)
    x = jnp.ones((2, 4, 5))
    layers = lwsam.Layers.of(params, blocks("LSTMCell"), loss, x)
    cell = next(name for name in layers.names if name != "Dense_0")
    assert cell.endswith("LSTMCell_0") or cell.endswith("cell")
    assert len(layers) == 2
    # Kernels and biases of the cell belong to it; the bias of the dense layer to none.
    assert layers.leaf_layer.count(layers.names.index(cell)) == 12
    assert layers.leaf_layer.count(-1) == 1
    assert layers.depth[layers.names.index(cell)] == 0


def test_an_entry_of_a_list_is_a_block():
    block = {"norm": {"scale": jnp.ones(3)}, "ff": {"kernel": nets.weight(3, 3)}}
    params = {
        "layers": [block] * 11,
        "layers_norm": {"scale": jnp.ones(3)},
        "out": {"kernel": nets.weight(3, 2), "bias": jnp.ones(2)},
    }
    layers = lwsam.Layers.of(params, blocks(r"layers/\d+"))
    assert layers.names == (*(f"layers/{i}" for i in range(11)), "out")
    assert layers.leaf_layer == (*(i for i in range(11) for _ in "sk"), -1, -1, 11)


def test_a_block_without_a_weight_is_none():
    params = {"norm": {"scale": jnp.ones(3)}, "out": {"kernel": nets.weight(3, 2)}}
    assert lwsam.Layers.of(params, blocks("norm")).names == ("out",)


def test_blocks_of_a_name_that_is_not_there_raise():
    _, params = linen_lstm()
    with pytest.raises(ValueError, match=r"`rule`.*GRUCell.*Dense_0.*LSTMCell"):
        lwsam.Layers.of(params, blocks("GRUCell"))


def test_a_model_with_functions_in_it_raises_and_says_what_to_pass():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"`params`.*activation.*eqx\.filter"):
        lwsam.Layers.of(model)
    with pytest.raises(TypeError, match=r"eqx\.filter"):
        lwsam.layerwise_sam(k=1, rho=0.1, alpha=0.8).init(model)
    arrays = eqx.filter(model, eqx.is_inexact_array)
    assert len(lwsam.Layers.of(arrays)) == 3


def test_an_lstm_cell_is_perturbed_as_one():
    """The perturbation reaches all of its gates, and nothing else."""
    net, shapes = linen_lstm()
    keys = iter(range(99))
    params = jax.tree.map(
        lambda s: nets.weight(1, *s.shape, seed=next(keys))[0], shapes
    )
    loss = lambda p, x: jnp.mean(net.apply({"params": p}, x) ** 2)
    x = nets.weight(2, 4, 5)
    rule = blocks("LSTMCell")
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [rule(path, leaf) for path, leaf in paths]
    (cell,) = {name for name in names if name and "LSTMCell" in name}
    hyper = {"rho": 0.5, "alpha": 0.7}
    fn = lwsam.value_and_grad(loss, (cell,), rule=rule, **hyper)
    plain = two_gradients(
        loss, params, (x,), (cell,), has_aux=False, leaf_layers=names, **hyper
    )
    out = jax.jit(fn)(params, x)
    assert_close(out.grads, plain.grads)
    assert_close(out.norms, plain.norms)
