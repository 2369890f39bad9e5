"""The command `scaling`: compiles steps for several devices and processes."""

import dataclasses
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator

from rich.console import Console

from lwsam_bench.scaling import programs, table
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.rows import (
    output_folder,
    read_rows,
    Row,
    write_rows,
    write_text,
)


ROWS, TABLE = "scaling.jsonl", "scaling.md"
_COUNT = "--xla_force_host_platform_device_count"
_PATIENCE = 600  # seconds, for a group of processes


@dataclasses.dataclass(frozen=True)
class Extent:
    """What is compiled.

    Attributes:
      groups: Pairs of processes, and devices of each.
      methods: Names of `programs.METHODS`.
    """

    groups: tuple[tuple[int, int], ...] = (
        (1, 1),
        (1, 2),
        (1, 4),
        (1, 8),
        (2, 1),
        (4, 1),
    )
    methods: tuple[str, ...] = tuple(programs.METHODS)


SMOKE = Extent(groups=((1, 2), (2, 1)), methods=("SGD", "SAM"))


def run(
    extent: Extent, out_name: str, docs: str | None, console: Console, render_only: bool
) -> int:
    """Compile the steps, none of which runs; print and write what they cost.

    Raises:
      UserError: If a process fails, or processes have other programs than each other.
    """
    out = output_folder(out_name)
    if render_only:
        rows = list(read_rows(out / ROWS))
        if not rows:
            raise UserError(f"{out / ROWS} has no rows")
    else:
        origin = {"network": programs.NETWORK, **provenance()}
        rows = [{"kind": "config", **origin}]
        for processes, devices in extent.groups:
            rows += _programs(processes, devices, extent.methods)
            console.print(f"{processes} x {devices}", highlight=False)
        write_rows(out / ROWS, rows)
    text = table.markdown(rows)
    write_text(out / TABLE, text)
    console.print(text, highlight=False, soft_wrap=True)
    if docs is not None:
        table.update_page(pathlib.Path(docs), rows)
    return 0


def _programs(processes: int, devices: int, methods: tuple[str, ...]) -> Iterator[Row]:
    """Return the rows of a group of processes, which must all say the same."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lwsam_bench.scaling.worker"]
    command += ["--coordinator", f"localhost:{port}", "--num-processes", str(processes)]
    command += ["--methods", *methods]
    flags = re.sub(rf"{_COUNT}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} {_COUNT}={devices}".strip(),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    started = [
        subprocess.Popen(
            [*command, "--process-id", str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        ended = [process.communicate(timeout=_PATIENCE) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    for process, (_, errors) in zip(started, ended, strict=True):
        if process.returncode:
            raise UserError(f"a process of {processes} fails: {errors[-2000:]}")
    said = [[x for x in out.splitlines() if x.startswith("{")] for out, _ in ended]
    if any(lines != said[0] for lines in said):
        raise UserError(f"{processes} processes have programs of their own: {said}")
    for line in said[0]:
        where = {"processes": processes, "devices": processes * devices}
        yield {"kind": "program", **where, **json.loads(line)}
