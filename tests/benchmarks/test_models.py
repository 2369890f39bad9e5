"""The networks are those of their papers, and evaluation counts each image once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lwsam_jax as lwsam
from lwsam_bench import models
from lwsam_bench.augment import normalize
from lwsam_bench.data import Split
from lwsam_bench.models.resnet import ResidualBlock
from lwsam_bench.training import Evaluator, make_loss_fn, make_schedule, Network


def build(name, shape, **options):
    model = models.build(name, image_shape=shape, num_classes=10, seed=0, **options)
    return Network.of(model)


def parameters(network):
    return sum(x.size for x in jax.tree.leaves(network.params))


def test_resnet20_has_the_parameters_of_the_paper():
    # 0.27 M in He et al., table 6: convolutions 267,696, dense 650, BatchNorm 1,376.
    network = build("resnet20", (32, 32, 3))
    assert parameters(network) == 269_722
    assert len(lwsam.Layers.of(network.params)) == 20
    # Two 1 x 1 convolutions, 512 + 2,048, and their BatchNorm, 64 + 128.
    assert parameters(build("resnet20", (32, 32, 3), projection=True)) == 272_474


def test_smallcnn_has_ten_layers():
    assert len(lwsam.Layers.of(build("smallcnn", (8, 8, 1)).params)) == 10


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
