"""The demo leaves a table, rows and plots; a table says what the rows say."""

import collections
import dataclasses
import math
import pathlib
import statistics

import pytest

from lwsam_bench.commands.cli import main
from lwsam_bench.models import smallcnn
from lwsam_bench.pages import report
from lwsam_bench.support.measure import Stopwatch


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The results of a demo of 20 steps with a network of four layers."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lwsam_bench.support.cache.enable", lambda: None)
        patch.setattr(smallcnn, "BLOCKS", ((4, 1),))
        code = main(["demo", "--out", str(folder), "--seeds", "2", "--steps", "20"])
    assert code == 0
    return folder


def test_files(out):
    for name in ("learning-curves.png", "layer-norms.png", "selection.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    table = (out / "demo-table.md").read_text()
    assert table.count("\n| ") == 5  # the rule and four methods
    for label in ("SGD", "SAM every 2nd step", "SAM", "layer-wise SAM, top 4"):
        assert f"| {label} |" in table
    assert "2 seeds" in table


def test_rows(out, rows):
    everything = rows(out / "demo-rows.jsonl")
    epochs = [row for row in everything if row["kind"] == "epoch"]
    assert len(epochs) == 4 * 2 * 2  # methods, seeds, epochs
    assert {row["step"] for row in epochs} == {10, 20}
    cost = {row["label"]: row for row in everything if row["kind"] == "summary"}
    assert cost["SGD"]["overhead"] == 0
    assert cost["SGD"]["time"] == 1
    assert cost["SAM"]["overhead"] == pytest.approx(1, abs=0.01)
    every2 = cost["SAM every 2nd step"]["overhead"]
    assert every2 == pytest.approx(0.5, abs=0.01)
    # All four layers of this network: as dear as SAM.
    assert cost["layer-wise SAM, top 4"]["overhead"] == pytest.approx(1, abs=0.02)
    assert all(len(row["test_accuracy"]) == 2 for row in cost.values())
    # One executable for both seeds.
    assert [row["executables"] for row in cost.values()] == [1, 2, 1, 1]


def test_table():
    row = {"label": "SAM", "rho": 0.3, "overhead": 1.0, "time": 1.8}
    header, cells = report.table(
        [
            {**row, "test_accuracy": [0.8, 0.9, 0.85]},
            {**row, "test_accuracy": [0.5], "rho": 0.0, "time": math.nan},
        ]
    )
    assert cells[0] == ["SAM", "0.3", "85.0 ± 2.9 %", "2.00 ×", "1.80 ×"]
    assert cells[1] == ["SAM", "–", "50.0 %", "2.00 ×", "–"]
    text = report.markdown(header, cells, "notes")
    assert text.splitlines()[2] == "| SAM | 0.3 | 85.0 ± 2.9 % | 2.00 × | 1.80 × |"


def test_stopwatch_compares_round_by_round():
    watch = Stopwatch()
    watch.add_round({"a": 1.0, "b": 2.0})
    watch.add_round({"a": 10.0, "b": 21.0})  # a slow moment, for both
    watch.add_round({"b": 500.0})  # a compiled
    watch.add_round({"a": 1.0, "b": 90.0})  # a disturbance
    assert watch.ratio("b", "a") == pytest.approx(2.1)
    assert math.isnan(watch.ratio("c", "a"))


def test_methods_are_tuned_on_other_seeds():
    from lwsam_bench.comparison import demo, demo_run

    assert not {*demo.DemoConfig().seeds} & {*demo_run.TUNING_SEEDS}
    strip = lambda method: dataclasses.replace(method, label="")
    grid = [strip(method) for method in demo_run.TUNING_GRID]
    assert all(strip(method) in grid for method in demo.METHODS)


def test_the_rows_of_the_tuning_are_there(rows):
    from lwsam_bench.comparison import demo

    results = pathlib.Path(demo.__file__).parents[2] / "results" / "demo-radius.jsonl"
    if not results.exists():
        pytest.skip("installed without the results")
    origins, tried = set(), collections.defaultdict(list)
    for row in rows(results):
        if row["kind"] == "origin":
            origins |= {*row["config"]["seeds"]}
        else:
            kind = (row["method"], row["k"], row["every"])
            tried[kind, row["rho"]] += row["test_accuracy"]
    assert not origins & {*demo.DemoConfig().seeds}
    for method in demo.METHODS:
        means = {
            rho: statistics.mean(accuracy)
            for (kind, rho), accuracy in tried.items()
            if kind == method.kind
        }
        # One rule for all: the smallest within two points of the best.
        near = [rho for rho, x in means.items() if x >= max(means.values()) - 0.02]
        assert method.rho == min(near), method.label
