"""A residual network of ten layers for images of 8 x 8 pixels and up; and one of four."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from lwsam_bench.models.init import he_normal
from lwsam_bench.models.parts import batch_norm, conv3x3
from lwsam_bench.models.resnet import ResidualBlock


# Channels and stride of each residual block.
BLOCKS = ((8, 1), (8, 1), (16, 2), (16, 1))
TINY_BLOCKS = ((4, 1),)


class SmallCNN(nnx.Module):
    """A convolution, residual blocks of two convolutions, mean, dense layer.

    Args:
      channels: Of the input images.
      num_classes: Number of outputs.
      blocks: Channels and stride of each block; None stands for `BLOCKS`.
      rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        blocks: tuple[tuple[int, int], ...] | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        blocks = blocks or BLOCKS
        inputs = blocks[0][0]
        self.depth = len(blocks)
        self.stem_conv = conv3x3(channels, inputs, 1, rngs)
        self.stem_bn = batch_norm(inputs, rngs)
        for index, (outputs, stride) in enumerate(blocks):
            block = ResidualBlock(inputs, outputs, stride, rngs=rngs)
            setattr(self, f"block{index + 1}", block)
            inputs = outputs
        self.dense = nnx.Linear(inputs, num_classes, kernel_init=he_normal, rngs=rngs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Map images f32[B, H, W, C] to logits f32[B, K]."""
        return self.dense(self.features(x, train=train))

    def features(self, x: Array, *, train: bool) -> Array:
        """Map images f32[B, H, W, C] to what the dense layer reads, f32[B, F]."""
        x = nnx.relu(self.stem_bn(self.stem_conv(x), use_running_average=not train))
        for index in range(self.depth):
            x = getattr(self, f"block{index + 1}")(x, train=train)
        return jnp.mean(x, axis=(1, 2))
