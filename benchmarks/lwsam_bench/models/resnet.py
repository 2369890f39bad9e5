"""Residual networks for small images (He et al., 2016, section 4.2)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lwsam_bench.models.init import small_normal
from lwsam_bench.models.parts import batch_norm, conv1x1, conv3x3, places


class ResidualBlock(nnx.Module):
    """Two 3 x 3 convolutions and a shortcut.

    Args:
      inputs: Channels of the input.
      outputs: Channels of the output.
      stride: Of the first convolution.
      projection: Whether a shortcut that changes the shape is a 1 x 1 convolution with
        BatchNorm. If not, it drops pixels and appends channels of zeros: it has no
        parameters (option A of the paper, which is what it uses for small images).
      rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        projection: bool = False,
        rngs: nnx.Rngs,
    ):
        self.stride = stride
        self.new_channels = outputs - inputs
        self.conv1 = conv3x3(inputs, outputs, stride, rngs)
        self.bn1 = batch_norm(outputs, rngs)
        self.conv2 = conv3x3(outputs, outputs, 1, rngs)
        self.bn2 = batch_norm(outputs, rngs)
        self.projection = projection and (stride > 1 or inputs != outputs)
        if self.projection:
            self.shortcut_conv = conv1x1(inputs, outputs, stride, rngs)
            self.shortcut_bn = batch_norm(outputs, rngs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Map f32[B, H, W, inputs] to f32[B, H / stride, W / stride, outputs]."""
        fixed = not train
        y = nnx.relu(self.bn1(self.conv1(x), use_running_average=fixed))
        y = self.bn2(self.conv2(y), use_running_average=fixed)
        return nnx.relu(y + self._shortcut(x, fixed))

    def _shortcut(self, x: Array, fixed: bool) -> Array:
        if self.projection:
            return self.shortcut_bn(self.shortcut_conv(x), use_running_average=fixed)
        if self.stride > 1:
            x = x[:, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            after = self.new_channels - before
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)))
        return x


class ResNet(nnx.Module):
    """A convolution, three stages of residual blocks, mean, dense layer.

    Args:
      channels: Of the input images.
      num_classes: Number of outputs.
      depth: Number of convolutions and dense layers, shortcuts aside: 6 n + 2 for n
        blocks in each stage.
      width: Channels of the first stage; each of the other two has twice as many.
      projection: Whether shortcuts that change the shape have parameters.
      rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        depth: int = 20,
        width: int = 16,
        projection: bool = False,
        rngs: nnx.Rngs,
    ):
        if depth < 8 or depth % 6 != 2:
            raise ValueError(
                f"`ResNet`: expected a depth of 8, 14, 20, ..., got {depth}"
            )
        self.blocks = (depth - 2) // 6
        self.stem_conv = conv3x3(channels, width, 1, rngs)
        self.stem_bn = batch_norm(width, rngs)
        block = functools.partial(ResidualBlock, projection=projection, rngs=rngs)
        inputs = width
        for place in places(self.blocks):
            outputs = width * place.widening
            setattr(self, place.name, block(inputs, outputs, place.stride))
            inputs = outputs
        self.dense = nnx.Linear(
            inputs, num_classes, kernel_init=small_normal, rngs=rngs
        )

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Map images f32[B, H, W, C] to logits f32[B, K]."""
        x = self.stem_bn(self.stem_conv(x), use_running_average=not train)
        x = jax.nn.relu(x)
        for place in places(self.blocks):
            x = getattr(self, place.name)(x, train=train)
        return self.dense(jnp.mean(x, axis=(1, 2)))
