"""A text to learn by heart, or not: bits per character on another part of it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lwsam_bench.data import text
from lwsam_bench.models import by_name
from lwsam_bench.models.network import Network
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row
from lwsam_bench.training.recipe import LossFn, next_character_loss
from lwsam_bench.tuning.runs import course, measures
from lwsam_bench.tuning.runs.course import Start
from lwsam_bench.tuning.tasks import Task


class TextCourse:
    """The beginning of Tiny Shakespeare, of which a seed decides the part that validates.

    The test is the beginning of the dataset's own split for validation.

    Args:
      task: The task.
      data_dir: Folder of tensorflow-datasets.
    """

    def __init__(self, task: Task, data_dir: str | None):
        self.task = task
        found = text.load(data_dir)
        self._train = found.characters[: task.train_images]
        self._vocabulary = found.vocabulary
        self._network = self._make(0)
        self._length = self._network.params["positions"][...].shape[0]
        self._test = self._excerpts(found.validation[: task.test_images])
        self.start = functools.lru_cache(course.KEPT_SEEDS)(self._start)
        self._logits = jax.jit(
            lambda params, state, read: self._network.apply(
                params, state, read, train=False
            )[0]
        )

    def loss_fn(self, kind: str) -> LossFn:
        """Return the loss of the next character.

        Raises:
          UserError: If `kind` is another of `LOSSES` than the plain one.
        """
        if kind != "plain":
            raise UserError(
                f"--methods {kind} is for images; take others for {self.task.name}, such"
                " as five-adamw"
            )
        return next_character_loss(self._network)

    def validate(self, params: Any, start: Start) -> Row:
        """Return accuracy, loss, calibration and bits on the part that validates."""
        return self._judged(params, start, *start.validation[0])

    def judge(self, params: Any, start: Start) -> Row:
        """Return the same in the test, and the bits that it has with changed weights."""
        rng = np.random.default_rng(start.seed)
        bits = lambda params: self._judged(params, start, *self._test)["bits"]
        return {
            **self._judged(params, start, *self._test),
            "survival": measures.of_weights(params, bits, rng),
        }

    def _judged(self, params: Any, start: Start, read: Array, then: np.ndarray) -> Row:
        logits = jax.device_get(self._logits(params, start.model_state, read))
        found = measures.judge(logits.reshape(-1, logits.shape[-1]), then.reshape(-1))
        loss = found["loss"]
        return {**found, "bits": None if loss is None else loss / math.log(2)}

    def _start(self, seed: int) -> Start:
        size = len(self._train)
        held = round(course.VALIDATION * size)
        rng = np.random.default_rng([seed, course.SPLIT_STREAM])
        place = int(rng.integers(0, size - held + 1))
        # Excerpts that cross the seam are few.
        rest = np.delete(self._train, np.s_[place : place + held])
        batch = text.TextBatches(
            rest, batch_size=self.task.batch_size, length=self._length, seed=seed
        )
        batch = functools.lru_cache(None)(batch)
        network = self._make(seed)
        return Start(
            seed=seed,
            params=network.params,
            model_state=network.model_state,
            batches=lambda steps: batch,
            validation=(self._excerpts(self._train[place : place + held]),),
        )

    def _excerpts(self, characters: np.ndarray) -> tuple[Array, np.ndarray]:
        """Return what is read, i32[N, T], and what follows; excerpts do not overlap."""
        count = (len(characters) - 1) // self._length
        each = np.arange(count * self._length).reshape(count, self._length)
        return jnp.asarray(characters[each], jnp.int32), characters[each + 1]

    def _make(self, seed: int) -> Network:
        made = by_name.build(
            self.task.model, image_shape=(), num_classes=self._vocabulary, seed=seed
        )
        return Network.of(made)
