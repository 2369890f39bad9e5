"""A network as a training step takes it: parameters apart from all else."""

import dataclasses
from typing import Any

import jax
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
    """

    graphdef: Any
    params: Any
    model_state: Any
    trainable: Any = nnx.Param

    @property
    def has_statistics(self) -> bool:
        """Whether a BatchNorm keeps running averages in the model state."""
        found = nnx.filter_state(self.model_state, nnx.BatchStat)
        return bool(jax.tree.leaves(found))

    @classmethod
    def of(cls, model: nnx.Module, trainable: Any = nnx.Param) -> "Network":
        """Take a module apart."""
        return cls(*nnx.split(model, trainable, ...), trainable=trainable)

    def apply(
        self, params: Any, model_state: Any, image: Array, *, train: bool
    ) -> tuple[Array, Any]:
        """Return the logits, f32[B, K] of images, and the new model state."""
        # Without copy=True the modules would share their variables with the arguments,
        # and tracing would fail.
        model = nnx.merge(self.graphdef, params, model_state, copy=True)
        logits = model(image, train=train)
        return logits, nnx.split(model, self.trainable, ...)[2]
