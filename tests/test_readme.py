"""The README's table is the one that the demo wrote."""

import pathlib


ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_table_of_the_demo_is_the_one_it_wrote():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    written = (ROOT / "benchmarks/results/demo-table.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- demo-table -->")[1].split("<!-- /demo-table -->")[0]
    assert shown.strip() == written.strip()
