"""The trainings that a sweep is judged by: a radius, a seed, the images of the test."""

import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import lwsam_jax as lwsam
from lwsam_bench.support.rows import Row
from lwsam_bench.tuning.runs import optimizers
from lwsam_bench.tuning.runs.course import Start, VALIDATION
from lwsam_bench.tuning.runs.images import ImageCourse


STEPS = 400
RATE, DECAY = 0.1, 0.0
EXAMPLES = 10  # of the ascent: 1.1 gradients a step
MIDDLE = 0.4
RADII = tuple(MIDDLE * 2.0**i for i in range(-3, 4))  # the ladder of `find_rho`
SEEDS = range(5)
# A fifth of the training images, in each repeat of a sweep another. What is left is gone
# through as often as in a training.
HELD, REPEATS = 0.2, 5
SWEEP_STEPS = round(STEPS * (1 - HELD) / (1 - VALIDATION))
SWEEP_SEED = 1000  # whose initial parameters, noise and validation images are others


class Trainer:
    """Trains on a task with any radius, on one executable.

    Args:
      course: The task.
      sweeping: The same, with what a repeat of a sweep holds out.
    """

    def __init__(self, course: ImageCourse, sweeping: ImageCourse):
        self._course, self._sweeping = course, sweeping
        self._optimizer = optimizers.make("sgd")
        method = lwsam.sam(MIDDLE, ascent=lwsam.micro_batch(size=EXAMPLES))
        self._step = lwsam.TrainStep(course.loss_fn("plain"), self._optimizer, method)

    def grid(self, rho: float, seed: int) -> Row:
        """Return the row of a training: how it does on the images of the test."""
        began = time.perf_counter()
        start = self._course.start(seed)
        state, batch = self._first(start), start.batches(STEPS)
        rho_now = jnp.full_like(state.hyperparams["rho"], rho)
        state = state._replace(hyperparams={**state.hyperparams, "rho": rho_now})
        for number in range(STEPS):
            state, _ = self._step(state, batch(number))
        return {
            "kind": "grid",
            "rho": rho,
            "seed": seed,
            "accuracy": self._course.test(state.params, start)["accuracy"],
            "validation": self._course.validate(state.params, start)["accuracy"],
            "seconds": round(time.perf_counter() - began, 2),
        }

    def sweep(self, seed: int = SWEEP_SEED) -> Row:
        """Return the row of a sweep: what it proposes, tries and costs."""
        began = time.perf_counter()
        make = functools.cache(lambda fold: self._sweeping.start_of(seed, fold))

        def batches(repeat: int) -> Iterator[Any]:
            return map(make(repeat).batches(SWEEP_STEPS), itertools.count())

        def validate(state: Any, repeat: int) -> float:
            return self._sweeping.validate(state.params, make(repeat))["accuracy"]

        found = lwsam.find_rho(
            self._step,
            self._first(make(0)),
            batches,
            validate,
            steps=SWEEP_STEPS,
            repeats=REPEATS,
        )
        return {
            "kind": "sweep",
            "seed": seed,
            "rho": round(found.rho, 6),
            "gain": found.gain,
            "noise": found.noise,
            "trials": [
                [round(trial.rho, 6), trial.steps, list(trial.scores)]
                for trial in found.trials
            ],
            "steps": found.steps,
            "gradients": found.gradients,
            "why": found.why,
            "seconds": round(time.perf_counter() - began, 2),
        }

    def _first(self, start: Start) -> Any:
        """Return the state before the first step."""
        state = self._step.init(
            start.params,
            start.model_state,
            start.batches(STEPS)(0),
            key=jax.random.key(start.seed),
        )
        config = {"lr": RATE, "weight_decay": DECAY, "steps": STEPS}
        opt_state = optimizers.with_numbers(state.opt_state, config)
        return state._replace(opt_state=opt_state)
