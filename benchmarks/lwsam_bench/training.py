"""From a network to a train step: loss, optimizer, method, evaluation."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import lwsam_jax as lwsam
from lwsam_bench import methods
from lwsam_bench.augment import normalize
from lwsam_bench.config import DECAY_AT, TrainConfig
from lwsam_bench.data import Split


EVAL_BATCH_SIZE = 500

LossFn = Callable[[Any, Any, Mapping[str, Array], Array], Any]


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


def make_loss_fn(
    network: Network,
    *,
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    per_example: bool = False,
) -> LossFn:
    """Return `loss_fn(params, model_state, batch, key)`, what `TrainStep` takes.

    The loss is the mean cross-entropy plus `weight_decay / 2` times the squared norm of
    the weights (of convolutions and dense layers, not of biases and BatchNorm), so that
    its gradient is `weight_decay * w`. It returns
    `(loss, (new model state, {"accuracy": f32[]}))`.

    Args:
      network: The network.
      weight_decay: Its weight.
      label_smoothing: Share of the target that all labels have part in.
      per_example: Whether the metrics have the cross-entropy of each example as well,
        `"losses"`, f32[B].
    """
    cross_entropy = _smoothed(label_smoothing)
    return _loss_fn(network, "image", "label", cross_entropy, weight_decay, per_example)


def next_character_loss(
    network: Network,
    *,
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    per_example: bool = False,
) -> LossFn:
    """Return the loss of the next character, as `make_loss_fn` does that of a label.

    An example is an excerpt, its loss the mean over the characters.
    """
    cross_entropy = (
        _smoothed(label_smoothing)
        if label_smoothing
        else optax.softmax_cross_entropy_with_integer_labels
    )
    return _loss_fn(network, "text", "next", cross_entropy, weight_decay, per_example)


def _smoothed(label_smoothing: float) -> Callable[[Array, Array], Array]:
    def cross_entropy(logits: Array, labels: Array) -> Array:
        target = jax.nn.one_hot(labels, logits.shape[-1])
        if label_smoothing:
            target = optax.smooth_labels(target, label_smoothing)
        return optax.softmax_cross_entropy(logits, target)

    return cross_entropy


def _loss_fn(
    network: Network,
    given: str,
    wanted: str,
    cross_entropy: Callable[[Array, Array], Array],
    weight_decay: float,
    per_example: bool,
) -> LossFn:
    def loss_fn(
        params: Any, model_state: Any, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        del key  # no dropout
        logits, model_state = network.apply(
            params, model_state, batch[given], train=True
        )
        losses = cross_entropy(logits, batch[wanted])
        loss = jnp.mean(losses)
        if weight_decay:
            weights = [w for w in jax.tree.leaves(params) if w.ndim >= 2]
            loss += 0.5 * weight_decay * sum(jnp.vdot(w, w) for w in weights)
        hits = jnp.argmax(logits, -1) == batch[wanted]
        metrics = {"accuracy": jnp.mean(hits, dtype=jnp.float32)}
        if per_example:
            metrics["losses"] = jnp.mean(losses, axis=tuple(range(1, losses.ndim)))
        return loss, (model_state, metrics)

    return loss_fn


def make_schedule(
    lr: float, total_steps: int, decay_at: Sequence[float] = DECAY_AT
) -> Callable[[Any], Any]:
    """Return the learning rate: divided by ten at each of `decay_at` of the run.

    It takes the number of steps done, as a Python or a JAX integer.
    """
    steps = [max(1, round(at * total_steps)) for at in decay_at]

    def schedule(count: Any) -> Any:
        return lr * 0.1 ** sum((count >= step) * 1 for step in steps)

    return schedule


def make_optimizer(
    config: TrainConfig, schedule: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Return the base optimizer of a run.

    AdamW decays the weights itself, those of rank 2 and more, as the loss does for SGD.
    """
    match config.optimizer:
        case "sgd":
            return optax.sgd(schedule, momentum=config.momentum)
        case "adamw":
            return optax.adamw(
                schedule,
                weight_decay=config.weight_decay,
                mask=lambda params: jax.tree.map(lambda w: w.ndim >= 2, params),
            )
    raise ValueError(f"`make_optimizer`: unknown optimizer {config.optimizer!r}")


def weight_decay_in_loss(config: TrainConfig) -> float:
    """Return the weight decay that is part of the loss: none if AdamW applies it."""
    return 0.0 if config.optimizer == "adamw" else config.weight_decay


def make_step(
    config: TrainConfig, loss_fn: LossFn, total_steps: int
) -> tuple[lwsam.TrainStep, Callable[[Any], Any]]:
    """Return the train step of a run and its learning rate."""
    schedule = make_schedule(config.lr, total_steps, config.decay_at)
    optimizer = make_optimizer(config, schedule)
    method = methods.configure(config, total_steps)
    return lwsam.TrainStep(loss_fn, optimizer, method), schedule


class Evaluator:
    """Mean loss and accuracy on a split, each image counted once.

    The last batch is filled up with zeros that have no weight, so that one executable
    does for all. Images that are too many for the device go there batch by batch.
    """

    def __init__(
        self,
        network: Network,
        split: Split,
        *,
        mean: np.ndarray,
        std: np.ndarray,
        batch_size: int = EVAL_BATCH_SIZE,
    ):
        size = len(split)
        batch_size = min(batch_size, size)
        count = -(-size // batch_size)
        padding = count * batch_size - size

        put = jnp.asarray if split.fits_on_device else np.asarray

        def batches(x: np.ndarray) -> Any:
            x = np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
            return put(x.reshape(count, batch_size, *x.shape[1:]))

        self._size = size
        self._images = batches(split.images)
        self._labels = batches(split.labels)
        self._weights = batches(np.ones(size, np.float32))

        @jax.jit
        def sums(params, model_state, images, labels, weights):
            logits, _ = network.apply(
                params, model_state, normalize(images, mean, std), train=False
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            hits = jnp.argmax(logits, -1) == labels
            return jnp.vdot(loss, weights), jnp.vdot(hits, weights)

        self._sums = sums

    def __call__(self, params: Any, model_state: Any) -> dict[str, float]:
        """Return `{"loss": ..., "accuracy": ...}` with the running statistics."""
        parts = [
            self._sums(params, model_state, *batch)
            for batch in zip(self._images, self._labels, self._weights, strict=True)
        ]
        losses, hits = np.asarray(jax.device_get(parts), np.float64).T
        size = self._size
        return {"loss": losses.sum() / size, "accuracy": hits.sum() / size}
