"""One run of `pareto`: a small network, noisy labels; accuracy and cost."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import lwsam_jax as lwsam
from lwsam_bench.comparison.pareto_methods import configure, Method
from lwsam_bench.data import sources, splits
from lwsam_bench.data.augment import Batches
from lwsam_bench.models import by_name
from lwsam_bench.models.network import Network
from lwsam_bench.support.rows import Row
from lwsam_bench.training.evaluation import Evaluator
from lwsam_bench.training.methods import with_radius
from lwsam_bench.training.recipe import make_loss_fn, make_schedule


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned, by whom, for how long; it decides a run with method and seed."""

    dataset: str
    steps: int
    train_images: int
    pool: int = 1  # pixels at each side that are averaged into one
    batch_size: int = 100
    lr: float = 0.1
    momentum: float = 0.9
    label_noise: float = 0.4


class Course:
    """A task made ready: images, network, evaluation on both halves of the test images.

    Args:
      task: The task.
      data_dir: Folder of tensorflow-datasets.
      on_record: See `sources.load`.
    """

    def __init__(
        self,
        task: Task,
        data_dir: str | None,
        on_record: Callable[[int, int], None] | None = None,
    ):
        self.task = task
        self.dataset = _reduced(
            sources.load(task.dataset, data_dir, on_record),
            task.train_images,
            task.pool,
        )
        self._mean, self._std = self.dataset.statistics()
        network = self._network(seed=0)
        self._loss_fn = make_loss_fn(network)
        # One half chooses the radius, the other is reported.
        halves = [
            splits.Split(self.dataset.test.images[i::2], self.dataset.test.labels[i::2])
            for i in range(2)
        ]
        self._validate, self._test = (
            Evaluator(network, half, mean=self._mean, std=self._std) for half in halves
        )

    def _network(self, seed: int) -> Network:
        return Network.of(
            by_name.build(
                "smallcnn",
                image_shape=self.dataset.image_shape,
                num_classes=self.dataset.num_classes,
                seed=seed,
            )
        )

    def _batches(self, seed: int) -> Batches:
        task = self.task
        noisy = splits.corrupt_labels(
            self.dataset.train.labels, task.label_noise, self.dataset.num_classes, seed
        )
        return Batches(
            splits.Split(self.dataset.train.images, noisy),
            batch_size=task.batch_size,
            seed=seed,
            mean=self._mean,
            std=self._std,
            augment=False,
        )

    def runner(self, method: Method) -> "Runner":
        """Return what trains by a method, at any radius and from any seed."""
        schedule = make_schedule(self.task.lr, self.task.steps)
        step = lwsam.TrainStep(
            self._loss_fn,
            optax.sgd(schedule, momentum=self.task.momentum),
            configure(method, rho=1.0),  # each run sets its own
        )
        network, batches = self._network(seed=0), self._batches(seed=0)
        state = step.init(
            network.params, network.model_state, batches(0), key=jax.random.key(0)
        )
        return Runner(self, step, state)

    def start(self, state: Any, seed: int) -> tuple[Any, Batches]:
        """Return the state before a run, and the run's batches.

        Args:
          state: Of the train step before any run; steps donate theirs, so it is copied.
          seed: Decides initial parameters, noise and order.
        """
        network = self._network(seed)
        state = state._replace(
            params=network.params,
            model_state=network.model_state,
            key=jax.random.key(seed),
        )
        return jax.tree.map(lambda x: x.copy(), state), self._batches(seed)

    def accuracies(self, state: Any) -> Row:
        """Return the accuracy on the half that tunes and on the half that is reported."""
        return {
            "validation_accuracy": self._validate(state.params, state.model_state)[
                "accuracy"
            ],
            "test_accuracy": self._test(state.params, state.model_state)["accuracy"],
        }


class Runner:
    """A method's train step, shared by its runs so that it is traced once."""

    def __init__(self, course: Course, step: lwsam.TrainStep, state: Any) -> None:
        self._course, self._step, self._state = course, step, state

    def run(self, rho: float | None, seed: int) -> Row:
        """Train from a seed; return what is measured."""
        began, compiling = time.perf_counter(), self._step.compile_seconds
        state, batches = self._course.start(self._state, seed)
        if rho is not None:
            state = with_radius(state, rho)
        infos = []
        for number in range(self._course.task.steps):
            state, info = self._step(state, batches(number))
            infos.append((info.value, info.overhead, info.finite, info.mask))
        values, overheads, finite, masks = (
            np.asarray(x) for x in zip(*jax.device_get(infos), strict=True)
        )
        last = values[-batches.steps_per_epoch :]
        # Worse than a guess: then accuracy says nothing about the method at this radius.
        lost = not np.mean(last) < math.log(self._course.dataset.num_classes)
        accuracies = self._course.accuracies(state)
        seconds = time.perf_counter() - began
        return {
            **accuracies,
            "train_loss": float(np.mean(last)),
            "diverged": bool(lost or not finite.all()),
            "overhead": float(np.mean(overheads)),
            "overhead_most": float(np.max(overheads)),
            "overhead_sets": self._if_every_set_were_compiled(masks),
            "layers_mean": float(np.mean(masks.sum(axis=1))),
            # Those that ran: each has a price of its own.
            "executables": len(np.unique(overheads)),
            "compile_seconds": round(self._step.compile_seconds - compiling, 2),
            "seconds": round(seconds, 2),
        }

    def _if_every_set_were_compiled(self, masks: np.ndarray) -> float:
        """Return the mean overhead had each step run on an executable of its own set."""
        assert self._step.cost is not None
        assert self._step.layers is not None
        sets, counts = np.unique(masks, axis=0, return_counts=True)
        ratios = [
            self._step.cost.ratio(self._step.layers.selected(mask)) for mask in sets
        ]
        return float(np.dot(ratios, counts) / len(masks) - 1.0)


_SUBSET_SEED = 0  # fixed: every run, whatever its seed, learns from the same images


def _reduced(dataset: splits.Dataset, train_images: int, pool: int) -> splits.Dataset:
    """Return the dataset with fewer training images and, if asked for, fewer pixels."""
    train = dataset.train
    if train_images < len(train):
        order = np.random.default_rng(_SUBSET_SEED).permutation(len(train))
        chosen = order[:train_images]
        train = splits.Split(train.images[chosen], train.labels[chosen])
    return dataclasses.replace(
        dataset, train=_pooled(train, pool), test=_pooled(dataset.test, pool)
    )


def _pooled(split: splits.Split, pool: int) -> splits.Split:
    if pool == 1:
        return split
    count, height, width, channels = split.images.shape
    shape = (count, height // pool, pool, width // pool, pool, channels)
    images = np.rint(split.images.reshape(shape).mean(axis=(2, 4)))
    return splits.Split(images.astype(np.uint8), split.labels)
