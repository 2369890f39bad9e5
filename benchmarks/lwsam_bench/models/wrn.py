"""Wide residual networks for small images (Zagoruyko and Komodakis, 2016)."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from lwsam_bench.models.init import he_normal
from lwsam_bench.models.parts import batch_norm, conv1x1, conv3x3, places


BASE_WIDTH = 16  # channels of the stem, and of the first stage before it is widened


class WideBlock(nnx.Module):
    """BatchNorm and ReLU come before each of the two 3 x 3 convolutions.

    Args:
      inputs: Channels of the input.
      outputs: Channels of the output.
      stride: Of the first convolution.
      rngs: Source of the initial parameters.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        self.bn1 = batch_norm(inputs, rngs)
        self.conv1 = conv3x3(inputs, outputs, stride, rngs)
        self.bn2 = batch_norm(outputs, rngs)
        self.conv2 = conv3x3(outputs, outputs, 1, rngs)
        self.projection = inputs != outputs
        if self.projection:
            self.shortcut_conv = conv1x1(inputs, outputs, stride, rngs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Map f32[B, H, W, inputs] to f32[B, H / stride, W / stride, outputs]."""
        fixed = not train
        y = nnx.relu(self.bn1(x, use_running_average=fixed))
        # Where the shape changes, the shortcut starts after the first activation.
        shortcut = self.shortcut_conv(y) if self.projection else x
        y = self.conv1(y)
        y = self.conv2(nnx.relu(self.bn2(y, use_running_average=fixed)))
        return shortcut + y


class WideResNet(nnx.Module):
    """A convolution, three stages of pre-activation blocks, mean, dense layer.

    Args:
      channels: Of the input images.
      num_classes: Number of outputs.
      depth: Number of convolutions and dense layers, shortcuts aside: 6 n + 4 for n
        blocks in each stage.
      width: How many times as wide as a plain residual network.
      rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        depth: int = 16,
        width: int = 2,
        rngs: nnx.Rngs,
    ):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(
                f"`WideResNet`: expected a depth of 10, 16, 22, ..., got {depth}"
            )
        self.blocks = (depth - 4) // 6
        self.stem_conv = conv3x3(channels, BASE_WIDTH, 1, rngs)
        inputs = BASE_WIDTH
        for place in places(self.blocks):
            outputs = BASE_WIDTH * width * place.widening
            block = WideBlock(inputs, outputs, place.stride, rngs=rngs)
            setattr(self, place.name, block)
            inputs = outputs
        self.last_bn = batch_norm(inputs, rngs)
        self.dense = nnx.Linear(inputs, num_classes, kernel_init=he_normal, rngs=rngs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Map images f32[B, H, W, C] to logits f32[B, K]."""
        x = self.stem_conv(x)
        for place in places(self.blocks):
            x = getattr(self, place.name)(x, train=train)
        x = nnx.relu(self.last_bn(x, use_running_average=not train))
        return self.dense(jnp.mean(x, axis=(1, 2)))
