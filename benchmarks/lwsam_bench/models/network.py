"""A network as a training step takes it: parameters apart from all else."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


@dataclasses.dataclass(frozen=True)
class Network:
    """A Flax NNX module taken apart: its structure, its parameters, the rest.

    Attributes:
      graphdef: The structure.
      params: The parameters that are trained.
      model_state: Statistics of BatchNorm, and parameters that are not trained.
      trainable: The filter of NNX that tells `params` from `model_state`.
      compute: The dtype inside: parameters and images are cast to it, logits back to
        float32. None leaves them as they are.
    """

    graphdef: Any
    params: Any
    model_state: Any
    trainable: Any = nnx.Param
    compute: Any = None

    @property
    def has_statistics(self) -> bool:
        """Whether a BatchNorm keeps running averages in the model state."""
        found = nnx.filter_state(self.model_state, nnx.BatchStat)
        return bool(jax.tree.leaves(found))

    @classmethod
    def of(
        cls, model: nnx.Module, trainable: Any = nnx.Param, compute: Any = None
    ) -> "Network":
        """Take a module apart."""
        parts = nnx.split(model, trainable, ...)
        return cls(*parts, trainable=trainable, compute=compute)

    def apply(
        self, params: Any, model_state: Any, image: Array, *, train: bool
    ) -> tuple[Array, Any]:
        """Return the logits, f32[B, K] of images, and the new model state."""
        if self.compute is not None:
            params, image = _cast((params, image), self.compute)
        # Without copy=True the modules would share their variables with the arguments,
        # and tracing would fail.
        model = nnx.merge(self.graphdef, params, model_state, copy=True)
        logits = model(image, train=train)
        if self.compute is not None:
            logits = _cast(logits, jnp.float32)
        return logits, nnx.split(model, self.trainable, ...)[2]


def _cast(tree: Any, dtype: Any) -> Any:
    """Return a tree whose floating-point leaves have a dtype."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
