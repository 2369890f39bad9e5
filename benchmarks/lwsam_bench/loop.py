"""The command `train`: a training run that can be stopped at any moment.

The state of a train step and the number of steps done decide all that follows: batches
are pure functions of the seed and the step. So a run that goes on from a checkpoint
repeats, bit for bit, what an unbroken run does.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
from rich.console import Console

import lwsam_jax as lwsam
from lwsam_bench import run_folder, tasks
from lwsam_bench._errors import UserError
from lwsam_bench.checkpoint import Checkpoints
from lwsam_bench.config import RunOptions, TrainConfig
from lwsam_bench.metrics import MetricsFile, output_folder, Row, write_json
from lwsam_bench.progress import name_layers, Rate, reading, TrainProgress
from lwsam_bench.provenance import provenance
from lwsam_bench.stopping import Stop
from lwsam_bench.tasks import Task
from lwsam_bench.training import make_step


CHECKPOINTS_IN_A_RUN = 10  # unless the user says how many steps lie between two


def train(config: TrainConfig, options: RunOptions, console: Console) -> int:
    """Train, evaluate, and leave config, metrics and checkpoints in `options.out`.

    Returns:
      0, or 130 or 143 if SIGINT or SIGTERM ended the run.
    """
    out = output_folder(options.out)
    folder = out / run_folder.CHECKPOINTS
    if not options.resume:
        run_folder.start_over(out)
    before = run_folder.check_same_run(out, config)
    with reading(console, config.dataset) as on_record:
        task = tasks.make(config, options.data_dir, on_record)
    checkpoints = Checkpoints(folder)
    try:
        run = _Run(config, options, task, checkpoints, out, console, before)
        return run.to_the_end()
    finally:
        checkpoints.close()


class _Run:
    """One call of `train`: everything that is made before the first step."""

    def __init__(
        self,
        config: TrainConfig,
        options: RunOptions,
        task: Task,
        checkpoints: Checkpoints,
        out: pathlib.Path,
        console: Console,
        before: dict[str, Any] | None,
    ):
        self.config, self.options, self.out = config, options, out
        self.task, self.checkpoints, self.console = task, checkpoints, console
        self.total = config.total_steps(task.steps_per_epoch)
        self.step_fn, self.learning_rate = make_step(config, task.loss_fn, self.total)
        self.state = _initial_state(self.step_fn, config, task)
        self.identity = {
            **dataclasses.asdict(config),
            "data_sha256": task.fingerprint,
        }
        self.done = checkpoints.latest() or 0
        if self.done:
            self.state, position = checkpoints.restore(self.done, self.state)
            run_folder.refuse_other_run(
                out, position.get("identity", {}), self.identity
            )
            # It decides which executables run; they differ in how they round.
            self.step_fn.restore_history(position["history"])
        self.checkpoint_every = options.checkpoint_every or min(
            task.steps_per_epoch, -(-self.total // CHECKPOINTS_IN_A_RUN)
        )
        self.record = before or {
            "config": dataclasses.asdict(config),
            "data": dict(task.source),
            "parameters": sum(x.size for x in jax.tree.leaves(task.network.params)),
            "total_steps": self.total,
            "provenance": [],
        }
        if task.note:
            console.print(task.note, highlight=False, soft_wrap=True)

    def to_the_end(self) -> int:
        """Run the steps that are left; return the exit code."""
        if self.done >= self.total:
            self.console.print(f"{self.out} holds this run already, finished.")
            return 0
        # A run that is resumed may go on with other code or versions: say so.
        self.record["provenance"].append({"from_step": self.done, **provenance()})
        write_json(self.out / run_folder.CONFIG, self.record)
        if self.done:
            self.console.print(f"going on from step {self.done} of {self.total}")
        path = self.out / run_folder.METRICS
        with (
            MetricsFile(path, self.done or None) as metrics,
            Stop() as stop,
            TrainProgress(self.console, self.total, self.done) as progress,
        ):
            self._steps(metrics, stop, progress)
        if stop.signal and self.done < self.total:
            self.console.print(
                f"stopped at step {self.done} of {self.total}; the same command goes on"
                f" from here",
                soft_wrap=True,
            )
            return 128 + stop.signal
        return 0

    def _steps(
        self, metrics: MetricsFile, stop: "Stop", progress: TrainProgress
    ) -> None:
        rate, first = Rate(), self.done
        started = time.perf_counter()
        while self.done < self.total and not stop.signal:
            self.state, info = self.step_fn(self.state, self.task.batches(self.done))
            self.done += 1
            last = self.done == self.total
            if self.done % self.options.log_every == 0 or last:
                row = self._train_row(info, time.perf_counter() - started)
                metrics.write(row)
                speed = rate((self.done - first) * self.task.items_per_batch)
                speed_now = f"{speed:,.0f} {self.task.unit}/s"
                progress.step(self.done, _in_short(row, speed_now, len(info.mask)))
            else:
                progress.step(self.done)
            if self.done % self.task.steps_per_epoch == 0 or last:
                row = self._test_row()
                metrics.write(row)
                progress.say(
                    f"step {self.done}: test accuracy {row['accuracy']:.2%},"
                    f" test loss {row['loss']:.4f}"
                )
            if self.done % self.checkpoint_every == 0 or last:
                self._checkpoint(metrics)
        self._checkpoint(metrics)  # of a run that was stopped

    def _checkpoint(self, metrics: MetricsFile) -> None:
        # First the rows: a checkpoint promises that those before it are there.
        metrics.sync()
        position = {"identity": self.identity, "history": self.step_fn.history()}
        self.checkpoints.save(self.done, self.state, position)

    def _train_row(self, info: Any, seconds: float) -> Row:
        host = jax.device_get(info)
        layers = self.step_fn.layers
        assert layers is not None  # the step has run
        names = layers.names
        return {
            "kind": "train",
            "step": self.done,
            "epoch": self.done / self.task.steps_per_epoch,
            "loss": float(host.value),
            "perturbed_loss": float(host.perturbed_value),
            "accuracy": float(host.metrics["accuracy"]),
            "lr": float(self.learning_rate(self.done - 1)),
            "overhead": float(host.overhead),
            "finite": bool(host.finite),
            "perturbed": [n for n, on in zip(names, host.mask, strict=True) if on],
            "norms": dict(zip(names, map(float, host.norms), strict=True)),
            "seconds": round(seconds, 3),
        }

    def _test_row(self) -> Row:
        result = self.task.evaluate(self.state.params, self.state.model_state)
        epoch = self.done / self.task.steps_per_epoch
        return {"kind": "test", "step": self.done, "epoch": epoch, **result}


def _initial_state(
    step_fn: lwsam.TrainStep, config: TrainConfig, task: Task
) -> lwsam.TrainState:
    try:
        return step_fn.init(
            task.network.params,
            task.network.model_state,
            task.batches(0),
            key=jax.random.key(config.seed),
        )
    except ValueError as error:  # more layers wanted than there are
        raise UserError(str(error)) from error


def _in_short(row: Row, speed: str, layers: int) -> str:
    return (
        f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}  {speed}"
        f"  perturbed: {name_layers(row['perturbed'], layers)}"
    )
