"""From a network to a train step: loss, optimizer, method."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import lwsam_jax as lwsam
from lwsam_bench.models.network import Network
from lwsam_bench.training import methods
from lwsam_bench.training.config import DECAY_AT, TrainConfig
from lwsam_bench.training.family import Facts


LossFn = Callable[[Any, Any, Mapping[str, Array], Array], Any]


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
    config: TrainConfig,
    loss_fn: LossFn,
    total_steps: int,
    *,
    steps_per_epoch: int | None = None,
    class_counts: Any = None,
    mesh: Any = None,
) -> tuple[lwsam.TrainStep, Callable[[Any], Any]]:
    """Return the train step of a run and its learning rate.

    Args:
      config: Of the run.
      loss_fn: Its loss.
      total_steps: Its length.
      steps_per_epoch: That of an epoch, for methods that count in epochs.
      class_counts: Examples of each class, for methods that weigh them.
      mesh: Devices over which a batch is cut; None: there is one.
    """
    schedule = make_schedule(config.lr, total_steps, config.decay_at)
    optimizer = make_optimizer(config, schedule)
    facts = Facts(total_steps, steps_per_epoch, schedule, class_counts)
    method = methods.configure(config, total_steps, facts)
    return lwsam.TrainStep(loss_fn, optimizer, method, mesh), schedule
