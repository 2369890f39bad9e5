"""`lwsam-bench faults`: what is said of runs that were broken on purpose, and of ours."""

import pathlib
import re

import pytest

from lwsam_bench.faults import suite, table
from lwsam_bench.support.rows import read_rows, write_rows


ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "faults"


@pytest.mark.slow
def test_runs_are_broken_and_go_on(command, tmp_path):
    code, output = command.run("faults", "--smoke", "--kills", 1, "--out", tmp_path)
    assert code == 0, output
    rows = table.faults(list(read_rows(tmp_path / suite.ROWS)))
    assert [row["fault"] for row in rows] == [
        "killed",
        "truncated checkpoint",
        "flipped bit",
        "full disk",
        "read-only folder",
        "other devices",
        "one process killed",
        "fewer processes",
    ]
    for row in rows:
        assert row["restarts"] >= 1, row
        assert row["lost"] == 0, row
        assert row["differences"] == [], row
    assert (tmp_path / suite.TABLE).read_text().strip() in output


def test_what_is_lost_is_an_error(tmp_path, capsys):
    row = {"kind": "fault", "fault": "killed", "how": "", "restarts": 1, "repeated": 0}
    config = {"kind": "config", "method": ["sam"], "steps": 60, "every": 7}
    for lost, differences, code in ((0, [], 0), (7, [], 1), (0, ["the array w"], 1)):
        fault = {**row, "lost": lost, "differences": differences}
        write_rows(tmp_path / suite.ROWS, [config, fault])
        from lwsam_bench.commands.cli import main

        assert main(["faults", "--render-only", "--out", str(tmp_path)]) == code
        printed = capsys.readouterr().out
        assert f"{lost} steps lost beyond the last checkpoint" in printed
        assert ("**differs**: the array w" in printed) == bool(differences)


def test_the_committed_rows_lost_nothing():
    rows = list(read_rows(COMMITTED / suite.ROWS))
    (config,) = [row for row in rows if row["kind"] == "config"]
    found = {row["fault"]: row for row in table.faults(rows)}
    assert config["kills"] == found["killed"]["restarts"] == 10
    assert len(found) == 8
    assert all(table.holds(row) for row in found.values())
    assert (COMMITTED / suite.TABLE).read_text() == table.markdown(rows)
    page = (ROOT / "docs" / table.PAGE).read_text()
    assert table.markdown(rows).strip() in page


def test_each_promise_of_the_page_has_a_test_that_is_there():
    """The table names tests as `file::test`, or a file for all of its tests."""
    page = (ROOT / "docs" / table.PAGE).read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 10
    for path, name in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text, f"{path}::{name}"
