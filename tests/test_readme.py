"""The README's tables are what committed rows say, and its plot is there."""

import pathlib
import re

from lwsam_bench.front import readme
from lwsam_bench.pages import docs


ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_committed_rows():
    for name, text in readme.blocks(ROOT / "benchmarks" / "results").items():
        opening, closing = docs.marks(name)
        shown = README.split(opening)[1].split(closing)[0]
        assert shown.strip() == text.strip(), "run `make readme`"


def test_what_it_shows_and_links_to_is_there():
    places = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert places
    for place in places:
        assert (ROOT / place).exists(), place
