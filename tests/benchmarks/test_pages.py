"""No number on a page is typed: each is what the committed rows say."""

import functools
import pathlib
import re

import pytest

from lwsam_bench.comparison import precision
from lwsam_bench.front import demo, pages
from lwsam_bench.support.rows import read_rows


ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SHOWN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@functools.cache
def updated():
    return {
        (block.page, block.name): (path.read_text(encoding="utf-8"), text)
        for path, block, text in pages.updated(ROOT)
    }


@pytest.mark.parametrize("block", pages.BLOCKS, ids=lambda x: f"{x.page} {x.name}")
def test_a_page_is_what_the_committed_rows_say(block):
    shown, made = updated()[block.page, block.name]
    assert shown == made, "run `make pages`"


def test_all_that_is_generated_is_generated_by_one_command():
    marked = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in SHOWN
        for name in re.findall(
            r"^<!-- generated: (.*) -->$",
            path.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    }
    assert marked == {(block.page, block.name) for block in pages.BLOCKS}


def test_pictures_of_the_pages_are_there():
    for path in SHOWN:
        for place in re.findall(r"!\[[^\]]*\]\(([^):]+)\)", path.read_text("utf-8")):
            assert (path.parent / place).exists(), f"{path.name}: {place}"


def test_tables_beside_the_rows_are_made_of_them():
    rows = list(read_rows(RESULTS / "precision" / precision.ROWS))
    table = (RESULTS / "precision" / precision.TABLE).read_text(encoding="utf-8")
    assert table == precision.markdown(rows)
    table = (RESULTS / "demo" / demo.TABLE).read_text(encoding="utf-8")
    assert table == pages.shown_demo(RESULTS)
