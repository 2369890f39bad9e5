"""Images with labels to learn, all at once or one half of the classes after the other."""

import dataclasses
import functools
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
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row
from lwsam_bench.training.recipe import LossFn, make_loss_fn
from lwsam_bench.tuning.runs import course, measures, trajectory
from lwsam_bench.tuning.runs.course import Start
from lwsam_bench.tuning.tasks import Task


_STATISTICS_IMAGES = 1_000  # that BatchNorm's statistics are taken over
_BATCH = 1_000  # images that are evaluated at a time
_KEPT_BYTES = 2**28  # of batches, that a start keeps


class ImageCourse:
    """Images with labels.

    Where classes are learned in turns, each turn has its own share of the training
    images, of the steps and of the network's outputs, and it is known to which turn an
    image belongs. What is measured is the mean over the turns, after the last one.

    Args:
      task: The task.
      data_dir: Folder of tensorflow-datasets.
      held: Share of the training images, in each turn, that validates.
    """

    def __init__(
        self, task: Task, data_dir: str | None, held: float = course.VALIDATION
    ):
        self.task, self._held = task, held
        whole = sources.load(
            task.dataset,
            data_dir,
            train_images=task.train_images,
            test_images=task.test_images,
        )
        train, test = (_pooled(x, task.pool) for x in (whole.train, whole.test))
        self._dataset = dataclasses.replace(whole, train=train, test=test)
        self._classes = whole.num_classes // task.turns  # of a turn
        self._mean, self._std = self._dataset.statistics()
        self._network = self._make(0)
        self._statistics_network = Network.of(_forgetful(self._module(0)))
        self._test = [
            (self._normalized(part.images), part.labels) for part in self._parts(test)
        ]
        self.start = functools.lru_cache(course.KEPT_SEEDS)(self.start_of)
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
            return make_loss_fn(self._network) if self.task.turns == 1 else self._plain
        if kind == "losses":
            self._refuse_turns(kind)
            return make_loss_fn(self._network, per_example=True)
        if kind in trajectory.LOSSES:
            self._refuse_turns(kind)
            return trajectory.loss_fn(kind, self._network)
        return {"smoothing": self._smoothed, "penalty": self._penalized}[kind]

    def validate(self, params: Any, start: Start) -> Row:
        """Return accuracy, loss and calibration on the validation images."""
        return self._judged(params, self._states(params, start), start.validation)

    def test(self, params: Any, start: Start) -> Row:
        """Return the same on the test images."""
        return self._judged(params, self._states(params, start), self._test)

    def judge(self, params: Any, start: Start) -> Row:
        """Return the same on the test images, and what the accuracy survives."""
        states = self._states(params, start)
        rng = np.random.default_rng(start.seed)

        def accuracy(params: Any, test: Any = self._test) -> float:
            return self._judged(params, states, test)["accuracy"]

        survival = measures.of_weights(params, accuracy, rng)
        changed = [
            {name: (x, labels) for name, x in measures.changed(images, rng).items()}
            for images, labels in self._test
        ]
        for name in changed[0]:
            survival[name] = accuracy(params, [part[name] for part in changed])
        return {**self._judged(params, states, self._test), "survival": survival}

    def _refuse_turns(self, kind: str) -> None:
        if self.task.turns > 1:
            raise UserError(
                f"--methods: a loss of kind {kind} is for all classes at once; take"
                f" others for {self.task.name}, such as five"
            )

    def _judged(self, params: Any, states: Any, parts: Any) -> Row:
        found = []
        for state, (images, labels) in zip(states, parts, strict=True):
            logits = self._logits_of(params, state, images)
            found.append(measures.judge(*self._answers(logits, labels)))
        return measures.mean(found)

    def _answers(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        """Return the logits of the classes of each image's turn, and which it is."""
        if self.task.turns == 1:
            return logits, labels
        by_turn = logits.reshape(len(logits), self.task.turns, self._classes)
        rows = np.arange(len(logits))
        return by_turn[rows, labels // self._classes], labels % self._classes

    def _states(self, params: Any, start: Start) -> list[Any]:
        """Return the statistics of BatchNorm of each turn."""
        return [self._fresh(params, start, sample) for sample in start.samples]

    def _fresh(self, params: Any, start: Start, sample: Array) -> Any:
        """Return the statistics of BatchNorm at some parameters.

        Those that training gathers belong to where gradients were taken: to perturbed
        weights for some methods, and to weights of many steps for all.
        """
        if not self._network.has_statistics:
            return start.model_state
        return self._statistics(params, start.model_state, sample)

    def _logits_of(self, params: Any, model_state: Any, images: Array) -> np.ndarray:
        """Return f32[N, K] of images f32[N, H, W, C]."""
        parts = [
            self._logits(params, model_state, images[i : i + _BATCH])
            for i in range(0, len(images), _BATCH)
        ]
        return np.concatenate(jax.device_get(parts))

    def _parts(self, split: splits.Split) -> list[splits.Split]:
        """Return the images of each turn."""
        if self.task.turns == 1:
            return [split]
        turn = split.labels // self._classes
        each = [turn == number for number in range(self.task.turns)]
        return [splits.Split(split.images[of], split.labels[of]) for of in each]

    def start_of(self, seed: int, fold: int = 0) -> Start:
        """Return what a seed decides; each fold holds out other images."""
        parts = self._parts(self._dataset.train)
        batches, samples, validation = [], [], []
        for turn, train in enumerate(parts):
            first = turn * self._classes
            noisy = first + splits.corrupt_labels(
                train.labels - first, self.task.noise, self._classes, seed
            )
            order = np.random.default_rng([seed, course.SPLIT_STREAM])
            order = order.permutation(len(train))
            held = round(self._held * len(train))
            order = np.roll(order, -fold * held)
            held_out, rest = np.sort(order[:held]), np.sort(order[held:])
            if self.task.batch_size > len(rest):
                raise UserError(
                    f"--batch {self.task.batch_size} is more than the {len(rest)}"
                    f" training images that {self.task.name} has"
                    f"{' in a turn' if self.task.turns > 1 else ''}"
                )
            batches.append(
                _keeping(
                    Batches(
                        splits.Split(train.images[rest], noisy[rest]),
                        batch_size=self.task.batch_size,
                        seed=seed,
                        mean=self._mean,
                        std=self._std,
                        augment=False,
                    )
                )
            )
            samples.append(self._normalized(train.images[rest[:_STATISTICS_IMAGES]]))
            validation.append(
                (self._normalized(train.images[held_out]), noisy[held_out])
            )
        network = self._make(seed)
        return Start(
            seed=seed,
            params=network.params,
            model_state=network.model_state,
            batches=lambda steps: in_turn(batches, steps),
            validation=tuple(validation),
            samples=tuple(samples),
            rows=trajectory.rows(len(rest), self.task.batch_size, seed)
            if len(parts) == 1
            else None,
            classes=self._dataset.num_classes,
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

    def _plain(self, params: Any, model_state: Any, batch: Any, key: Array) -> Any:
        return self._smoothed(params, model_state, {**batch, "smoothing": None}, key)

    def _smoothed(self, params: Any, model_state: Any, batch: Any, key: Array) -> Any:
        del key
        logits, model_state = self._network.apply(
            params, model_state, batch["image"], train=True
        )
        logits, labels = self._answers(logits, batch["label"])
        target = jax.nn.one_hot(labels, logits.shape[-1])
        if batch["smoothing"] is not None:
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
        logits, labels = self._answers(model.dense(features), batch["label"])
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        last = model.dense.kernel[...]
        loss += 0.5 * batch["last_layer"] * jnp.vdot(last, last)
        squares = jnp.sum(jnp.square(features), axis=-1)
        loss += 0.5 * batch["activations"] * jnp.mean(squares)
        return loss, (nnx.split(model, network.trainable, ...)[2], {})


def in_turn(batches: list[course.Batches], steps: int) -> course.Batches:
    """Return the batches of a run of so many steps, an equal share of each."""
    each = -(-steps // len(batches))

    def batch(step: int) -> dict[str, Array]:
        turn = min(step // each, len(batches) - 1)
        return batches[turn](step - turn * each)

    return batch


def _keeping(batches: Batches) -> course.Batches:
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
