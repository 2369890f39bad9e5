"""Rows survive crashes, and are cut where a run goes on."""

import math
import os

import pytest

from lwsam_bench.support import rows
from lwsam_bench.support.errors import UserError


def fill(path, steps):
    with rows.MetricsFile(path) as file:
        for step in steps:
            file.write({"kind": "train", "step": step, "loss": 1.0 / step})


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', b"{}", b"\0\0\0\n", b""])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    fill(path, [1, 2, 3])
    with path.open("ab") as file:
        file.write(torn)
    assert [row["step"] for row in rows.read_rows(path)] == [1, 2, 3]
    with rows.MetricsFile(path, keep_until=2) as file:
        file.write({"step": 3})
    assert [row["step"] for row in rows.read_rows(path)] == [1, 2, 3]
    assert path.read_bytes().count(b"\n") == 3


def test_a_broken_line_further_up_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnothing\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        list(rows.read_rows(path))


@pytest.mark.skipif(
    not os.path.exists("/dev/full"),
    reason="needs /dev/full, a disk that is full: Linux has it",
)
def test_a_disk_that_is_full_is_said_once(tmp_path):
    """Not again when the file is closed, whose buffer still holds the row."""

    def write_to_a_full_disk():
        with rows.MetricsFile(tmp_path / "metrics.jsonl") as file:
            file._file.close()
            file._file = open("/dev/full", "a")
            file.write({"step": 1})

    with pytest.raises(UserError, match="cannot write to /dev/full: .*No space left"):
        write_to_a_full_disk()


def test_no_file_has_no_rows(tmp_path):
    assert not list(rows.read_rows(tmp_path / "metrics.jsonl"))


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, [1, 2])
    fill(path, [1])
    assert len(list(rows.read_rows(path))) == 1


def test_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with rows.MetricsFile(path) as file:
        file.write({"step": 1, "loss": math.nan, "norms": {"a": [math.inf, 1.0]}})
    (row,) = rows.read_rows(path)
    assert row == {"step": 1, "loss": None, "norms": {"a": [None, 1.0]}}


def test_output_folder_is_made(tmp_path):
    folder = rows.output_folder(str(tmp_path / "a" / "b"))
    assert folder.is_dir()
    assert not list(folder.iterdir())
