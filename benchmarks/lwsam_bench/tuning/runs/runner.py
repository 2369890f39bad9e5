"""One run of a tuning: train from a seed with a configuration, and measure."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lwsam_jax as lwsam
from lwsam_bench.support.rows import Row
from lwsam_bench.tuning.methods import Method, TAIL_START
from lwsam_bench.tuning.protocol import goodness, Request
from lwsam_bench.tuning.runs import optimizers
from lwsam_bench.tuning.runs.course import Course, NUMBERS, Start


POINTS = 10  # of a final run at which it is validated
# More would cost a little less in training, and more in compiling than that.
EXECUTABLES = 6


class Runner:
    """A method's train step, shared by its runs so that it is compiled once.

    Learning rate, weight decay, number of steps and radius are data of its state.

    Args:
      course: The task.
      method: The method.
    """

    def __init__(self, course: Course, method: Method):
        self._course, self._method = course, method
        self._optimizer = optimizers.make(method.optimizer)
        self._step = lwsam.TrainStep(
            course.loss_fn(method.loss),
            self._optimizer,
            method.make(),
            max_executables=EXECUTABLES,
        )
        self._first: Any = None  # the state before any run

    def run(self, request: Request) -> Row:
        """Return what is measured: on the test images only in a final run.

        Seconds are CPU time of this process, which other ones do not add to, but for
        `wall_seconds`: `cpu_seconds` of the steps, without `compile_cpu_seconds`, and
        `all_cpu_seconds` with what was measured, too.
        """
        began, worked = time.perf_counter(), time.process_time()
        start = self._course.start(request.seed)
        steps = max(1, round(request.config["steps"] * request.length))
        config = {**request.config, "steps": steps}
        is_final = request.phase == "final"
        marks = _marks(steps, POINTS if is_final else 1)
        numbers = {n: jnp.float32(config[n]) for n in NUMBERS[self._method.loss]}
        state = self._start(start, config, numbers)
        batch = start.batches(steps)
        overheads, best, training, compiling = [], None, 0.0, 0.0
        validated: list[Row] = []
        for begin, end in zip([0, *marks], marks, strict=False):
            resumed = time.process_time()
            for number in range(begin, end):
                examples = {**batch(number), **numbers}
                compiled, called = self._step.compile_seconds, time.process_time()
                state, info = self._step(state, examples)
                if self._step.compile_seconds > compiled:
                    compiling += time.process_time() - called
                overheads.append(info.overhead)
            jax.block_until_ready(state.step)
            training += time.process_time() - resumed
            kept = optimizers.weights_to_use(state.opt_state, state.params)
            validated.append({"step": end, **self._course.validate(kept, start)})
            if is_final and (
                best is None or goodness(validated[-1]) > goodness(best[0])
            ):
                # Steps donate their state.
                best = validated[-1], jax.tree.map(jnp.copy, kept)
        row: Row = {
            "validation": validated[-1],
            **self._price(steps, np.mean(jax.device_get(overheads))),
            "cpu_seconds": round(training - compiling, 3),
            "compile_cpu_seconds": round(compiling, 3),
        }
        if best is not None:
            row["validated"] = validated
            row["last"] = self._course.judge(kept, start)
            row["selected"] = {
                "step": best[0]["step"],
                **self._course.judge(best[1], start),
            }
        row["all_cpu_seconds"] = round(time.process_time() - worked, 3)
        row["wall_seconds"] = round(time.perf_counter() - began, 3)
        return row

    def _start(
        self, start: Start, config: Mapping[str, Any], numbers: Mapping[str, Any]
    ) -> Any:
        """Return the state before a run."""
        if self._first is None:
            self._first = self._step.init(
                start.params,
                start.model_state,
                {**start.batches(1)(0), **numbers},
                key=jax.random.key(0),
            )
        copied = jax.tree.map(jnp.copy, self._first)
        hyperparams = dict(copied.hyperparams)
        if "rho" in hyperparams:
            hyperparams["rho"] = jnp.asarray(config["rho"], hyperparams["rho"].dtype)
        steps, tail = config["steps"], self._method.tail
        first = 0 if tail == 1.0 else TAIL_START - round((1 - tail) * steps)
        opt_state = self._optimizer.init(jax.tree.map(jnp.copy, start.params))
        return copied._replace(
            params=jax.tree.map(jnp.copy, start.params),
            model_state=jax.tree.map(jnp.copy, start.model_state),
            opt_state=optimizers.with_numbers(opt_state, config),
            hyperparams=hyperparams,
            key=jax.random.key(start.seed),
            step=jnp.int32(first),
        )

    def _price(self, steps: int, overhead: float) -> Row:
        """Return the price of a step in gradients, and of the run in both units."""
        assert self._step.cost is not None
        price = 1.0 + float(overhead)
        return {
            "steps": steps,
            "price": round(price, 4),
            "gradients": round(steps * price, 1),
            "flops": float(f"{steps * price * self._step.cost.plain:.6g}"),
        }


def _marks(steps: int, points: int) -> list[int]:
    """Return the steps at which a run is validated; the last one is its end."""
    return sorted({max(1, round(steps * (i + 1) / points)) for i in range(points)})
