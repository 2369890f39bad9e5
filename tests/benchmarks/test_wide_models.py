"""The wide and deep networks are those of their papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lwsam_jax as lwsam
from lwsam_bench.models.gpt import GPT
from lwsam_bench.models.network import Network
from lwsam_bench.models.vit import ViT
from lwsam_bench.models.wrn import WideResNet


def layers_and_parameters(make):
    """From shapes alone: nothing is drawn."""
    params = nnx.state(nnx.eval_shape(make), nnx.Param)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    return lwsam.Layers.of(params).names, count


def logits(model, x, train=True):
    """Compiled as a whole: operation by operation takes far longer."""
    network = Network.of(model)
    apply = jax.jit(network.apply, static_argnames="train")
    y, state = apply(network.params, network.model_state, x, train=train)
    # Else each step would be compiled anew.
    assert jax.tree.structure(state) == jax.tree.structure(network.model_state)
    return np.asarray(y)


@pytest.mark.parametrize(
    ("depth", "width", "parameters"),
    # 0.7 M, 36.5 M and 8.9 M in the paper.
    [(16, 2, 691_674), (28, 10, 36_479_194), (40, 4, 8_949_210)],
)
def test_wide_resnet(depth, width, parameters):
    names, count = layers_and_parameters(
        lambda: WideResNet(3, 10, depth=depth, width=width, rngs=nnx.Rngs(0))
    )
    assert count == parameters
    shortcuts = [name for name in names if name.endswith("shortcut_conv")]
    assert len(names) == depth - 2 + len(shortcuts)
    assert len(shortcuts) == 3


def test_wide_resnet_refuses_depths_without_whole_blocks():
    with pytest.raises(ValueError, match=r"expected a depth of 10, 16"):
        WideResNet(3, 10, depth=20, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("size", "patch", "classes", "parameters"),
    # The first is ViT-S/16 as published for ImageNet, 22.05 M.
    [(224, 16, 1000, 22_050_664), (32, 4, 10, 21_342_346)],
)
def test_vit_s(size, patch, classes, parameters):
    names, count = layers_and_parameters(
        lambda: ViT((size, size, 3), classes, patch=patch, rngs=nnx.Rngs(0))
    )
    assert count == parameters
    # Patches, positions, dense layer, and in each block four of attention, two of MLP.
    assert len(names) == 3 + 12 * 6


def test_vit_refuses_images_that_patches_do_not_fill():
    with pytest.raises(ValueError, match="patch of 16"):
        ViT((32, 40, 3), 10, rngs=nnx.Rngs(0))


def test_gpt_has_the_parameters_that_its_shape_gives():
    names, count = layers_and_parameters(lambda: GPT(65, rngs=nnx.Rngs(0)))
    width, hidden = 128, 512
    block = 4 * (width**2 + width) + 2 * width * hidden + hidden + width + 4 * width
    assert count == 2 * 65 * width + 128 * width + 4 * block + 2 * width
    assert len(names) == 3 + 4 * 6


@pytest.mark.parametrize("train", [True, False])
def test_shapes(train):
    images = jnp.ones((2, 16, 16, 3))
    wide = WideResNet(3, 7, depth=10, rngs=nnx.Rngs(0))
    assert logits(wide, images, train).shape == (2, 7)
    vit = ViT((16, 16, 3), 7, patch=4, width=24, depth=1, heads=3, rngs=nnx.Rngs(0))
    assert logits(vit, images, train).shape == (2, 7)


def test_gpt_does_not_see_what_comes_next(getkey):
    gpt = GPT(11, context=9, width=16, depth=2, heads=2, rngs=nnx.Rngs(0))
    text = jax.random.randint(getkey(), (2, 9), 0, 11)
    found = logits(gpt, text)
    assert found.shape == (2, 9, 11)
    other = logits(gpt, text.at[:, 5].add(1) % 11)
    np.testing.assert_array_equal(found[:, :5], other[:, :5])
    assert (found[:, 5:] != other[:, 5:]).any()
    # A shorter text is read as the beginning of a longer one.
    np.testing.assert_allclose(logits(gpt, text[:, :4]), found[:, :4], atol=1e-5)


def test_depth_of_the_layers_follows_the_network():
    vit = ViT((8, 8, 3), 5, patch=4, width=12, depth=2, heads=2, rngs=nnx.Rngs(0))
    network = Network.of(vit)

    def loss(params, x):
        return jnp.sum(network.apply(params, network.model_state, x, train=True)[0])

    layers = lwsam.Layers.of(network.params, None, loss, jnp.zeros((2, 8, 8, 3)))
    names = [name for _, name in sorted(zip(layers.depth, layers.names, strict=True))]
    assert names[:2] == ["patches", "positions"]
    assert names[-2:] == ["block2/mlp_out", "dense"]
