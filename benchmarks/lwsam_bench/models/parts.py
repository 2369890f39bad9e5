"""What residual networks for small images have in common."""

from typing import NamedTuple

from flax import nnx

from lwsam_bench.models.init import he_normal


STAGES = 3  # each after the first halves the sides and doubles the channels

# The running statistics take in a tenth of each batch, as in the original.
_BN_MOMENTUM = 0.9


class Place(NamedTuple):
    """Where a block stands.

    Attributes:
      name: Of the block.
      widening: How many times as many channels as in the first stage.
      stride: Of the first convolution.
    """

    name: str
    widening: int
    stride: int


def places(blocks: int) -> list[Place]:
    """Return the place of each block, from the input on.

    Args:
      blocks: Number of blocks in each stage.
    """
    return [
        Place(
            name=f"stage{stage + 1}_block{index + 1}",
            widening=2**stage,
            stride=2 if stage > 0 and index == 0 else 1,
        )
        for stage in range(STAGES)
        for index in range(blocks)
    ]


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


def conv1x1(inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    """Return a 1 x 1 convolution without bias, for a shortcut that changes the shape."""
    return nnx.Conv(
        inputs,
        outputs,
        kernel_size=(1, 1),
        strides=(stride, stride),
        use_bias=False,
        kernel_init=he_normal,
        rngs=rngs,
    )


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Return a BatchNorm over images f32[B, H, W, features]."""
    return nnx.BatchNorm(features, momentum=_BN_MOMENTUM, epsilon=1e-5, rngs=rngs)
