"""A small decoder-only transformer over characters, with unrolled blocks."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from lwsam_bench.models.init import normal
from lwsam_bench.models.vit import Block


class GPT(nnx.Module):
    """Embeddings of characters and places, causal blocks, LayerNorm, dense layer.

    Input and output have a matrix each: were they tied, the layer nearest to the output
    would be the one nearest to the input as well, and nothing would be cheap.

    Args:
      vocabulary: Number of different characters.
      context: The longest text that it reads, in characters.
      width: Features of a token.
      depth: Number of blocks.
      heads: Of each attention.
      rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        context: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        rngs: nnx.Rngs,
    ):
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=normal, rngs=rngs)
        self.positions = nnx.Param(normal(rngs.params(), (context, width)))
        self.depth = depth
        for index in range(depth):
            setattr(self, f"block{index + 1}", Block(width, heads, rngs=rngs))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.dense = nnx.Linear(
            width, vocabulary, use_bias=False, kernel_init=normal, rngs=rngs
        )

    def __call__(self, text: Array, *, train: bool) -> Array:
        """Map characters i32[B, T] to the logits of the next ones, f32[B, T, V]."""
        del train  # no dropout
        length = text.shape[1]
        x = self.tokens(text) + self.positions[:length]
        before = jnp.tril(jnp.ones((1, 1, length, length), bool))
        for index in range(self.depth):
            x = getattr(self, f"block{index + 1}")(x, before)
        return self.dense(self.norm(x))
