"""The command `train`: a training run that can be stopped at any moment.

The state of a train step and the number of steps done decide all that follows: batches
are pure functions of the seed and the step. So a run that goes on from a checkpoint
repeats, bit for bit, what an unbroken run does.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
from rich.console import Console

import lwsam_jax as lwsam
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.processes import ALONE, Processes
from lwsam_bench.support.progress import Rate, reading, TrainProgress
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.rows import output_folder, read_rows, Row, write_json
from lwsam_bench.support.stopping import Stop
from lwsam_bench.training import run_folder, tasks, vit_checkpoint
from lwsam_bench.training.checkpoint import Checkpoints
from lwsam_bench.training.config import RunOptions, TrainConfig
from lwsam_bench.training.recipe import make_step
from lwsam_bench.training.records import Records
from lwsam_bench.training.run_rows import in_short, Tally, train_row
from lwsam_bench.training.tasks import Task


CHECKPOINTS_IN_A_RUN = 10  # unless the user says how many steps lie between two
# Batches for the statistics of a BatchNorm: of those before, 4 % are left.
REFRESH = 30


def train(
    config: TrainConfig,
    options: RunOptions,
    console: Console,
    processes: Processes = ALONE,
) -> int:
    """Train, evaluate, and leave config, metrics and checkpoints in `options.out`.

    Args:
      config: The run.
      options: Where, and how often.
      console: Where to report.
      processes: Of which this is one, each with its rows of every batch. The first one
        alone writes rows and prints; checkpoints are written by all.

    Returns:
      0, or 130 or 143 if SIGINT or SIGTERM ended the run. A run whose seconds are up
      has no last row; so much is 0, too.

    Raises:
      UserError: If the run cannot be made, or another process is writing it.
    """
    out = pathlib.Path(options.out).expanduser()
    first = processes.first
    with contextlib.ExitStack() as stack:
        first(lambda: str(output_folder(options.out)))
        first(lambda: stack.enter_context(run_folder.lock(out)))
        processes.share_folder(out)
        if not options.resume:
            first(lambda: run_folder.start_over(out))
        with processes.together():
            weights = vit_checkpoint.digest(config, options.data_dir)
        before = first(lambda: run_folder.check_same_run(out, config, weights))
        if first(lambda: before is not None and _has_ended(out)):
            console.print(_ENDED.format(out), soft_wrap=True)
            return 0
        with processes.together(), reading(console, config.dataset) as on_record:
            task = tasks.make(config, options.data_dir, on_record, processes)
        # The path of published weights may differ; their digest is in it, too.
        processes.same({**_identity(config, task), "weights": None})
        with Checkpoints(out / run_folder.CHECKPOINTS, processes) as checkpoints:
            run = _Run(
                config, options, task, checkpoints, out, console, before, processes
            )
            return run.to_the_end()


def final_state(
    folder: pathlib.Path, config: TrainConfig, task: Task
) -> lwsam.TrainState:
    """Read the newest checkpoint of a run, as it is evaluated.

    Args:
      folder: Of the run.
      config: Of the run.
      task: What it learned, of the same configuration.

    Raises:
      UserError: If there is none, or it is of another run.
    """
    if not (folder / run_folder.CHECKPOINTS).is_dir():
        raise UserError(f"{folder} holds no checkpoint: train the run first")
    total = config.total_steps(task.steps_per_epoch)
    step_fn, _ = make_step(config, task.loss_fn, total, **task.facts())
    checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS)
    try:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{folder} holds no checkpoint: train the run first")
        template = _initial_state(step_fn, config, task)
        state, position = checkpoints.restore(step, template)
    finally:
        checkpoints.close()
    run_folder.refuse_other_run(
        folder, position.get("identity", {}), _identity(config, task)
    )
    return _refreshed(step_fn, state, config, task)


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
        processes: Processes,
    ):
        self.config, self.options, self.out = config, options, out
        self.processes, self.signal = processes, 0
        self.task, self.checkpoints, self.console = task, checkpoints, console
        self.total = config.total_steps(task.steps_per_epoch)
        self.step_fn, self.learning_rate = make_step(
            config, task.loss_fn, self.total, **task.facts(), mesh=processes.mesh
        )
        self.state = _initial_state(self.step_fn, config, task)
        self.identity = _identity(config, task)
        self.done, self.earlier = 0, Tally()
        say = functools.partial(console.print, highlight=False, soft_wrap=True)
        found = checkpoints.restore_newest(self.state, say)
        if found is not None:
            self.done, self.state, position = found
            run_folder.refuse_other_run(
                out, position.get("identity", {}), self.identity
            )
            self.earlier = Tally.restore(position["tally"])
        self.checkpoint_every = options.checkpoint_every or min(
            task.steps_per_epoch, -(-self.total // CHECKPOINTS_IN_A_RUN)
        )
        self.started = time.perf_counter()
        self.unread: list[lwsam.StepInfo] = []  # of the latest steps
        self.recent = Tally()
        self.record = before or {
            "config": dataclasses.asdict(config),
            "data": dict(task.source),
            "parameters": sum(x.size for x in jax.tree.leaves(task.network.params)),
            "total_steps": self.total,
            "provenance": [],
        }
        if task.weights is not None:
            self.record["weights_sha256"] = task.weights
        if task.note:
            console.print(task.note, highlight=False, soft_wrap=True)

    def to_the_end(self) -> int:
        """Run the steps that are left; return the exit code."""
        first = self.processes.first
        if first(lambda: self.done >= self.total and _has_ended(self.out)):
            self.console.print(_ENDED.format(self.out), soft_wrap=True)
            return 0
        # A run that is resumed may go on with other code or versions: say so.
        self.record["provenance"].append({"from_step": self.done, **provenance()})
        first(lambda: write_json(self.out / run_folder.CONFIG, self.record))
        if self.done:
            self.console.print(f"going on from step {self.done} of {self.total}")
        self.started = time.perf_counter()
        with (
            Records(
                self.out, self.done, self.total, self.processes.is_first
            ) as records,
            Stop() as stop,
            TrainProgress(self.console, self.total, self.done) as progress,
        ):
            result = self._steps(records, stop, progress)
            if self.done >= self.total:
                # None: it was killed before it could write its last row.
                result = result or self._evaluate()
                records.write(self._end_row(result))
                records.sync()
        if self.done < self.total:
            self.console.print(
                f"stopped at step {self.done} of {self.total}; the same command goes on"
                f" from here",
                soft_wrap=True,
            )
        # Also after the last step: who sent it wants no other run to begin.
        self.signal = self.processes.most(stop.signal)
        return 128 + self.signal if self.signal else 0

    def _steps(
        self, records: Records, stop: Stop, progress: TrainProgress
    ) -> Row | None:
        """Run the steps; return the last evaluation."""
        rate, first, result = Rate(), self.done, None
        while self.done < self.total and not self._must_end(stop):
            self.state, info = self.step_fn(self.state, self.task.batches(self.done))
            self.unread.append(info)
            self.done += 1
            last = self.done == self.total
            if self.done % self.options.log_every == 0 or last:
                row = self._train_row(info)
                records.write(row)
                speed = rate((self.done - first) * self.task.items_per_batch)
                numbers = f"{speed:,.0f} {self.task.unit}/s"
                progress.step(self.done, in_short(row, numbers, len(info.mask)))
            else:
                progress.step(self.done)
            if self.done % self.task.steps_per_epoch == 0 or last:
                result = self._evaluate()
                records.write({"kind": "test", **self._where(), **result})
                progress.say(
                    f"step {self.done}: test accuracy {result['accuracy']:.2%},"
                    f" test loss {result['loss']:.4f}"
                )
            if self.done % self.checkpoint_every == 0 or last:
                self._checkpoint(records)
        self._checkpoint(records)  # of a run that was stopped
        return result

    def _must_end(self, stop: Stop) -> bool:
        """Whether a signal came, or the time is up, in this process or another."""
        self.signal = self.processes.most(stop.signal)
        limit = self.options.seconds
        if limit is None:
            return bool(self.signal)
        is_late = time.perf_counter() - self.started > limit
        return bool(self.processes.most(int(is_late)) or self.signal)

    def _checkpoint(self, records: Records) -> None:
        # First the rows: a checkpoint promises that those before it are there.
        records.sync()
        position = {
            "identity": self.identity,
            "tally": dataclasses.asdict(self._tally()),
        }
        self.checkpoints.save(self.done, self.state, position)

    def _tally(self) -> Tally:
        self.recent = self.recent.after(self.unread)
        self.unread = []
        return self.earlier.add(
            dataclasses.replace(
                self.recent,
                seconds=time.perf_counter() - self.started,
                compile_seconds=self.step_fn.compile_seconds,
                executables=tuple(map(str, self.step_fn.executables)),
            )
        )

    def _end_row(self, result: Row) -> Row:
        layers = self.step_fn.layers
        assert layers is not None  # `init` has seen the parameters
        return self._tally().end_row(self._where(), result, layers)

    def _where(self) -> Row:
        return {"step": self.done, "epoch": self.done / self.task.steps_per_epoch}

    def _train_row(self, info: Any) -> Row:
        layers = self.step_fn.layers
        assert layers is not None  # the step has run
        seconds = time.perf_counter() - self.started
        return train_row(info, layers.names, self.learning_rate, self._where(), seconds)

    def _evaluate(self) -> Row:
        state = _refreshed(self.step_fn, self.state, self.config, self.task)
        return self.task.evaluate(state.params, state.model_state)


_ENDED = "{} holds this run already, finished."


def _has_ended(out: pathlib.Path) -> bool:
    rows = read_rows(out / run_folder.METRICS)
    return any(row.get("kind") == "end" for row in rows)


def _identity(config: TrainConfig, task: Task) -> dict[str, Any]:
    return run_folder.identity(config, task.fingerprint, task.weights)


def _refreshed(
    step_fn: lwsam.TrainStep, state: lwsam.TrainState, config: TrainConfig, task: Task
) -> lwsam.TrainState:
    """Return a state whose statistics of BatchNorm are those of its own weights.

    Unless a clean pass sees the whole batch they are gathered at the perturbed ones.
    """
    if config.ascent == "whole_batch" or not task.network.has_statistics:
        return state
    return step_fn.refresh(state, map(task.batches, range(REFRESH)))


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
