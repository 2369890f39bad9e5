"""A vision transformer whose last layer is replaced by two new ones.

The layer-wise SAM paper attaches two fully connected layers to a ViT-B/16 that was
trained on ImageNet, and trains the new layers alone. It does not say how wide the first
one is, nor what comes between the two: here 512 features and a ReLU.
"""

import jax
from flax import nnx
from jax import Array

from lwsam_bench.models.init import he_normal, small_normal
from lwsam_bench.models.vit import ViT


HIDDEN = 512  # features between the new layers
CHANNELS = 3  # of the images for which the backbone was trained

# What is trained; all other parameters are part of the model state.
TRAINABLE = nnx.All(nnx.Param, nnx.PathContains("head"))


class Head(nnx.Module):
    """Two fully connected layers with a ReLU between them.

    Args:
      features: Of the input.
      num_classes: Number of outputs.
      hidden: Features between the layers.
      rngs: Source of the initial parameters.
    """

    def __init__(self, features: int, num_classes: int, *, hidden: int, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(features, hidden, kernel_init=he_normal, rngs=rngs)
        self.dense = nnx.Linear(
            hidden, num_classes, kernel_init=small_normal, rngs=rngs
        )

    def __call__(self, x: Array) -> Array:
        """Map f32[B, D] to logits f32[B, K]."""
        return self.dense(nnx.relu(self.hidden(x)))


class FineTunedViT(nnx.Module):
    """Images brought to the size of the backbone, the backbone, a new head.

    `TRAINABLE` tells the parameters of the head from those of the backbone.

    Args:
      num_classes: Number of outputs.
      image_size: Sides in pixels of the images for which the backbone is made.
      patch: Pixels at each side of a patch.
      width: Features of a token.
      depth: Number of blocks.
      heads: Of each attention.
      hidden: Features between the new layers.
      rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: int = 224,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = HIDDEN,
        rngs: nnx.Rngs,
    ):
        self.image_size = image_size
        self.backbone = ViT(
            (image_size, image_size, CHANNELS),
            None,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            rngs=rngs,
        )
        self.head = Head(width, num_classes, hidden=hidden, rngs=rngs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Map images f32[B, H, W, 3] of any size to logits f32[B, K]."""
        del train  # no dropout
        shape = (x.shape[0], self.image_size, self.image_size, x.shape[-1])
        if x.shape != shape:
            x = jax.image.resize(x, shape, "bilinear")
        return self.head(self.backbone.features(x))
