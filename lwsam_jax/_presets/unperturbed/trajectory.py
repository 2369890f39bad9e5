"""SAF and MESA: a network that stays near its own earlier outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ... import _checks, _tree


def _divergence(logits: jax.Array, old: jax.Array, temperature: float) -> jax.Array:
    """Returns tau^2 KL(softmax(old / tau), softmax(logits / tau)), the mean."""
    new = jax.nn.log_softmax(_tree.wide(logits) / temperature)
    old = jax.nn.log_softmax(_tree.wide(jax.lax.stop_gradient(old)) / temperature)
    each = jnp.sum(jnp.exp(old) * (old - new), axis=-1)
    return temperature**2 * jnp.mean(each)


@dataclasses.dataclass(frozen=True)
class _Window:
    weight: float
    temperature: float
    start: int
    stop: int

    def __post_init__(self) -> None:
        who = type(self).__name__.strip("_").lower()
        _checks.non_negative(who, "weight", self.weight, "0.3 and 0.8 are published.")
        _checks.count(who, "start", self.start, "Pass an epoch.")
        _checks.count(who, "stop", self.stop, "Pass an epoch.")
        if not _checks.is_number(self.temperature) or not self.temperature > 0:
            remedy = "5 is the authors' value."
            got = repr(self.temperature)
            raise _checks.value_error(who, "temperature", "above 0", got, remedy)

    def _within(self, epoch: Any, term: jax.Array) -> jax.Array:
        epoch = jnp.asarray(epoch)
        active = (epoch > self.start) & (epoch < self.stop)
        return jnp.where(active, self.weight * term, 0)


@dataclasses.dataclass(frozen=True)
class SAF(_Window):
    """Terms of SAF; made by `saf`.

    Attributes:
      weight: Weight of the term.
      temperature: Temperature of both softmaxes.
      start: The term is there in epochs after this one.
      stop: And before this one.
      delay: How many epochs old the outputs are.
      axis_name: Mapped axis over which the batch is spread, or None.
    """

    delay: int
    axis_name: Any

    def init(self, examples: int, classes: int, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the memory, [delay + 1, examples, classes], all 0."""
        return jnp.zeros((self.delay + 1, examples, classes), dtype)

    def __call__(
        self, memory: jax.Array, logits: jax.Array, indices: jax.Array, epoch: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the term to add to the loss, and the memory with these logits in it.

        Args:
          memory: From `init`, or from the step before: part of the model state.
          logits: [B, classes] of this batch, in the clean pass.
          indices: int[B], which examples of the training set these are.
          epoch: int[], from 0 on.
        """
        epoch = jnp.asarray(epoch)
        old = memory[(epoch - self.delay) % (self.delay + 1), indices]
        term = self._within(epoch, _divergence(logits, old, self.temperature))
        rows = jax.lax.stop_gradient(logits).astype(memory.dtype)
        if self.axis_name is not None:  # else each device would know its own rows alone
            gather = lambda x: jax.lax.all_gather(x, self.axis_name, tiled=True)
            rows, indices = gather(rows), gather(indices)
        memory = memory.at[epoch % (self.delay + 1), indices].set(rows)
        return term, memory


def saf(
    weight: float = 0.3,
    temperature: float = 5.0,
    delay: int = 3,
    *,
    start: int = 5,
    stop: int = 300,
    axis_name: Any = None,
) -> SAF:
    r"""Returns SAF's term, $\lambda \tau^2\,KL(p_{old} \| p)$, for a loss to add.

    $p = \mathrm{softmax}(y / \tau)$ of the logits, $p_{old}$ the same of the logits that
    the same example had `delay` epochs ago, averaged over the batch. No perturbation, no
    second gradient. What it costs is memory: `saf.init(examples, classes)`, which the
    loss carries in its model state.

    Args:
      weight: $\lambda$, >= 0.
      temperature: $\tau$, above 0.
      delay: $\tilde E$, in epochs; 2 and 3 are the authors'.
      start: The term is there in epochs `start < epoch < stop`, as in their code.
      stop: See `start`.
      axis_name: `TrainStep.axis_name` where the batch is spread over devices.

    Returns:
      A callable `(memory, logits, indices, epoch) -> (term, memory)` with `init`.

    Raises:
      ValueError: For numbers out of range.
      TypeError: For arguments of the wrong kind.

    Examples:
      >>> import jax.numpy as jnp, lwsam_jax as lwsam
      >>> term = lwsam.saf(delay=1, start=0)
      >>> memory = term.init(examples=4, classes=2)
      >>> rows, logits = jnp.array([0, 1]), jnp.ones((2, 2))
      >>> _, memory = term(memory, logits, rows, epoch=0)
      >>> value, memory = term(memory, logits, rows, epoch=1)
      >>> float(value)
      0.0

    References:
      Du et al., Sharpness-aware training for free, NeurIPS 2022, arXiv:2205.14083;
      confirmed in the authors' code.
    """
    _checks.count("saf", "delay", delay, "Pass a number of epochs, such as 3.")
    if delay < 1:
        remedy = "Pass a number of epochs, such as 3."
        raise _checks.value_error("saf", "delay", ">= 1", delay, remedy)
    return SAF(weight, temperature, start, stop, delay, axis_name)


@dataclasses.dataclass(frozen=True)
class MESA(_Window):
    """Terms of MESA; made by `mesa`.

    Attributes:
      weight: Weight of the term.
      temperature: Temperature of both softmaxes.
      start: The term is there in epochs after this one.
      stop: And before this one.
      decay: Decay of the average of the weights.
    """

    decay: float

    def init(self, params: Any) -> Any:
        """Returns the average before the first step: a copy of the parameters."""
        return jax.tree.map(jnp.copy, params)

    def update(self, average: Any, params: Any) -> Any:
        """Returns the average after a step: d * average + (1 - d) * params."""
        weight = jnp.asarray(1 - self.decay)
        mixed = lambda a, w: _tree.mix(a, jax.lax.stop_gradient(w), weight)
        return jax.tree.map(mixed, average, params)

    def __call__(self, logits: jax.Array, old: jax.Array, epoch: Any) -> jax.Array:
        """Returns the term to add to the loss.

        Args:
          logits: [B, classes] at the parameters.
          old: [B, classes] at the average, on the same batch; no gradient goes there.
          epoch: int[], from 0 on.
        """
        return self._within(epoch, _divergence(logits, old, self.temperature))


def mesa(
    weight: float = 0.8,
    temperature: float = 5.0,
    decay: float = 0.9998,
    *,
    start: int = 5,
    stop: int = 300,
) -> MESA:
    r"""Returns MESA's term, $\lambda \tau^2\,KL(p_{old} \| p)$, for a loss to add.

    As `saf`, but the old outputs are those of an average of the weights on the same
    batch: a copy of the parameters and one more forward pass, and no memory for examples.

    Args:
      weight: $\lambda$, >= 0; 0.8 is in the authors' scripts.
      temperature: $\tau$, above 0.
      decay: Decay of the average, in [0, 1].
      start: The term is there in epochs `start < epoch < stop`, as in their code.
      stop: See `start`.

    Returns:
      A callable `(logits, old logits, epoch) -> term` with `init(params)` and
      `update(average, params)`.

    Raises:
      ValueError: For numbers out of range.

    References:
      Du et al., NeurIPS 2022, arXiv:2205.14083; confirmed in the authors' code.
    """
    if not _checks.is_number(decay) or not 0 <= decay <= 1:
        remedy = "0.9998 is the authors' value."
        raise _checks.value_error("mesa", "decay", "in [0, 1]", repr(decay), remedy)
    return MESA(weight, temperature, start, stop, decay)
