"""One attempt at a run, in this process or as a process of its own.

`python -m lwsam_bench.paper.attempts` reads the request from its argument and writes the
result where that says.
"""

import dataclasses
import json
import logging
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import filelock
from rich.console import Console

from lwsam_bench.paper.runs.outcome import DONE, FAILED, MISSING, record_failure
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import write_json
from lwsam_bench.training.config import RunOptions, TrainConfig


STOPPED, LOCKED = "stopped", "locked"


@dataclasses.dataclass(frozen=True)
class Result:
    """How an attempt ended.

    Attributes:
      status: `done`, `failed`, `missing data`, `stopped`, or `locked` if another
        process is training the run.
      reason: Why it is not done.
      code: Exit code if a signal stopped it, 130 or 143.
    """

    status: str
    reason: str = ""
    code: int = 0


def attempt(config: TrainConfig, options: RunOptions, console: Console) -> Result:
    """Train, or go on with, a run; a failure is recorded in its folder."""
    from lwsam_bench.training import loop, tasks  # they import JAX

    folder = pathlib.Path(options.out)
    try:
        code = loop.train(config, options, console)
    except UserError as error:
        if isinstance(error.__cause__, filelock.Timeout):
            return Result(LOCKED, str(error))
        # The data are to blame if they cannot be had for themselves.
        try:
            tasks.make(config, options.data_dir)
        except UserError as missing:
            return Result(MISSING, str(missing))
        return _failed(folder, error)
    except Exception as error:  # of the model, of XLA: the other runs go on
        return _failed(folder, error)
    return Result(STOPPED, code=code) if code else Result(DONE)


def _failed(folder: pathlib.Path, error: Exception) -> Result:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    reason = f"{kind}{error}".strip().splitlines()[0]
    record_failure(folder, reason, error)
    return Result(FAILED, reason)


def request(
    config: TrainConfig, options: RunOptions, result: pathlib.Path
) -> list[str]:
    """Return the command of a process that makes an attempt.

    Args:
      config: The run.
      options: Of the run.
      result: File for the `Result`, as JSON.
    """
    wanted = {
        "config": dataclasses.asdict(config),
        "options": dataclasses.asdict(options),
        "result": str(result),
        "parent": os.getpid(),
    }
    return [sys.executable, "-m", __spec__.name, json.dumps(wanted)]


def _main(argument: str) -> int:
    wanted: Mapping[str, Any] = json.loads(argument)
    threading.Thread(target=_end_with, args=(wanted["parent"],), daemon=True).start()
    # As the command line does: the readers of data tell the log about each file.
    logging.getLogger("absl").setLevel(logging.ERROR)
    from lwsam_bench.support import cache

    cache.enable()
    values = wanted["config"]
    config = TrainConfig(**{**values, "decay_at": tuple(values["decay_at"])})
    options = RunOptions(**wanted["options"])
    result = attempt(config, options, Console(width=100))
    write_json(pathlib.Path(wanted["result"]), dataclasses.asdict(result))
    return result.code


def _end_with(parent: int) -> None:
    """Stop this process, in good order, as soon as the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
