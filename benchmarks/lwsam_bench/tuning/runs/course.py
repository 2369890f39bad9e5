"""A task made ready: images split for training, validation and test, losses, measures."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from lwsam_bench.data import sources, splits
from lwsam_bench.data.augment import Batches, normalize
from lwsam_bench.models import by_name
from lwsam_bench.models.network import Network
from lwsam_bench.support.rows import Row
from lwsam_bench.training.recipe import LossFn, make_loss_fn
from lwsam_bench.tuning.runs import measures
from lwsam_bench.tuning.tasks import Task


VALIDATION = 0.1  # share of the training images, with the noise of their labels
LOSSES = ("plain", "smoothing", "penalty")
# What a loss beyond the plain one takes from the batch, where runs put their numbers.
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "smoothing": ("smoothing",),
    "penalty": ("last_layer", "activations"),
}

_STATISTICS_IMAGES = 1_000  # that BatchNorm's statistics are taken over
_BATCH = 1_000  # images that are evaluated at a time
_SPLIT_STREAM = 0x5EED
_KEPT_SEEDS = 2
_KEPT_BYTES = 2**28  # of batches, that a start keeps


@dataclasses.dataclass(frozen=True)
class Start:
    """What a seed decides: initial parameters, noise, validation images, order.

    Attributes:
      seed: The seed.
      params: Initial parameters.
      model_state: Initial statistics of BatchNorm.
      batch: The batch of a step.
      sample: Training images, f32[N, H, W, C], for the statistics of BatchNorm.
      validation: Images f32[N, H, W, C], and labels that have noise.
    """

    seed: int
    params: Any
    model_state: Any
    batch: Callable[[int], dict[str, Array]]
    sample: Array
    validation: tuple[Array, np.ndarray]


class Course:
    """A task made ready.

    Args:
      task: The task.
      data_dir: Folder of tensorflow-datasets.
    """

    def __init__(self, task: Task, data_dir: str | None):
        self.task = task
        whole = sources.load(task.dataset, data_dir, train_images=task.train_images)
        train, test = (_pooled(x, task.pool) for x in (whole.train, whole.test))
        self._dataset = dataclasses.replace(whole, train=train, test=test)
        self._mean, self._std = self._dataset.statistics()
        self._network = self._make(0)
        self._statistics_network = Network.of(_forgetful(self._module(0)))
        self._test = self._normalized(test.images), test.labels
        self.start = functools.lru_cache(_KEPT_SEEDS)(self._start)
        self._logits = jax.jit(
            lambda params, state, images: self._network.apply(
                params, state, images, train=False
            )[0]
        )
        self._statistics = jax.jit(
            lambda params, state, images: self._statistics_network.apply(
                params, state, images, train=True
            )[1]
        )

    def loss_fn(self, kind: str) -> LossFn:
        """Return one of `LOSSES`; the batch has its numbers beside images and labels."""
        if kind == "plain":
            return make_loss_fn(self._network)
        return {"smoothing": self._smoothed, "penalty": self._penalized}[kind]

    def validate(self, params: Any, start: Start) -> Row:
        """Return accuracy, loss and calibration on the validation images."""
        images, labels = start.validation
        state = self._fresh(params, start)
        return measures.judge(self._logits_of(params, state, images), labels)

    def judge(self, params: Any, start: Start) -> Row:
        """Return the same on the test images, and what the accuracy survives."""
        images, labels = self._test
        state = self._fresh(params, start)
        logits = lambda params, images: self._logits_of(params, state, images)
        return {
            **measures.judge(logits(params, images), labels),
            "survival": measures.survival(params, images, labels, logits, start.seed),
        }

    def _fresh(self, params: Any, start: Start) -> Any:
        """Return the statistics of BatchNorm at some parameters.

        Those that training gathers belong to where gradients were taken: to perturbed
        weights for some methods, and to weights of many steps for all.
        """
        if not self._network.has_statistics:
            return start.model_state
        return self._statistics(params, start.model_state, start.sample)

    def _logits_of(self, params: Any, model_state: Any, images: Array) -> np.ndarray:
        """Return f32[N, K] of images f32[N, H, W, C]."""
        parts = [
            self._logits(params, model_state, images[i : i + _BATCH])
            for i in range(0, len(images), _BATCH)
        ]
        return np.concatenate(jax.device_get(parts))

    def _start(self, seed: int) -> Start:
        train = self._dataset.train
        noisy = splits.corrupt_labels(
            train.labels, self.task.noise, self._dataset.num_classes, seed
        )
        order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(len(train))
        held = round(VALIDATION * len(train))
        held_out, rest = np.sort(order[:held]), np.sort(order[held:])
        batches = Batches(
            splits.Split(train.images[rest], noisy[rest]),
            batch_size=self.task.batch_size,
            seed=seed,
            mean=self._mean,
            std=self._std,
            augment=False,
        )
        network = self._make(seed)
        return Start(
            seed=seed,
            params=network.params,
            model_state=network.model_state,
            batch=_keeping(batches),
            sample=self._normalized(train.images[rest[:_STATISTICS_IMAGES]]),
            validation=(self._normalized(train.images[held_out]), noisy[held_out]),
        )

    def _normalized(self, images: np.ndarray) -> Array:
        return normalize(jnp.asarray(images), self._mean, self._std)

    def _module(self, seed: int) -> nnx.Module:
        return by_name.build(
            self.task.model,
            image_shape=self._dataset.image_shape,
            num_classes=self._dataset.num_classes,
            seed=seed,
        )

    def _make(self, seed: int) -> Network:
        return Network.of(self._module(seed))

    def _smoothed(self, params: Any, model_state: Any, batch: Any, key: Array) -> Any:
        del key
        logits, model_state = self._network.apply(
            params, model_state, batch["image"], train=True
        )
        target = jax.nn.one_hot(batch["label"], logits.shape[-1])
        target = optax.smooth_labels(target, batch["smoothing"])
        loss = jnp.mean(optax.softmax_cross_entropy(logits, target))
        return loss, (model_state, {})

    def _penalized(self, params: Any, model_state: Any, batch: Any, key: Array) -> Any:
        """Cross-entropy plus L2 of the last layer's weights and of what it reads.

        Baek, Kolter, Raghunathan, ICLR 2024, arXiv:2405.03676.
        """
        del key
        network = self._network
        model: Any = nnx.merge(network.graphdef, params, model_state, copy=True)
        features = model.features(batch["image"], train=True)
        logits = model.dense(features)
        loss = jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        )
        last = model.dense.kernel[...]
        loss += 0.5 * batch["last_layer"] * jnp.vdot(last, last)
        squares = jnp.sum(jnp.square(features), axis=-1)
        loss += 0.5 * batch["activations"] * jnp.mean(squares)
        return loss, (nnx.split(model, network.trainable, ...)[2], {})


def _keeping(batches: Batches) -> Callable[[int], dict[str, Array]]:
    """Return the batches, each made once as long as there is room."""
    kept: dict[int, dict[str, Array]] = {}
    size = 0

    def batch(step: int) -> dict[str, Array]:
        nonlocal size
        if step in kept:
            return kept[step]
        made = batches(step)
        if size < _KEPT_BYTES:
            kept[step] = made
            size += sum(x.nbytes for x in made.values())
        return made

    return batch


def _forgetful(model: nnx.Module) -> nnx.Module:
    """Return a model whose running statistics are those of the last batch alone."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0
    return model


def _pooled(split: splits.Split, pool: int) -> splits.Split:
    if pool == 1:
        return split
    count, height, width, channels = split.images.shape
    shape = (count, height // pool, pool, width // pool, pool, channels)
    images = np.rint(split.images.reshape(shape).mean(axis=(2, 4)))
    return splits.Split(images.astype(np.uint8), split.labels)
