"""What the runner asks of a task: a start for each seed, losses, measures."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax import Array

from lwsam_bench.support.rows import Row
from lwsam_bench.training.recipe import LossFn


VALIDATION = 0.1  # share of the training examples, with the noise of their labels
# "losses" is the plain one with the loss of each example beside it; the last two are
# those of `trajectory`.
LOSSES = ("plain", "smoothing", "penalty", "losses", "saf", "mesa")
# What a loss beyond the plain one takes from the batch, where runs put their numbers.
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "smoothing": ("smoothing",),
    "penalty": ("last_layer", "activations"),
    "losses": (),
    "saf": ("weight",),
    "mesa": ("weight",),
}
SPLIT_STREAM = 0x5EED  # of the random numbers that choose what validates
KEPT_SEEDS = 2  # whose starts are kept

Batches = Callable[[int], dict[str, Array]]


class Rows(NamedTuple):
    """Which examples a batch has.

    Attributes:
      epoch: From 0 on.
      index: i32[B].
      total: Of how many.
    """

    epoch: int
    index: np.ndarray
    total: int


@dataclasses.dataclass(frozen=True)
class Start:
    """What a seed decides: initial parameters, noise, what validates, order.

    Attributes:
      seed: The seed.
      params: Initial parameters.
      model_state: Initial statistics of BatchNorm.
      batches: Given the number of steps of the run, returns what makes the batch of each.
      validation: Inputs and what they are to be answered with, for each of the tasks
        that are learned in turn.
      samples: Training inputs of each of these tasks, for the statistics of BatchNorm.
      rows: Given the number of a step, returns the epoch, and which examples of how many
        the batch has; None of what is learned in turns, and of a text.
      classes: How many there are; 0 of a text.
    """

    seed: int
    params: Any
    model_state: Any
    batches: Callable[[int], Batches]
    validation: tuple[tuple[Array, Any], ...]
    samples: tuple[Array, ...] = ()
    rows: Callable[[int], Rows] | None = None
    classes: int = 0


class Course(Protocol):
    """A task made ready."""

    def start(self, seed: int) -> Start:
        """Return what a seed decides."""
        ...

    def loss_fn(self, kind: str) -> LossFn:
        """Return one of `LOSSES`; the batch has its numbers beside the examples."""
        ...

    def validate(self, params: Any, start: Start) -> Row:
        """Return accuracy, loss, calibration, and what else decides, in validation."""
        ...

    def judge(self, params: Any, start: Start) -> Row:
        """Return the same in the test, and what is survived, `survival`."""
        ...
