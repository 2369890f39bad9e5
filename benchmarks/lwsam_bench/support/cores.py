"""The cores that this process may use."""

import os
import pathlib


def count() -> int:
    """Return how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def each_its_own(processes: int) -> list[int | None]:
    """Return a core for each of so many processes, None where a process cannot choose.

    The first is the one that this process is on: the system found it free, also where
    other commands hold the first ones.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [None] * processes
    allowed = sorted(os.sched_getaffinity(0))
    here = _current()
    first = allowed.index(here) if here in allowed else 0
    return [allowed[(first + n) % len(allowed)] for n in range(processes)]


def stay_on(core: int | None) -> None:
    """Keep to a core; before JAX starts, so that XLA has one thread.

    XLA splits work by the number of cores, and so the last bits depend on it.
    """
    if core is not None:
        os.sched_setaffinity(0, {core})


def _current() -> int | None:
    try:
        stat = pathlib.Path("/proc/self/stat").read_text()
        return int(stat.rpartition(")")[2].split()[36])
    except (OSError, ValueError, IndexError):
        return None
