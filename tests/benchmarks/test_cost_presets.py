"""The table of what presets cost: rows once, and a page that is made of them."""

import io
import json
import pathlib
import re

import pytest
from rich.console import Console

import lwsam_jax as lwsam
from lwsam_bench.pages.docs import marks
from lwsam_bench.speed import presets
from lwsam_bench.support.rows import read_rows


ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = ROOT / "benchmarks" / "results" / "cost" / "presets.jsonl"


def test_a_row_is_measured_once_and_the_page_is_made_of_it(tmp_path):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    page.write_text("before\n" + "\n".join(marks(presets.MARK)) + "\nafter\n")
    console = Console(file=io.StringIO())
    for _ in range(2):
        presets.run(
            "smallcnn", 10, 8, console, rows=str(rows), page=str(page), only=["sam"]
        )
    (row,) = read_rows(rows)
    assert row["by_model"] == pytest.approx(2.0, abs=0.01)
    assert row["by_xla"] == pytest.approx(2.0, abs=0.05)
    assert console.file.getvalue().count("sam:") == 1
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| sam | 29 | 2.00 |" in text


def test_the_committed_page_is_made_of_the_committed_rows():
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    names = [row["preset"] for row in rows]
    assert names == [name for name in presets.CASES if name in names]
    assert "sam" in names
    opening, closing = marks(presets.MARK)
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    found = page.split(opening)[1].split(closing)[0]
    assert found.strip() == presets.table(rows).strip()


# Measured under another name: a part of `sam`, and another base optimizer.
ELSEWHERE = {"momentum_sam": "sam, momentum (MSAM)", "sam": "sam"}


def test_every_preset_of_the_documentation_is_measured():
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| [`")]
    measured = [json.loads(line)["preset"] for line in ROWS.read_text().splitlines()]
    names = {name.split(",")[0] for name in measured} | set(measured)
    for line in lines:
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        assert len(cells) == 6
        assert all(cells), line
        (name, *_) = re.findall(r"\w+", cells[0])
        assert ELSEWHERE.get(name, name) in names, name
        assert hasattr(lwsam, name)
    assert len(lines) > 35


def test_what_the_committed_rows_say():
    """Savings are real: by XLA as well as by the model."""
    lines = ROWS.read_text().splitlines()
    rows = {row["preset"]: row for row in map(json.loads, lines)}
    cheap = ("sl_sam, last 3", "asam, a tenth, last 4", "random_sam", "rwp")
    for name in rows.keys() & set(cheap):
        assert rows[name]["by_xla"] < 1.3, name
    for name, row in rows.items():
        if row["share"] is not None:
            assert row["by_xla"] == pytest.approx(row["by_model"], rel=0.15), name
