"""On whole networks, unrolled, the cost model agrees with XLA's count."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lwsam_jax as lwsam
from lwsam_bench.models.gpt import GPT
from lwsam_bench.models.network import Network
from lwsam_bench.models.resnet import ResNet
from lwsam_bench.models.vit import ViT
from lwsam_bench.models.wrn import WideResNet
from lwsam_bench.support.measure import flops
from lwsam_bench.training.recipe import make_loss_fn, next_character_loss


IMAGES = {"image": jnp.zeros((2, 16, 16, 3)), "label": jnp.zeros((2,), jnp.int32)}
TEXT = {name: jnp.zeros((2, 48), jnp.int32) for name in ("text", "next")}

# Real depth and kinds of layers; small widths and batches, which compile sooner.
NETS = {
    "ResNet-20": (lambda rngs: ResNet(3, 10, rngs=rngs), make_loss_fn, IMAGES),
    "WRN-16-2": (lambda rngs: WideResNet(3, 10, rngs=rngs), make_loss_fn, IMAGES),
    "ViT": (
        lambda rngs: ViT(
            (16, 16, 3), 10, patch=2, width=96, depth=2, heads=3, rngs=rngs
        ),
        make_loss_fn,
        IMAGES,
    ),
    "GPT": (
        lambda rngs: GPT(65, context=48, width=96, depth=2, rngs=rngs),
        next_character_loss,
        TEXT,
    ),
}


@functools.cache
def case(name):
    """Loss, arguments, cost model, and XLA's count of a plain gradient."""
    make, make_loss, batch = NETS[name]
    network = Network.of(make(nnx.Rngs(0)))
    loss = make_loss(network)
    args = (network.params, network.model_state, batch, jax.random.key(0))
    return loss, args, lwsam.step_cost(loss, *args), xla(loss, args)


def xla(loss, args, selection=None):
    fn = jax.value_and_grad(loss, has_aux=True)
    if selection is not None:
        fn = lwsam.value_and_grad(loss, selection, rho=0.1, alpha=0.8, has_aux=True)
    return flops(jax.jit(fn).lower(*args).compile())


def by_depth(layers):
    """The names of the layers from the input to the output."""
    return [name for _, name in sorted(zip(layers.depth, layers.names, strict=True))]


@pytest.mark.parametrize("which", ["last two", "middle and last"])
@pytest.mark.parametrize("name", NETS)
def test_ratio_agrees_with_xla(name, which):
    loss, args, cost, plain = case(name)
    names = by_depth(cost.layers)
    first = names[-2] if which == "last two" else names[len(names) // 2]
    selection = (first, names[-1])
    expected = xla(loss, args, selection) / plain
    assert cost.ratio(selection) == pytest.approx(expected, rel=0.02)
    assert 1.03 < expected < 1.5


@pytest.mark.parametrize("name", NETS)
def test_ratio_of_an_ascent_on_half_the_batch_agrees_with_xla(name):
    loss, args, cost, plain = case(name)
    names = by_depth(cost.layers)
    selection = (names[len(names) // 2], names[-1])
    ascent = lwsam.micro_batch(0.5)
    method = lwsam.Method(lwsam.everything(), rho=0.1, ascent=ascent)
    fn = lwsam.value_and_grad(loss, selection, method=method, has_aux=True)

    def step(params, model_state, batch, key):
        part = jax.tree.map(lambda x: x[:1], batch)
        return fn(params, model_state, batch, key, ascent_args=(model_state, part, key))

    expected = flops(jax.jit(step).lower(*args).compile()) / plain
    assert cost.ratio(selection, ascent) == pytest.approx(expected, rel=0.02)
    assert 1.2 < expected < 1.4


@pytest.mark.parametrize("name", ["GPT", "ViT"])
def test_all_layers_agree_with_xla(name):
    loss, args, cost, plain = case(name)
    selection = cost.layers.names
    expected = xla(loss, args, selection) / plain
    assert cost.ratio(selection) == pytest.approx(expected, rel=0.02)
