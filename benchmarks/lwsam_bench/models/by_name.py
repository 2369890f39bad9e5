"""The networks, by name."""

from flax import nnx

from lwsam_bench.models import names
from lwsam_bench.models.finetune import FineTunedViT, TRAINABLE
from lwsam_bench.models.gpt import GPT
from lwsam_bench.models.resnet import ResNet
from lwsam_bench.models.smallcnn import SmallCNN, TINY_BLOCKS
from lwsam_bench.models.wrn import WideResNet


_GPT_SIZES = {
    "gpt-small": dict(context=16, width=32, depth=2, heads=4),
    "gpt-tiny": dict(context=16, width=16, depth=1, heads=2),
}


def build(
    name: str,
    *,
    image_shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    projection: bool = False,
) -> nnx.Module:
    """Make a network with fresh parameters.

    Args:
      name: As `names.SCHEME` has it. `vit-b16` and `vit-tiny` are a backbone with
        a new head, of which `trainable` tells the parameters; `tinycnn`, `vit-tiny` and
        `gpt-tiny` are of no use but to run the code quickly.
      image_shape: Height, width and channels of its input; not looked at for a text.
      num_classes: Number of its outputs: classes, or characters of the vocabulary.
      seed: Decides the initial parameters.
      projection: For a `resnet`, whether shortcuts that change the shape have
        parameters.

    Returns:
      A module to be called as `model(images, train=...)`, f32[B, H, W, C] to f32[B, K];
      of a `gpt`, i32[B, T] to f32[B, T, K].

    Raises:
      ValueError: If the name does not follow the scheme.
    """
    parsed = names.parse(name)
    rngs = nnx.Rngs(seed)
    match parsed.family:
        case "gpt":
            return GPT(num_classes, **_GPT_SIZES.get(name, {}), rngs=rngs)
        case "vit":
            tiny = dict(image_size=16, patch=4, width=24, depth=2, heads=2, hidden=32)
            sizes = tiny if name == "vit-tiny" else {}
            return FineTunedViT(num_classes, **sizes, rngs=rngs)
    channels = image_shape[-1]
    match parsed.family:
        case "smallcnn":
            blocks = TINY_BLOCKS if name == "tinycnn" else None
            return SmallCNN(channels, num_classes, blocks, rngs=rngs)
        case "resnet":
            return ResNet(
                channels,
                num_classes,
                depth=parsed.depth,
                width=parsed.width,
                projection=projection,
                rngs=rngs,
            )
    return WideResNet(
        channels, num_classes, depth=parsed.depth, width=parsed.width, rngs=rngs
    )


def trainable(name: str) -> object:
    """Return the filter of NNX for the parameters of a network that are trained."""
    return TRAINABLE if names.parse(name).family == "vit" else nnx.Param
