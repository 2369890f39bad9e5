"""Where a number comes from: code, versions, device."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

from lwsam_bench.support import cores


_RESULTS = ":(top,exclude)benchmarks/results"
_PACKAGES = (
    "lwsam-jax",
    "jax",
    "jaxlib",
    "optax",
    "flax",
    "numpy",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "scikit-learn",
)


def provenance() -> dict[str, Any]:
    """Return what a reader needs to repeat a run; values for JSON."""
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": device.platform,
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cores": cores.count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """Return commit and dirty flag; both None where the code is in no repository."""
    folder = pathlib.Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    # The code may lie in an environment inside some other project's repository.
    ours = commit and _git(folder, "ls-files", "--error-unmatch", __file__) is not None
    if not ours:
        return {"commit": None, "dirty": None}
    # Untracked files count: an experiment may import one. Results do not: a command that
    # writes them into the repository would call its own second row dirty.
    status = _git(folder, "status", "--porcelain", "--", ":/", _RESULTS)
    return {"commit": commit, "dirty": bool(status)}


def _git(folder: pathlib.Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
