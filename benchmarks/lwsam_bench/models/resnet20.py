"""ResNet-20 for small images (He et al., 2016, section 4.2)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lwsam_bench.models.init import he_normal, small_normal


BLOCKS = 3  # in each stage
WIDTHS = (16, 32, 64)  # channels of each stage

# The running statistics take in a tenth of each batch, as in the original.
_BN_MOMENTUM = 0.9


def conv3x3(inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    """Return a 3 x 3 convolution without bias, for BatchNorm follows it."""
    return nnx.Conv(
        inputs,
        outputs,
        kernel_size=(3, 3),
        strides=(stride, stride),
        padding=1,
        use_bias=False,
        kernel_init=he_normal,
        rngs=rngs,
    )


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Return a BatchNorm over images f32[B, H, W, features]."""
    return nnx.BatchNorm(features, momentum=_BN_MOMENTUM, epsilon=1e-5, rngs=rngs)


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
            self.shortcut_conv = nnx.Conv(
                inputs,
                outputs,
                kernel_size=(1, 1),
                strides=(stride, stride),
                use_bias=False,
                kernel_init=he_normal,
                rngs=rngs,
            )
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


class ResNet20(nnx.Module):
    """A convolution, three stages of three residual blocks, mean, dense layer.

    Args:
      channels: Of the input images.
      num_classes: Number of outputs.
      projection: Whether shortcuts that change the shape have parameters.
      rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        projection: bool = False,
        rngs: nnx.Rngs,
    ):
        self.stem_conv = conv3x3(channels, WIDTHS[0], 1, rngs)
        self.stem_bn = batch_norm(WIDTHS[0], rngs)
        block = functools.partial(ResidualBlock, projection=projection, rngs=rngs)
        inputs = WIDTHS[0]
        for name, stage, index in _blocks():
            stride = 2 if stage > 0 and index == 0 else 1
            setattr(self, name, block(inputs, WIDTHS[stage], stride))
            inputs = WIDTHS[stage]
        self.dense = nnx.Linear(
            inputs, num_classes, kernel_init=small_normal, rngs=rngs
        )

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Map images f32[B, H, W, C] to logits f32[B, K]."""
        x = self.stem_bn(self.stem_conv(x), use_running_average=not train)
        x = jax.nn.relu(x)
        for name, _, _ in _blocks():
            x = getattr(self, name)(x, train=train)
        return self.dense(jnp.mean(x, axis=(1, 2)))


def _blocks() -> list[tuple[str, int, int]]:
    """Name, stage and place in the stage of each block, from the input on."""
    return [
        (f"stage{stage + 1}_block{index + 1}", stage, index)
        for stage in range(len(WIDTHS))
        for index in range(BLOCKS)
    ]
