"""Compiling in less time, for programs that run only a few times: smoke runs and tests.

It imports nothing of JAX, which reads the flags when it starts.
"""

import importlib.metadata
import os


_FLAGS = {
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
# XLA ends the process on a flag that it does not know, and this one is on its way out.
_FUSION_EMITTERS = "--xla_cpu_use_fusion_emitters"
_LAST_WITH_FUSION_EMITTERS = (0, 11)


def enable() -> None:
    """Tell XLA so by `XLA_FLAGS`; flags that the user set stay."""
    wanted = dict(_FLAGS)
    if _jaxlib() <= _LAST_WITH_FUSION_EMITTERS:
        wanted[_FUSION_EMITTERS] = "false"
    flags = os.environ.get("XLA_FLAGS", "")
    for name, value in wanted.items():
        if name not in flags:
            flags = f"{flags} {name}={value}".strip()
    os.environ["XLA_FLAGS"] = flags


def _jaxlib() -> tuple[int, ...]:
    major, minor = importlib.metadata.version("jaxlib").split(".")[:2]
    return int(major), int(minor)
