"""One writer for each file of rows."""

import contextlib
import pathlib
from collections.abc import Iterator

import filelock

from lwsam_bench.support.errors import UserError


@contextlib.contextmanager
def row_lock(path: pathlib.Path) -> Iterator[None]:
    """Keep other processes from writing a file; the lock goes with the process.

    Raises:
      UserError: If one does.
    """
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(
            f"another process is writing {path}: wait for it to end, or use another --out"
        ) from error
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error}") from error
    try:
        yield
    finally:
        lock.release()
