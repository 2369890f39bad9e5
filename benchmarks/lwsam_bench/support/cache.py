"""JAX's persistent compilation cache: a second run need not compile again."""

import hashlib
import os
import pathlib
import platform
from typing import Any

import jax
from jaxlib import version as jaxlib_version

from lwsam_bench.support import cores


def enable() -> pathlib.Path | None:
    """Keep compiled programs under the user's cache folder.

    `JAX_COMPILATION_CACHE_DIR` names another folder, and
    `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off, as they do for all of JAX.
    A cached program is the one that was compiled before, so results do not depend on
    the cache.

    Returns:
      The folder, or None if there is no cache.
    """
    config: Any = jax.config  # its attributes are made at run time
    if not config.jax_enable_compilation_cache:
        return None
    if config.jax_compilation_cache_dir:
        return pathlib.Path(config.jax_compilation_cache_dir)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    folder = pathlib.Path(base).expanduser() / "lwsam-bench" / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # only slower
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def _machine() -> str:
    """Return a name for this kind of machine.

    A program compiled for one CPU may use instructions that another one lacks, and home
    folders are shared between machines. One compiled for more cores splits its work in
    other places, and JAX would take it all the same.
    """
    features = platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features += "".join(
            sorted({x for x in lines if x.startswith(("flags", "Feat"))})
        )
    except OSError:
        pass
    digest = hashlib.sha256(features.encode()).hexdigest()[:8]
    kind = f"{platform.machine()}-{digest}-{cores.count()}"
    return f"jaxlib-{jaxlib_version.__version__}-{kind}"
