"""The networks, by name."""

from flax import nnx

from lwsam_bench.models.resnet20 import ResNet20
from lwsam_bench.models.smallcnn import SmallCNN


def build(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    seed: int,
    projection: bool = False,
) -> nnx.Module:
    """Make a network with fresh parameters.

    Args:
      name: `smallcnn` or `resnet20`.
      image_shape: Height, width and channels of its input.
      num_classes: Number of its outputs.
      seed: Decides the initial parameters.
      projection: For `resnet20`, whether shortcuts that change the shape have
        parameters.

    Returns:
      A module to be called as `model(images, train=...)`, f32[B, H, W, C] to f32[B, K].
    """
    rngs = nnx.Rngs(seed)
    channels = image_shape[-1]
    if name == "smallcnn":
        return SmallCNN(channels, num_classes, rngs=rngs)
    if name == "resnet20":
        return ResNet20(channels, num_classes, projection=projection, rngs=rngs)
    raise ValueError(f"`build`: unknown model {name!r}")
