"""Vision transformers (Dosovitskiy et al., 2021), with unrolled blocks."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lwsam_bench.models.init import normal


_EPSILON = 1e-6  # of LayerNorm, as in the original
_MLP_RATIO = 4  # hidden units of an MLP over the width


class Block(nnx.Module):
    """Attention and an MLP, each after a LayerNorm and beside a shortcut.

    Args:
      width: Features of a token.
      heads: Of the attention; they divide the width.
      rngs: Source of the initial parameters.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=_EPSILON, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=heads,
            in_features=width,
            decode=False,
            kernel_init=normal,
            rngs=rngs,
        )
        self.norm2 = nnx.LayerNorm(width, epsilon=_EPSILON, rngs=rngs)
        hidden = _MLP_RATIO * width
        self.mlp_in = nnx.Linear(width, hidden, kernel_init=normal, rngs=rngs)
        self.mlp_out = nnx.Linear(hidden, width, kernel_init=normal, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Map tokens f32[B, T, D] to f32[B, T, D]; bool[..., T, T] masks attention."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.norm2(x))))


class ViT(nnx.Module):
    """Patches, a class token, transformer blocks, LayerNorm, dense layer.

    The defaults are the shape of ViT-S.

    Args:
      image_shape: Height, width and channels of the images.
      num_classes: Number of outputs; None for a network without its last layer, that
        ends with `features`.
      patch: Pixels at each side of a patch.
      width: Features of a token.
      depth: Number of blocks.
      heads: Of each attention.
      rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int | None,
        *,
        patch: int = 16,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        rngs: nnx.Rngs,
    ):
        height, across, channels = image_shape
        if height % patch or across % patch:
            raise ValueError(
                f"`ViT`: expected images whose sides divide by the patch of {patch},"
                f" got {height} x {across}"
            )
        tokens = (height // patch) * (across // patch)
        self.patches = nnx.Conv(
            channels,
            width,
            kernel_size=(patch, patch),
            strides=(patch, patch),
            padding="VALID",
            kernel_init=normal,
            rngs=rngs,
        )
        # Of rank 1: a vector that is added to the input, as a bias is, is no layer.
        self.class_token = nnx.Param(jnp.zeros((width,)))
        self.positions = nnx.Param(normal(rngs.params(), (tokens + 1, width)))
        self.depth, self.heads = depth, heads
        for index in range(depth):
            setattr(self, f"block{index + 1}", Block(width, heads, rngs=rngs))
        self.norm = nnx.LayerNorm(width, epsilon=_EPSILON, rngs=rngs)
        if num_classes is not None:
            self.dense = nnx.Linear(width, num_classes, kernel_init=normal, rngs=rngs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Map images f32[B, H, W, C] to logits f32[B, K]."""
        del train  # no dropout
        return self.dense(self.features(x))

    def features(self, x: Array) -> Array:
        """Map images f32[B, H, W, C] to the class token after the blocks, f32[B, D]."""
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...]
        for index in range(self.depth):
            x = getattr(self, f"block{index + 1}")(x)
        return self.norm(x)[:, 0]
