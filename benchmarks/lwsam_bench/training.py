"""From a network to a train step: loss, optimizer, method, evaluation."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import lwsam_jax as lwsam
from lwsam_bench.augment import normalize
from lwsam_bench.config import DECAY_AT, TrainConfig
from lwsam_bench.data import Split


EVAL_BATCH_SIZE = 500

LossFn = Callable[[Any, Any, Mapping[str, Array], Array], Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """A Flax NNX module taken apart: its structure, its parameters, the rest."""

    graphdef: Any
    params: Any
    model_state: Any  # statistics of BatchNorm

    @classmethod
    def of(cls, model: nnx.Module) -> "Network":
        """Take a module apart."""
        return cls(*nnx.split(model, nnx.Param, ...))

    def apply(
        self, params: Any, model_state: Any, image: Array, *, train: bool
    ) -> tuple[Array, Any]:
        """Return the logits f32[B, K] and the new model state."""
        # Without copy=True the modules would share their variables with the arguments,
        # and tracing would fail.
        model = nnx.merge(self.graphdef, params, model_state, copy=True)
        logits = model(image, train=train)
        return logits, nnx.split(model, nnx.Param, ...)[2]


def make_loss_fn(
    network: Network, *, weight_decay: float = 0.0, label_smoothing: float = 0.0
) -> LossFn:
    """Return `loss_fn(params, model_state, batch, key)`, what `TrainStep` takes.

    The loss is the mean cross-entropy plus `weight_decay / 2` times the squared norm of
    the weights (of convolutions and dense layers, not of biases and BatchNorm), so that
    its gradient is `weight_decay * w`. It returns
    `(loss, (new model state, {"accuracy": f32[]}))`.
    """

    def loss_fn(
        params: Any, model_state: Any, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        del key  # no dropout
        logits, model_state = network.apply(
            params, model_state, batch["image"], train=True
        )
        target = jax.nn.one_hot(batch["label"], logits.shape[-1])
        if label_smoothing:
            target = optax.smooth_labels(target, label_smoothing)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, target))
        if weight_decay:
            weights = [w for w in jax.tree.leaves(params) if w.ndim >= 2]
            loss += 0.5 * weight_decay * sum(jnp.vdot(w, w) for w in weights)
        hits = jnp.argmax(logits, -1) == batch["label"]
        return loss, (model_state, {"accuracy": jnp.mean(hits, dtype=jnp.float32)})

    return loss_fn


def make_schedule(lr: float, total_steps: int) -> Callable[[Any], Any]:
    """Return the learning rate: divided by ten at each of `DECAY_AT` of the run.

    It takes the number of steps done, as a Python or a JAX integer.
    """
    first, second = (max(1, round(at * total_steps)) for at in DECAY_AT)

    def schedule(count: Any) -> Any:
        decays = (count >= first) * 1 + (count >= second) * 1
        return lr * 0.1**decays

    return schedule


def make_method(
    method: str,
    *,
    k: int,
    rho: Any,
    alpha: Any,
    normalize: str,
    seed: int = 0,
    when: Any = None,
) -> lwsam.LayerwiseSAM:
    """Return the configuration of `sgd`, `sam` or `lwsam`.

    `rho` and `alpha` are floats or schedules.
    """
    if method == "sgd":
        return lwsam.LayerwiseSAM(k=0, rho=0.0, alpha=1.0)
    if method == "sam":
        return lwsam.LayerwiseSAM(
            select=lwsam.everything(),
            rule=lwsam.leaves,
            rho=rho,
            alpha=alpha,
            normalize=normalize,
            seed=seed,
            when=when,
        )
    if method == "lwsam":
        return lwsam.LayerwiseSAM(
            k=k, rho=rho, alpha=alpha, normalize=normalize, seed=seed, when=when
        )
    raise ValueError(f"`make_method`: unknown method {method!r}")


def make_step(
    config: TrainConfig, network: Network, total_steps: int
) -> tuple[lwsam.TrainStep, Callable[[Any], Any]]:
    """Return the train step of a run and its learning rate."""
    schedule = make_schedule(config.lr, total_steps)
    step = lwsam.TrainStep(
        make_loss_fn(
            network,
            weight_decay=config.weight_decay,
            label_smoothing=config.label_smoothing,
        ),
        optax.sgd(schedule, momentum=config.momentum),
        make_method(
            config.method,
            k=config.k,
            rho=config.rho,
            alpha=config.alpha,
            normalize=config.normalize,
            seed=config.seed,
        ),
    )
    return step, schedule


class Evaluator:
    """Mean loss and accuracy on a split, each image counted once.

    The last batch is filled up with zeros that have no weight, so that one executable
    does for all.
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

        def batches(x: np.ndarray) -> Array:
            x = np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
            return jnp.asarray(x.reshape(count, batch_size, *x.shape[1:]))

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
