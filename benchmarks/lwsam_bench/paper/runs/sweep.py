"""Many training runs in one folder: what is missing is trained, what is there is kept.

Each run has a folder of its own under `runs/`, named by its configuration, so commands
that want equal runs share them. A run that failed is recorded as failed and not tried
again; a dataset that is not there is looked for once.
"""

import collections
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Self

import filelock
from rich.console import Console

from lwsam_bench.paper.request import Request
from lwsam_bench.paper.runs.attempts import attempt, LOCKED, Result, STOPPED
from lwsam_bench.paper.runs.outcome import (
    FAILED,
    judge,
    MISSING,
    Outcome,
    PENDING,
    run_id,
    RUNS,
)
from lwsam_bench.paper.runs.pool import Pool
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import output_folder
from lwsam_bench.support.stopping import Stop
from lwsam_bench.training import run_folder
from lwsam_bench.training.config import LOG_EVERY, RunOptions, TrainConfig


class Stopped(Exception):
    """A signal ended a run; the same command goes on from there.

    Attributes:
      code: The exit code for the command, 130 or 143.
    """

    def __init__(self, code: int):
        super().__init__(f"stopped with exit code {code}")
        self.code = code


class Sweep:
    """Training runs below a folder.

    Args:
      folder: Output folder of the command; the runs are in `runs/` of it.
      data_dir: Folder of tensorflow-datasets.
      console: Where to report.
      jobs: Runs at one time; more than one are processes of their own, spread over the
        GPUs that there are.
      patience: Seconds to wait for a run that another process is training.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        data_dir: str | None,
        console: Console,
        jobs: int = 1,
        *,
        patience: float = 60.0,
    ):
        self._runs = output_folder(str(folder)) / RUNS
        self._data_dir, self._console = data_dir, console
        self._jobs, self._patience = jobs, patience
        self._missing: dict[tuple[str, str], str] = {}  # by dataset and model

    @classmethod
    def of(cls, request: Request) -> Self:
        """Return the runs that a command is about."""
        return cls(request.out, request.data_dir, request.console, request.jobs)

    def folder(self, config: TrainConfig) -> pathlib.Path:
        """Return the folder of a run."""
        return self._runs / run_id(config)

    def ensure(self, configs: Iterable[TrainConfig]) -> dict[TrainConfig, Outcome]:
        """Train what has not ended, each configuration once; return what became of it.

        Raises:
          Stopped: If a signal ended a run.
          UserError: If another process is training one of the runs.
        """
        wanted = list(dict.fromkeys(configs))
        todo = [c for c in wanted if self._outcome(c).status == PENDING]
        if todo and len(todo) < len(wanted):
            self._say(f"{len(wanted) - len(todo)} of {len(wanted)} runs have ended")
        ended = self._side_by_side(todo) if self._jobs > 1 else self._in_turn(todo)
        for config, result in ended:
            if result.status == STOPPED:
                raise Stopped(result.code)
            if result.status == LOCKED:
                raise UserError(result.reason)
            if result.status == MISSING:
                self._is_missing(config, result.reason)
            elif result.status == FAILED:
                self._say(f"{run_id(config)} failed: {result.reason}")
        return {config: self._outcome(config) for config in wanted}

    def _in_turn(self, todo: list[TrainConfig]) -> Iterator[tuple[TrainConfig, Result]]:
        progress = _TimeLeft(len(todo))
        for number, config in enumerate(todo, start=1):
            if self._key(config) not in self._missing:
                self._wait(config)
            if self._outcome(config).status != PENDING:
                continue  # no data, or another process has ended it meanwhile
            left = progress.text(number - 1)
            self._say(f"run {number} of {len(todo)}{left}: {run_id(config)}")
            yield config, attempt(config, self._options(config), self._console)

    def _side_by_side(
        self, todo: list[TrainConfig]
    ) -> Iterator[tuple[TrainConfig, Result]]:
        if not todo:
            return
        self._say(f"{len(todo)} runs, {self._jobs} at a time")
        progress, count, stopped = _TimeLeft(len(todo)), 0, 0
        for config in todo:
            self._wait(config)
        work = collections.deque((c, self._options(c)) for c in todo)
        until: dict[TrainConfig, float] = {}  # when to lose patience
        with Stop() as stop:
            for (config, _), result in Pool(self._jobs, stop).run(work):
                now = time.monotonic()
                if result.status == LOCKED and now < until.setdefault(
                    config, now + self._patience
                ):
                    work.append((config, self._options(config)))
                    continue  # another process has begun it: see what becomes of it
                count += 1
                if result.status == STOPPED:
                    stopped = result.code
                    continue  # by a signal to all, or to this one alone
                self._say(
                    f"{count} of {len(todo)} runs{progress.text(count)}:"
                    f" {run_id(config)} {result.status}"
                )
                yield config, result
                for pair in [p for p in work if self._key(p[0]) in self._missing]:
                    work.remove(pair)
                    count += 1
        if stop.signal or stopped:
            raise Stopped(stopped or 128 + stop.signal)

    def _options(self, config: TrainConfig) -> RunOptions:
        return RunOptions(
            out=str(self.folder(config)),
            data_dir=self._data_dir,
            log_every=LOG_EVERY if _is_long(config) else 1,
            # A checkpoint takes longer than many steps of the smallest runs.
            checkpoint_every=3 if _is_tiny(config) else None,
        )

    def _outcome(self, config: TrainConfig) -> Outcome:
        found = judge(self.folder(config))
        reason = self._missing.get(self._key(config))
        if found.status == PENDING and reason is not None:
            return Outcome(found.folder, MISSING, reason)
        return found

    def _is_missing(self, config: TrainConfig, reason: str) -> None:
        if self._key(config) not in self._missing:
            self._missing[self._key(config)] = reason
            self._say(f"{reason}\nThe runs that need it are left out.")

    def _key(self, config: TrainConfig) -> tuple[str, str]:
        return config.dataset, config.model

    def _wait(self, config: TrainConfig) -> None:
        """Wait until no other process is training a run."""
        folder = self.folder(config)
        if not folder.exists():
            return
        lock = filelock.FileLock(folder / run_folder.LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            self._say(f"{run_id(config)} is being trained by another process: waiting")
            try:
                lock.acquire(timeout=self._patience)
            except filelock.Timeout as error:
                raise UserError(
                    f"another process is training {folder}: wait for it to end, or"
                    " choose another --out"
                ) from error
        lock.release()

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def _is_long(config: TrainConfig) -> bool:
    """Return whether a run has rows enough if not every step leaves one."""
    return (config.epochs or 0) > 20 or (config.steps or 0) > 2_000


def _is_tiny(config: TrainConfig) -> bool:
    return (config.train_images or 1_000) < 1_000 or (config.steps or 1_000) < 10


class _TimeLeft:
    """An estimate from the runs that have ended."""

    def __init__(self, total: int):
        self._total, self._started = total, time.monotonic()

    def text(self, ended: int) -> str:
        """Return how long the rest will take, in words; nothing before the first end."""
        if not 0 < ended < self._total:
            return ""
        seconds = (time.monotonic() - self._started) / ended * (self._total - ended)
        if seconds < 90:
            return f", about {seconds:.0f} s left"
        if seconds < 5400:
            return f", about {seconds / 60:.0f} min left"
        return f", about {seconds / 3600:.1f} h left"
