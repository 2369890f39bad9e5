"""What a run leaves behind: `config.json`, and `metrics.jsonl` with one row a line."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

from lwsam_bench.support.errors import UserError


Row = dict[str, Any]


class MetricsFile:
    """Rows of numbers, one JSON object a line, written as they come.

    A row has a `kind` and a `step`, the number of training steps done. A value that is
    not finite is written as null: JSON has no name for it.

    Args:
      path: The file.
      keep_until: Rows of later steps are cut away, as is a last line that a crash tore
        apart; None starts an empty file.
    """

    def __init__(self, path: pathlib.Path, keep_until: int | None = None):
        rows = [] if keep_until is None else list(read_rows(path))
        kept = [row for row in rows if row.get("step", 0) <= (keep_until or 0)]
        # The new file replaces the old one whole: a crash leaves one of the two.
        write_rows(path, kept)
        with _said(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append a row; it is in the file, if not on the disk, on return."""
        with self._said():
            self._file.write(_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        with self._said():
            self._file.flush()
            os.fsync(self._file.fileno())

    def _said(self) -> contextlib.AbstractContextManager[None]:
        return _said(pathlib.Path(self._file.name))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Close the file."""
        try:
            with self._said():
                self._file.close()
        except UserError:
            if not any(raised):  # else it is known: a disk that is full stays so
                raise


def read_rows(path: pathlib.Path) -> Iterator[Row]:
    """Yield the rows of a file, if it is there, up to one that was torn apart.

    Raises:
      UserError: If a line before the last one is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        # What follows the last line break was never finished, even if it parses: a
        # number may have lost its last digits.
        if number == len(lines):
            return
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            if number == len(lines) - 1:  # a power cut can leave zeros in its place
                return
            raise UserError(f"{path}, line {number}, is not a JSON object")
        yield row


def write_rows(path: pathlib.Path, rows: list[Row]) -> None:
    """Replace a file by one with these rows."""
    write_text(path, "".join(map(_line, rows)))


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replace a file by one with this value."""
    write_text(path, json.dumps(_finite(value), indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace a file, either whole or not at all."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with _said(path):
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()  # on a full disk it would take the last of the room
            raise


@contextlib.contextmanager
def _said(path: pathlib.Path) -> Iterator[None]:
    """Says of an error of the disk which file it met."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error}") from error


def output_folder(name: str) -> pathlib.Path:
    """Return a folder that exists and can be written to, making it if need be."""
    folder = pathlib.Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --out {name}: {error}") from error
    return folder


def _line(row: Row) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Return a value as JSON has it: tuples as lists, no infinities."""
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
