"""Tiny networks in Linen, NNX, Equinox and Haiku, as cases like those of `nets`."""

import functools
import inspect

import jax
import jax.numpy as jnp
import pytest

from nets import Case, weight


CASES = {}


def case(make):
    CASES[make.__name__] = make
    return make


def key(seed):
    """Of the implementation that compiles fastest; a case of `nets` has the default."""
    return jax.random.key(seed, impl="unsafe_rbg")


def images(size=4):
    return weight(size, 6, 6, 3, seed=5)


# --- Linen ----------------------------------------------------------------------------


def linen_case(module, x, names, depth, selected, mutable=(), **apply):
    rngs = {"params": key(0), "dropout": key(1)}
    variables = jax.jit(functools.partial(module.init, **apply))(rngs, x)
    params = variables.pop("params")

    def loss(params, variables, x, key):
        y, new = module.apply(
            {"params": params, **variables},
            x,
            rngs={"dropout": key},
            mutable=list(mutable),
            **apply,
        )
        return jnp.mean(y**2) + jnp.mean(jnp.sin(y)), (new, y)

    args = (variables, x, key(2))
    return Case(loss, params, args, names, depth, selected)


@case
def linen_residual_cnn():
    """Linen's tree order puts the first convolution after the blocks."""
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            y = nn.Conv(4, (3, 3), use_bias=False)(x)
            y = nn.BatchNorm(use_running_average=not train)(y)
            y = nn.Conv(4, (3, 3), use_bias=False)(nn.relu(y))
            return nn.relu(x + nn.Dropout(0.3, deterministic=not train)(y))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            x = Block()(x, train)
            return nn.Dense(2)(x.mean(axis=(1, 2)))

    blocks = ("Block_0/Conv_0", "Block_0/Conv_1")
    return linen_case(
        Net(),
        images(),
        (*blocks, "Conv_0", "Dense_0"),
        ("Conv_0", *blocks, "Dense_0"),
        ("Dense_0", "Block_0/Conv_1"),
        mutable=("batch_stats",),
        train=True,
    )


@case
def linen_attention():
    """Flax attention biases have rank 2 and are no layers."""
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(
                num_heads=2, dropout_rate=0.2, deterministic=False, name="attend"
            )(nn.LayerNorm()(x))
            return nn.Dense(2)(x)

    part = "attend/{}".format
    return linen_case(
        Net(),
        weight(3, 5, 4),
        ("Dense_0", part("key"), part("out"), part("query"), part("value")),
        (part("query"), part("key"), part("value"), part("out"), "Dense_0"),
        ("Dense_0", part("out")),
    )


_STACK = tuple(f"stack/Dense_0/{i}" for i in range(3))


@case
def linen_remat_and_scan():
    nn = pytest.importorskip("flax.linen")

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(4)(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.remat(Cell)(name="first")(x, None)[0]
            stack = nn.scan(
                nn.remat(Cell),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = stack(name="stack")(x, None)
            return nn.Dense(2, name="classify")(x)

    return linen_case(
        Net(),
        weight(5, 4),
        ("classify", "first/Dense_0", *_STACK),
        ("first/Dense_0", *_STACK, "classify"),
        _STACK[1:2],
    )._replace(stack="stack/")


# --- NNX ------------------------------------------------------------------------------


def nnx_merge(nnx, *states):
    """`nnx.merge` on copies; the oldest Flax copies anyway and has no such argument."""
    copies = "copy" in inspect.signature(nnx.merge).parameters
    return nnx.merge(*states, **({"copy": True} if copies else {}))


def nnx_case(nnx, model, x, names, depth, selected):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, x):
        model = nnx_merge(nnx, graphdef, params, rest)
        y = model(x)
        _, _, rest = nnx.split(model, nnx.Param, ...)
        return jnp.mean(y**2) + jnp.mean(jnp.sin(y)), (rest, y)

    return Case(loss, params, (rest, x), names, depth, selected)


@case
def nnx_residual_cnn():
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.3, rngs=rngs)

        def __call__(self, x):
            return x + self.drop(nnx.relu(self.norm(self.conv(x))))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.block = Block(rngs)
            self.classify = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            x = self.block(nnx.relu(self.stem(x)))
            return self.classify(x.mean(axis=(1, 2)))

    return nnx_case(
        nnx,
        Net(nnx.Rngs(key(0))),
        images(),
        ("block/conv", "classify", "stem"),
        ("stem", "block/conv", "classify"),
        ("block/conv", "classify"),
    )


