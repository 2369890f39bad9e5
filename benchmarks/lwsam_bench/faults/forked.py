"""Processes that are forked from one which has imported all that a run needs.

Starting Python and importing JAX takes longer than most of what is broken here. JAX
itself starts in the fork; a fork has an output of its own, and dies alone.
"""

import contextlib
import importlib
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess

import jax


_IMPORTED = (
    "lwsam_bench.commands.cli",
    "lwsam_bench.training.loop",
    "lwsam_bench.faults.on_devices",
    "sklearn.datasets",
)
_DEVICES = "--xla_force_host_platform_device_count"


class Forked:
    """A process under way.

    Args:
      module: Within `lwsam_bench`. Its `main` takes the arguments and returns an exit
        code, or None.
      arguments: Of the command line.
      cache: Folder of compiled programs.
      devices: How many JAX sees; as the flags of this process say by default.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        cache: pathlib.Path,
        devices: int | None = None,
    ):
        context = _context()
        handle, name = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self._output = pathlib.Path(name)
        self._process: ForkServerProcess = context.Process(
            target=_run,
            args=(module, list(arguments), str(cache), devices, name),
            daemon=True,  # ends with this process
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return its exit code, minus the number of a signal; None while it is alive."""
        return self._process.exitcode

    def send(self, number: int) -> None:
        """Send a signal, if it is alive."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> tuple[int, str] | None:
        """Return exit code and output; None if it has not ended by then."""
        self._process.join(seconds)
        code = self._process.exitcode
        return None if code is None else (code, self._said())

    def end(self) -> str:
        """Kill it; return its output."""
        self.send(signal.SIGKILL)
        self._process.join()
        return self._said()

    def _said(self) -> str:
        text = self._output.read_text(encoding="utf-8", errors="replace")
        self._output.unlink()
        return text


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    # Who is killed leaves semaphores, which are cleared away, and need not be told of.
    name = "PYTHONWARNINGS"
    before = os.environ.get(name)
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ[name] = quiet if before is None else f"{before},{quiet}"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return context


def _run(
    module: str, arguments: list[str], cache: str, devices: int | None, output: str
) -> None:
    """Be the process."""
    file = os.open(output, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(file, number)
    if devices is not None:
        kept = [x for x in os.environ.get("XLA_FLAGS", "").split() if _DEVICES not in x]
        os.environ["XLA_FLAGS"] = " ".join([*kept, f"{_DEVICES}={devices}"])
    # Equal to the last bit is a promise for one machine, kept on its CPU.
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    sys.exit(importlib.import_module(f"lwsam_bench.{module}").main(arguments))
