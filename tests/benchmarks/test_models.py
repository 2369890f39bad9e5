"""The networks are those of their papers, and evaluation counts each image once."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lwsam_jax as lwsam
from lwsam_bench.data.augment import normalize
from lwsam_bench.data.splits import Split
from lwsam_bench.models import by_name
from lwsam_bench.models.network import Network
from lwsam_bench.models.resnet import ResidualBlock
from lwsam_bench.training.evaluation import Evaluator
from lwsam_bench.training.recipe import make_loss_fn, make_schedule


def build(name, shape, **options):
    model = by_name.build(name, image_shape=shape, num_classes=10, seed=0, **options)
    return Network.of(model)


def shapes(name, num_classes=10, **options):
    """The network of a name with shapes in place of numbers: nothing is compiled."""
    model = nnx.eval_shape(
        lambda: by_name.build(
            name, image_shape=(32, 32, 3), num_classes=num_classes, seed=0, **options
        )
    )
    return Network.of(model, by_name.trainable(name))


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "classes", "parameters", "layers"),
    [
        # 0.27 M in He et al., table 6: convolutions 267,696, dense 650, BatchNorm 1,376.
        ("resnet20", 10, 269_722, 20),
        ("resnet8w4", 10, 5_006, 8),
        # 36.5 M, 0.7 M and 11.0 M in Zagoruyko and Komodakis.
        ("wrn28-10", 10, 36_479_194, 29),
        ("wrn28-10", 100, 36_536_884, 29),
        ("wrn16-2", 10, 691_674, 17),
        ("wrn16-8", 10, 10_961_370, 17),
        ("wrn10-1", 10, 77_850, 10),
        ("smallcnn", 10, 10_962, 10),
        ("tinycnn", 10, 470, 4),
        ("gpt", 65, 826_368, 27),
        ("gpt-tiny", 65, 5_648, 9),
    ],
)
def test_networks_have_the_parameters_of_their_papers(
    name, classes, parameters, layers
):
    network = shapes(name, classes)
    assert count(network.params) == parameters
    assert len(lwsam.Layers.of(network.params)) == layers


def test_shortcuts_with_parameters():
    # Two 1 x 1 convolutions, 512 + 2,048, and their BatchNorm, 64 + 128.
    assert count(shapes("resnet20", projection=True).params) == 272_474


@pytest.mark.parametrize(
    ("name", "head", "backbone"),
    [
        # Without its last layer, ViT-B/16 has 85.8 M.
        ("vit-b16", 768 * 512 + 512 + 512 * 100 + 100, 85_798_656),
        ("vit-tiny", 24 * 32 + 32 + 32 * 100 + 100, 16_104),
    ],
)
def test_only_the_new_layers_of_a_vit_are_trained(name, head, backbone):
    network = shapes(name, 100)
    assert count(network.params) == head
    assert count(network.model_state) == backbone
    assert lwsam.Layers.of(network.params).names == ("head/dense", "head/hidden")


@pytest.mark.parametrize(
    "name",
    ["vgg", "resnet", "resnet18", "resnet2", "resnet20w", "resnet20w0", "resnet020"]
    + ["wrn16", "wrn16-0", "wrn15-2", "wrn4-2", "vit-b32", "gpt2", "ResNet20", ""],
)
def test_a_name_that_does_not_follow_the_scheme(name):
    with pytest.raises(ValueError, match=r"resnet<depth>w<width>.*wrn<depth>-<width>"):
        by_name.build(name, image_shape=(8, 8, 3), num_classes=10, seed=0)


def test_a_frozen_backbone_stays_as_it_is(getkey):
    model = by_name.build("vit-tiny", image_shape=(8, 8, 3), num_classes=5, seed=0)
    network = Network.of(model, by_name.trainable("vit-tiny"))
    loss_fn = make_loss_fn(network, weight_decay=0.1)
    batch = {"image": jax.random.normal(getkey(), (2, 8, 8, 3)), "label": jnp.arange(2)}
    gradient = jax.jit(jax.grad(loss_fn, has_aux=True))
    grads, (model_state, _) = gradient(
        network.params, network.model_state, batch, getkey()
    )
    jax.tree.map(np.testing.assert_array_equal, model_state, network.model_state)
    assert all(np.any(g != 0) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["smallcnn", "resnet20"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (7, 9, 2)])
def test_shapes(name, shape):
    network = build(name, shape)
    logits, state = jax.eval_shape(
        lambda x: network.apply(network.params, network.model_state, x, train=True),
        jax.ShapeDtypeStruct((2, *shape), jnp.float32),
    )
    assert logits.shape == (2, 10)
    # Else each step would be compiled anew.
    assert jax.tree.structure(state) == jax.tree.structure(network.model_state)


def test_parameter_free_shortcut_drops_pixels_and_appends_zeros(getkey):
    block = ResidualBlock(4, 8, 2, rngs=nnx.Rngs(0))
    scale: Any = block.bn2.scale
    scale[...] = jnp.zeros(8)  # leaves the shortcut alone
    x = jax.random.uniform(getkey(), (2, 6, 5, 4))
    y = np.asarray(block(x, train=True))
    np.testing.assert_array_equal(y[..., 2:6], x[:, ::2, ::2])
    assert not y[..., :2].any()
    assert not y[..., 6:].any()


def test_batch_statistics_change_in_training_only(getkey):
    network = build("smallcnn", (8, 8, 1))
    x = jax.random.normal(getkey(), (16, 8, 8, 1))
    _, trained = network.apply(network.params, network.model_state, x, train=True)
    _, evaluated = network.apply(network.params, network.model_state, x, train=False)
    old = jax.tree.leaves(network.model_state)
    assert any(
        np.any(a != b) for a, b in zip(old, jax.tree.leaves(trained), strict=True)
    )
    for a, b in zip(old, jax.tree.leaves(evaluated), strict=True):
        np.testing.assert_array_equal(a, b)


def test_loss_is_smoothed_cross_entropy_plus_half_the_squared_weights(getkey):
    network = build("smallcnn", (8, 8, 1))
    batch = {"image": jax.random.normal(getkey(), (6, 8, 8, 1)), "label": jnp.arange(6)}
    loss_fn = make_loss_fn(network, weight_decay=0.5, label_smoothing=0.1)
    args = (network.params, network.model_state, batch, getkey())
    loss, (_, metrics) = loss_fn(*args)
    logits, _ = network.apply(*args[:2], batch["image"], train=True)
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = 0.9 * np.eye(10)[:6] + 0.01
    squares = sum(
        np.sum(np.asarray(w, np.float64) ** 2)
        for w in jax.tree.leaves(network.params)
        if w.ndim > 1
    )
    expected = -np.mean(np.sum(target * log_p, 1)) + 0.25 * squares
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    hits = np.mean(logits.argmax(1) == np.arange(6))
    np.testing.assert_allclose(metrics["accuracy"], hits, rtol=1e-6)


def test_evaluation_counts_each_image_once(getkey):
    network = build("smallcnn", (8, 8, 1))
    images = jax.random.randint(getkey(), (11, 8, 8, 1), 0, 256).astype(jnp.uint8)
    split = Split(np.asarray(images), np.arange(11, dtype=np.int32) % 10)
    mean, std = np.full(1, 0.3, np.float32), np.full(1, 0.2, np.float32)
    logits, _ = network.apply(
        network.params, network.model_state, normalize(images, mean, std), train=False
    )
    expected = np.mean(np.argmax(logits, 1) == split.labels)
    for batch_size in (1, 4, 11, 100):
        evaluate = Evaluator(network, split, mean=mean, std=std, batch_size=batch_size)
        result = evaluate(network.params, network.model_state)
        assert result["accuracy"] == pytest.approx(expected)
        loss = -jax.nn.log_softmax(logits)[np.arange(11), split.labels].mean()
        assert result["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_learning_rate_decays_at_epochs_100_and_130_of_150():
    schedule = make_schedule(0.1, 1500)
    steps = (0, 999, 1000, 1299, 1300, 1499)
    rates = [float(schedule(jnp.int32(step))) for step in steps]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)
    assert [schedule(step) for step in steps] == pytest.approx(rates)
