"""A published ViT is read into the backbone; random weights of its layout stand in."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import numpy as safetensors

from lwsam_bench.commands.cli import _parser
from lwsam_bench.commands.train import train_config
from lwsam_bench.models.finetune import FineTunedViT
from lwsam_bench.support.errors import UserError
from lwsam_bench.training import vit_checkpoint


WIDTH, DEPTH, HEADS, PATCH, SIZE = 12, 2, 3, 4, 8


def layout(seed=0):
    """Names and shapes of timm's vit_base_patch16_224, at a tiny size."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(0.0, 0.3, shape).astype(np.float32)
    arrays = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, (SIZE // PATCH) ** 2 + 1, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": 1 + draw(WIDTH),
        "norm.bias": draw(WIDTH),
        "head.weight": draw(1000, WIDTH),
        "head.bias": draw(1000),
    }
    for i in range(DEPTH):
        arrays |= {
            f"blocks.{i}.norm1.weight": 1 + draw(WIDTH),
            f"blocks.{i}.norm1.bias": draw(WIDTH),
            f"blocks.{i}.attn.qkv.weight": draw(3 * WIDTH, WIDTH),
            f"blocks.{i}.attn.qkv.bias": draw(3 * WIDTH),
            f"blocks.{i}.attn.proj.weight": draw(WIDTH, WIDTH),
            f"blocks.{i}.attn.proj.bias": draw(WIDTH),
            f"blocks.{i}.norm2.weight": 1 + draw(WIDTH),
            f"blocks.{i}.norm2.bias": draw(WIDTH),
            f"blocks.{i}.mlp.fc1.weight": draw(4 * WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc1.bias": draw(4 * WIDTH),
            f"blocks.{i}.mlp.fc2.weight": draw(WIDTH, 4 * WIDTH),
            f"blocks.{i}.mlp.fc2.bias": draw(WIDTH),
        }
    return arrays


def features(arrays, images):
    """The class token of a ViT, in float64 NumPy and PyTorch's conventions."""
    a = {name: x.astype(np.float64) for name, x in arrays.items()}
    dense = lambda x, name: x @ a[f"{name}.weight"].T + a[f"{name}.bias"]
    gelu = lambda x: (
        0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    )

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * a[f"{name}.weight"] + a[f"{name}.bias"]

    def attention(x, name):
        batch, tokens, width = x.shape
        qkv = dense(x, f"{name}.qkv").reshape(batch, tokens, 3, HEADS, width // HEADS)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(width // HEADS)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = (scores @ v).transpose(0, 2, 1, 3).reshape(batch, tokens, width)
        return dense(x, f"{name}.proj")

    side = SIZE // PATCH
    patches = images.reshape(-1, side, PATCH, side, PATCH, 3).transpose(
        0, 1, 3, 5, 2, 4
    )
    kernel = a["patch_embed.proj.weight"].reshape(WIDTH, -1)
    x = patches.reshape(len(images), side * side, -1) @ kernel.T
    x += a["patch_embed.proj.bias"]
    token = np.broadcast_to(a["cls_token"], (len(images), 1, WIDTH))
    x = np.concatenate([token, x], axis=1) + a["pos_embed"]
    for i in range(DEPTH):
        x = x + attention(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn")
        hidden = gelu(dense(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + dense(hidden, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def network():
    return FineTunedViT(
        5,
        image_size=SIZE,
        patch=PATCH,
        width=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        hidden=7,
        rngs=nnx.Rngs(0),
    )


def write(tmp_path, arrays):
    path = tmp_path / "model.safetensors"
    safetensors.save_file(arrays, path)
    return path


def test_features_are_those_of_the_published_network(tmp_path):
    arrays, model = layout(), network()
    head = jax.tree.map(np.asarray, nnx.state(model.head))
    vit_checkpoint.load(model, write(tmp_path, arrays))
    images = np.random.default_rng(1).uniform(-1, 1, (3, SIZE, SIZE, 3))
    graphdef, state = nnx.split(model)

    @jax.jit
    def apply(state, x):
        merged: Any = nnx.merge(graphdef, state)
        return merged.backbone.features(x)

    found = apply(state, images.astype(np.float32))
    np.testing.assert_allclose(found, features(arrays, images), atol=2e-5)
    for old, new in zip(
        jax.tree.leaves(head), jax.tree.leaves(nnx.state(model.head)), strict=True
    ):
        np.testing.assert_array_equal(old, new)  # the head stays new


def test_every_parameter_of_the_backbone_is_read():
    arrays, model, missing = layout(), network(), []
    places = [
        p for _, p, _ in vit_checkpoint.converted(arrays, model.backbone, missing)
    ]
    assert len(set(places)) == len(jax.tree.leaves(nnx.state(model.backbone)))
    assert not missing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, "it has no norm.weight"),
        ({"blocks.2.norm1.bias": np.zeros(3)}, "it has blocks.2.norm1.bias"),
        ({"pos_embed": np.zeros((1, 197, WIDTH))}, "pos_embed of shape .*197"),
        ({"blocks.0.attn.qkv.bias": np.zeros(7)}, "qkv.bias of shape"),
    ],
)
def test_another_network_is_refused(tmp_path, changes, message):
    arrays = layout() | changes
    path = write(tmp_path, {n: x for n, x in arrays.items() if x is not None})
    with pytest.raises(UserError, match=message):
        vit_checkpoint.load(network(), path)


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        vit_checkpoint.load(network(), path)


def test_where_the_weights_are_looked_for(tmp_path):
    def config(*arguments):
        return train_config(_parser().parse_args(["train", *arguments]))

    published = config("--dataset", "cifar100", "--model", "vit-b16")
    with pytest.raises(UserError, match="--model vit-b16 needs the weights"):
        vit_checkpoint.find(published, str(tmp_path))
    assert vit_checkpoint.digest(published, str(tmp_path)) is None
    path = tmp_path / vit_checkpoint.FILE
    path.write_bytes(b"1")
    assert vit_checkpoint.find(published, str(tmp_path)) == path
    one = vit_checkpoint.digest(published, str(tmp_path))
    path.write_bytes(b"2")
    assert vit_checkpoint.digest(published, str(tmp_path)) not in (one, None)
    named = config("--model", "vit-tiny", "--weights", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no file .*none"):
        vit_checkpoint.find(named, None)
    assert vit_checkpoint.find(config("--model", "vit-tiny"), str(tmp_path)) is None
