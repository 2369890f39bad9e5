"""One run of a tuning: train from a seed with a configuration, and measure."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lwsam_jax as lwsam
from lwsam_bench.support.rows import Row
from lwsam_bench.tuning.method import Method
from lwsam_bench.tuning.methods import TAIL_START
from lwsam_bench.tuning.protocol import goodness, Request
from lwsam_bench.tuning.runs import optimizers, trajectory
from lwsam_bench.tuning.runs.course import Course, NUMBERS, Start


POINTS = 10  # of a final run at which it is validated
# More would cost a little less in training, and more in compiling than that.
EXECUTABLES = 6


class Runner:
    """A method's train step, shared by its runs so that it is compiled once.

    Learning rate, weight decay, number of steps, radius and alpha are data of its state.
    A method with `fixed` numbers gets a step of its own for each of their values.

    Args:
      course: The task.
      method: The method.
    """

    def __init__(self, course: Course, method: Method):
        self._course, self._method = course, method
        self._optimizer = optimizers.make(method.optimizer)
        self._loss_fn = course.loss_fn(method.loss)
        self._fixed: dict[str, Any] | None = None  # numbers that the step has inside
        self._step: Any = None
        self._first: Any = None  # the state before any run
        self._share = 1.0  # FLOPs of a plain step over those of the plain loss

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
        self._make_step(config)
        is_final = request.phase == "final"
        marks = _marks(steps, POINTS if is_final else 1)
        numbers = {n: jnp.float32(config[n]) for n in NUMBERS[self._method.loss]}
        state = self._start(start, config, numbers)
        batch = self._batches(start, steps, numbers)
        overheads, best, training, compiling = [], None, 0.0, 0.0
        validated: list[Row] = []
        for begin, end in zip([0, *marks], marks, strict=False):
            resumed = time.process_time()
            for number in range(begin, end):
                examples = batch(number)
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

    def _make_step(self, config: Mapping[str, Any]) -> None:
        """Make the train step, unless there is one with these numbers inside."""
        fixed = {name: config[name] for name in self._method.fixed}
        if fixed == self._fixed:
            return
        self._fixed, self._first = fixed, None
        self._step = lwsam.TrainStep(
            self._loss_fn,
            self._optimizer,
            self._method.make(**fixed),
            max_executables=EXECUTABLES,
        )

    def _batches(self, start: Start, steps: int, numbers: Mapping[str, Any]) -> Any:
        """Return the batches with what the loss reads of them."""
        batch, loss = start.batches(steps), self._method.loss
        return lambda step: {
            **batch(step),
            **numbers,
            **trajectory.numbers(loss, start, step),
        }

    def _start(
        self, start: Start, config: Mapping[str, Any], numbers: Mapping[str, Any]
    ) -> Any:
        """Return the state before a run."""
        model_state = trajectory.model_state(self._method.loss, start)
        if self._first is None:
            first = self._batches(start, 1, numbers)(0)
            self._first = self._step.init(
                start.params, model_state, first, key=jax.random.key(0)
            )
            self._share = self._share_of(start, model_state, first)
        copied = jax.tree.map(jnp.copy, self._first)
        hyperparams = dict(copied.hyperparams)
        for name in {"rho", "alpha"} & hyperparams.keys() & config.keys():
            hyperparams[name] = jnp.asarray(config[name], hyperparams[name].dtype)
        steps, tail = config["steps"], self._method.tail
        first = 0 if tail == 1.0 else TAIL_START - round((1 - tail) * steps)
        opt_state = self._optimizer.init(jax.tree.map(jnp.copy, start.params))
        return copied._replace(
            params=jax.tree.map(jnp.copy, start.params),
            model_state=model_state,
            opt_state=optimizers.with_numbers(opt_state, config),
            hyperparams=hyperparams,
            key=jax.random.key(start.seed),
            step=jnp.int32(first),
        )

    def _price(self, steps: int, overhead: float) -> Row:
        """Return the price of a step in gradients, and of the run in both units."""
        price = self._share * (1.0 + float(overhead))
        return {
            "steps": steps,
            "price": round(price, 4),
            "gradients": round(steps * price, 1),
            "flops": float(
                f"{steps * price * self._step.cost.plain / self._share:.6g}"
            ),
        }

    def _share_of(self, start: Start, model_state: Any, batch: Any) -> float:
        """Return what a loss with passes of its own costs over the plain one."""
        if self._method.loss not in trajectory.LOSSES:
            return 1.0
        plain, key = self._course.loss_fn("plain"), jax.random.key(0)
        plain_cost = lwsam.step_cost(plain, start.params, start.model_state, batch, key)
        return self._step.cost.plain / plain_cost.plain


def _marks(steps: int, points: int) -> list[int]:
    """Return the steps at which a run is validated; the last one is its end."""
    return sorted({max(1, round(steps * (i + 1) / points)) for i in range(points)})
