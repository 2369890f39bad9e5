"""What the tests of the command line share."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import lwsam_bench


_DEVICES = "--xla_force_host_platform_device_count"
_BENCHMARKS = pathlib.Path(lwsam_bench.__file__).parents[1]


class Command:
    """`lwsam-bench` as a process of its own; a session shares compiled programs."""

    def __init__(self, cache: pathlib.Path):
        self._environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(
                [str(_BENCHMARKS), str(_BENCHMARKS.parent), *sys.path]
            ),
        }

    def start(self, *arguments: object, devices: int | None = None) -> subprocess.Popen:
        environment = dict(self._environment)
        if devices is not None:
            flags = environment.get("XLA_FLAGS", "")
            count = rf"\g<1>={devices}"
            environment["XLA_FLAGS"] = re.sub(rf"({_DEVICES})=\d+", count, flags)
        return subprocess.Popen(
            [sys.executable, "-m", "lwsam_bench", *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: object) -> tuple[int, str]:
        """Return exit code and output."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=500)
        return process.returncode, output


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    return Command(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def rows():
    """A function that reads the rows of a metrics file."""
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(monkeypatch):
    """Keep what runs in this process from writing to the user's cache folder."""
    monkeypatch.setattr("lwsam_bench.support.cache.enable", lambda: None)