@case
def nnx_attention():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.attend = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
            self.classify = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.classify(x + self.attend(x))

    part = "attend/{}".format
    return nnx_case(
        nnx,
        Net(nnx.Rngs(key(0))),
        weight(3, 5, 4),
        (part("key"), part("out"), part("query"), part("value"), "classify"),
        (part("query"), part("key"), part("value"), part("out"), "classify"),
        ("classify", part("value")),
    )


@case
def nnx_scan_over_blocks():
    """The blocks are made by `nnx.vmap` and run by `nnx.scan`."""
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return x + jnp.tanh(self.linear(x))

    class Net(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(Block, in_axes=0, out_axes=0)
            self.stem = nnx.Linear(4, 4, rngs=rngs)
            self.blocks = nnx.split_rngs(splits=3)(make)(rngs)
            self.classify = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            run = nnx.scan(
                lambda x, block: block(x),
                in_axes=(nnx.Carry, 0),
                out_axes=nnx.Carry,
            )
            return self.classify(run(self.stem(x), self.blocks))

    blocks = tuple(f"blocks/linear/{i}" for i in range(3))
    return nnx_case(
        nnx,
        Net(nnx.Rngs(key(0))),
        weight(5, 4),
        (*blocks, "classify", "stem"),
        ("stem", *blocks, "classify"),
        ("blocks/linear/1", "classify"),
    )._replace(stack="blocks/")


# --- Equinox --------------------------------------------------------------------------


@case
def equinox_stack_of_blocks():
    """`filter_vmap` makes the stack, `lax.scan` runs it, with remat."""
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):
        norm: eqx.nn.LayerNorm
        linear: eqx.nn.Linear

        def __call__(self, x):
            return x + jnp.tanh(self.linear(self.norm(x)))

    class Net(eqx.Module):
        blocks: Block
        classify: eqx.nn.Linear

        def __call__(self, x):
            arrays, static = eqx.partition(self.blocks, eqx.is_array)
            body = lambda x, one: (eqx.combine(one, static)(x), None)
            x, _ = jax.lax.scan(jax.checkpoint(body), x, arrays)
            return self.classify(x)

    make = lambda key: Block(eqx.nn.LayerNorm(4), eqx.nn.Linear(4, 4, key=key))
    keys = jax.random.split(key(0), 4)
    net = Net(eqx.filter_vmap(make)(keys[:3]), eqx.nn.Linear(4, 2, key=keys[3]))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def loss(params, x):
        y = jax.vmap(eqx.combine(params, static))(x)
        return jnp.mean(y**2), y

    blocks = tuple(f"blocks/linear/weight/{i}" for i in range(3))
    names = (*blocks, "classify/weight")
    return Case(loss, params, (weight(6, 4),), names, names, blocks[1:], "blocks/")


@case
def equinox_mlp_with_layer_norm_and_dropout():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        mlp: eqx.nn.MLP
        norm: eqx.nn.LayerNorm
        drop: eqx.nn.Dropout
        classify: eqx.nn.Linear

        def __call__(self, x, key):
            return self.classify(self.drop(self.norm(self.mlp(x)), key=key))

    keys = jax.random.split(key(0))
    net = Net(
        eqx.nn.MLP(4, 5, 6, 1, key=keys[0]),
        eqx.nn.LayerNorm(5),
        eqx.nn.Dropout(0.3),
        eqx.nn.Linear(5, 2, key=keys[1]),
    )
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def loss(params, x, key):
        net = eqx.combine(params, static)
        y = jax.vmap(net)(x, jax.random.split(key, len(x)))
        return jnp.mean(y**2), y

    names = ("mlp/layers/0/weight", "mlp/layers/1/weight", "classify/weight")
    args = (weight(6, 4), key(1))
    return Case(loss, params, args, names, names, ("mlp/layers/1/weight",))


# --- Haiku ----------------------------------------------------------------------------


@case
def haiku_cnn_with_batch_norm_and_dropout():
    hk = pytest.importorskip("haiku")

    def net(x):
        x = hk.Conv2D(4, 3, name="z_stem")(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
        x = hk.dropout(hk.next_rng_key(), 0.3, jax.nn.relu(x))
        return hk.nets.MLP([5, 2])(x.mean(axis=(1, 2)))

    forward = hk.transform_with_state(net)
    params, state = jax.jit(forward.init)(key(0), images())

    def loss(params, state, x, key):
        y, state = forward.apply(params, state, key, x)
        return jnp.mean(y**2), (state, y)

    names = ("mlp/~/linear_0/w", "mlp/~/linear_1/w", "z_stem/w")
    depth = ("z_stem/w", "mlp/~/linear_0/w", "mlp/~/linear_1/w")
    args = (state, images(), key(1))
    return Case(loss, params, args, names, depth, ("mlp/~/linear_1/w",))
