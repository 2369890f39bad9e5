"""One run of `precision`: a small network in one precision, with faulty batches."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lwsam_jax as lwsam
from lwsam_bench.data import sources
from lwsam_bench.data.augment import Batches
from lwsam_bench.models import by_name
from lwsam_bench.models.network import Network
from lwsam_bench.support.rows import Row
from lwsam_bench.training.evaluation import Evaluator
from lwsam_bench.training.recipe import make_schedule


PRECISIONS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned, by whom, for how long; it decides a run with precision and seed.

    Attributes:
      dataset: Name of the dataset.
      steps: Steps of a run.
      faults: How many of its batches have a NaN in them.
      train_images: Training images.
      test_images: Test images, all by default.
      image_size: Sides to which they are resized.
      batch_size: Images in a batch.
      lr: Learning rate, divided by ten late in the run.
      momentum: Of SGD.
      weight_decay: In the loss.
      rho: Radius of SAM.
    """

    dataset: str = "cifar10"
    steps: int = 200
    faults: int = 5
    train_images: int = 10_000
    test_images: int | None = None
    image_size: int = 16
    batch_size: int = 100
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 0.05

    def faulty_steps(self) -> list[int]:
        """Return the steps whose batches have a NaN, spread over the run."""
        return [
            (2 * i + 1) * self.steps // (2 * self.faults) for i in range(self.faults)
        ]


class Course:
    """A task made ready, and what has been compiled for it.

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
        self._task = task
        self._dataset = sources.load(
            task.dataset,
            data_dir,
            on_record,
            image_size=task.image_size,
            train_images=task.train_images,
            test_images=task.test_images,
        )
        self._mean, self._std = self._dataset.statistics()
        self._evaluate = Evaluator(
            self._network(0), self._dataset.test, mean=self._mean, std=self._std
        )
        self._steps: dict[str, lwsam.TrainStep] = {}

    def _network(self, seed: int) -> Network:
        return Network.of(
            by_name.build(
                "smallcnn",
                image_shape=self._dataset.image_shape,
                num_classes=self._dataset.num_classes,
                seed=seed,
            )
        )

    def _step(self, precision: str) -> lwsam.TrainStep:
        if precision not in self._steps:
            task = self._task
            schedule = make_schedule(task.lr, task.steps)
            dynamic = precision == "float16"
            self._steps[precision] = lwsam.TrainStep(
                loss_in(self._network(0), jnp.dtype(precision), task.weight_decay),
                optax.sgd(schedule, momentum=task.momentum),
                lwsam.sam(task.rho),
                on_nonfinite="skip",
                loss_scale=lwsam.DynamicLossScale() if dynamic else None,
            )
        return self._steps[precision]

    def run(self, precision: str, seed: int) -> Row:
        """Train from a seed; return what is measured."""
        began, task = time.perf_counter(), self._task
        step, network = self._step(precision), self._network(seed)
        batches = Batches(
            self._dataset.train,
            batch_size=task.batch_size,
            seed=seed,
            mean=self._mean,
            std=self._std,
            augment=False,
        )
        state = step.init(
            network.params, network.model_state, batches(0), key=jax.random.key(seed)
        )
        faulty, infos = set(task.faulty_steps()), []
        for number in range(task.steps):
            batch = batches(number)
            if number in faulty:
                batch["image"] = batch["image"].at[0].set(jnp.nan)
            state, info = step(state, batch)
            infos.append((info.value, info.finite, info.gap, info.cosine))
        values, finite, gaps, cosines = (
            np.asarray(x) for x in zip(*jax.device_get(infos), strict=True)
        )
        last = slice(-batches.steps_per_epoch, None)
        found = self._evaluate(state.params, state.model_state)
        scale = state.loss_scale.scale if precision == "float16" else None
        return {
            "test_accuracy": found["accuracy"],
            "test_loss": found["loss"],
            "train_loss": float(np.mean(values[last][finite[last]])),
            "faults": len(faulty),
            "skipped": int(state.skipped),
            "unlike": [int(i) for i in np.flatnonzero(~finite) if i not in faulty],
            "loss_scale": None if scale is None else float(scale),
            "gap": float(np.mean(gaps[last][finite[last]])),
            "cosine": float(np.mean(cosines[last][finite[last]])),
            "seconds": round(time.perf_counter() - began, 2),
        }


def loss_in(network: Network, dtype: Any, weight_decay: float) -> Callable[..., Any]:
    """Return `loss_fn(params, model_state, batch, key)` with the network in a dtype.

    The parameters that are trained are float32, and so are the logits' cross-entropy,
    the weight decay, and the statistics of BatchNorm.
    """

    def loss_fn(
        params: Any, model_state: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        del key  # no dropout
        low = jax.tree.map(lambda x: x.astype(dtype), (params, batch["image"]))
        logits, model_state = network.apply(low[0], model_state, low[1], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch["label"]
        )
        weights = [w for w in jax.tree.leaves(params) if w.ndim >= 2]
        decay = sum(jnp.vdot(w, w) for w in weights)
        return jnp.mean(losses) + 0.5 * weight_decay * decay, (model_state, {})

    return loss_fn
