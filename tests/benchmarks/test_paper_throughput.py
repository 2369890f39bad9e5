"""`table2`: one race for each benchmark, one row, the published numbers beside it."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

import tiny_task
from lwsam_bench.paper import published, setups
from lwsam_bench.paper.request import Request
from lwsam_bench.paper.throughput import race, report
from lwsam_bench.support.errors import UserError


STEPS = race.STEPS["smoke"]


def make_task(config, data_dir, on_record):
    """Flowers is there; the loss of CIFAR-10 fails; the rest is missing."""
    if config.dataset == "cifar100":
        raise UserError("cifar100 is not in some folder.\nFetch it.")
    task = tiny_task.make()
    if config.dataset == "cifar10":
        return dataclasses.replace(task, loss_fn=_fails)
    return task


def _fails(*_):
    raise MemoryError("out of memory")


def run(out, console=None):
    console = console or Console(file=io.StringIO(), width=200)
    artefact = race.table2(Request("smoke", out, console, seeds=3, jobs=2))
    artefact.save(out)
    return artefact


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """The artefact of a first run, and its folder."""
    out = tmp_path_factory.mktemp("table2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race.tasks, "make", make_task)
        return run(out), out


def rows_of(out):
    return [json.loads(x) for x in (out / "throughput.jsonl").read_text().splitlines()]


def test_all_methods_run_in_one_race(raced):
    row = rows_of(raced[1])[-1]
    assert row["benchmark"] == "flowers"
    assert list(row["methods"]) == list(setups.LABELS)
    flops = {name: found["flops"] for name, found in row["methods"].items()}
    assert flops["sgd"] == 1.0
    assert flops["generalized_sam"] == pytest.approx(2.0, abs=0.2)
    # One ascent in three steps, the first of them.
    ascents = len(range(0, STEPS, 3)) / STEPS
    assert flops["looksam"] - 1 == pytest.approx(
        (flops["generalized_sam"] - 1) * ascents
    )
    assert 1.0 < flops["lwsam"] < flops["generalized_sam"]
    assert row["methods"][setups.BUDGETED]["flops_most"] <= 1 + setups.BUDGET
    assert row["methods"]["sgd"]["time"] == pytest.approx(1.0)
    assert row["methods"]["generalized_sam"]["time"] > 0
    assert row["steps"] == STEPS
    assert row["origin"]["packages"]["jax"]


def test_table_has_ours_beside_the_published(raced):
    artefact, out = raced
    assert [table.title.split(",")[0] for table in artefact.tables] == [
        "CIFAR-10",
        "CIFAR-100",
        "Oxford Flowers-102 subset",
        "CIFAR-100",
    ]
    flowers = artefact.tables[2]
    for method, cells in zip(setups.METHODS, flowers.rows, strict=False):
        assert cells[5] == f"{published.THROUGHPUT['flowers', method]:g}"
    assert flowers.rows[0][2] == "100%"
    assert flowers.rows[1][6] == "67%"  # 401.9 / 604.2
    assert flowers.rows[-1][5:] == ("", "")
    assert all(cells[4].endswith("×") for cells in flowers.rows)
    assert tiny_task.NOTE in flowers.notes[1]
    assert "RTX A6000" in artefact.notes[0]
    assert (out / "table2.md").exists()


def test_what_did_not_run_is_told(raced):
    artefact, out = raced
    ten, hundred = artefact.tables[:2]
    assert [cells[1] for cells in ten.rows] == ["failed"] * len(setups.LABELS)
    assert "MemoryError: out of memory" in ten.notes[0]
    assert all(cells[1:5] == ("",) * 4 for cells in hundred.rows)
    assert hundred.rows[0][5] == "229.1"
    told = [note for note in artefact.notes if note.startswith("CIFAR-100 is empty")]
    assert "(cifar100)" in told[0]
    # Nothing of this machine.
    assert "some folder" not in (out / "table2.md").read_text()
    assert [row["benchmark"] for row in rows_of(out)] == ["cifar10", "flowers"]


def test_a_race_that_ended_is_not_run_again(raced, monkeypatch):
    artefact, out = raced

    def nothing_is_there(config, data_dir, on_record):
        raise UserError(f"{config.dataset} is not there")

    monkeypatch.setattr(race.tasks, "make", nothing_is_there)
    again = run(out)
    assert again.tables[2] == artefact.tables[2]
    # The one that failed is tried again.
    assert any(note.startswith("CIFAR-10 is empty") for note in again.notes)


def test_a_race_of_another_setup_is_no_race(raced, monkeypatch):
    assert race.finished(raced[1], "flowers", "smoke")
    monkeypatch.setitem(race.STEPS, "smoke", STEPS + 1)
    assert race.finished(raced[1], "flowers", "smoke") is None


def test_a_race_of_other_methods_is_no_race(raced, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(setups, "LABELS", {**setups.LABELS, "sam": "SAM"})
        assert race.finished(raced[1], "flowers", "smoke") is None
    cheaper = {**setups._RULES[setups.RECOMMENDED], "mean_overhead": 0.3}
    monkeypatch.setitem(setups._RULES, setups.RECOMMENDED, cheaper)
    assert race.finished(raced[1], "flowers", "smoke") is None


def test_table_4_finds_each_of_its_k_in_the_race(raced):
    """Smoke has but those of Table 1."""
    assert set(race.configs("cifar10", "smoke")) == set(setups.LABELS)
    wanted = race.configs("cifar10", "paper")
    assert {x: wanted[x].k for x in wanted if x not in setups.LABELS} == {
        "lwsam, k = 1": 1,
        "lwsam, k = 2": 2,
        "lwsam, k = 8": 8,
    }
    setup = setups.setup("flowers", "small")
    lanes = [race.lane_of(setup, k) for k in (1, 2, 8, 10, "all")]
    assert lanes == [
        "lwsam, k = 1",
        "lwsam",
        "lwsam, k = 8",
        "generalized_sam",
        "generalized_sam",
    ]
    row = race.finished(raced[1], "flowers", "smoke")
    assert report.speed(row, "lwsam") == report._ours(row, "lwsam")[0]
    assert report.speed(row, "lwsam, k = 8") == ""
    assert report.speed(None, "sgd") == ""
    assert report.speed({"failed": "of memory"}, "sgd") == ""


def test_time_is_unknown_where_every_step_compiled():
    row = rows_with_time(None)
    assert report._ours(row, "sgd") == ("–", "–", "–", "1.50 ×")
    row = rows_with_time(float("nan"))
    assert report._ours(row, "sgd") == ("–", "–", "–", "1.50 ×")
    row = rows_with_time(1.25)
    assert report._ours(row, "sgd") == (
        "1,235",
        "80%",
        "50% to 100%",
        "1.50 ×",
    )


def rows_with_time(time):
    found = {
        "images_per_second": 1234.6,
        "time": time,
        "time_quartiles": [1.0, 2.0],
        "flops": 1.5,
    }
    return {"methods": {"sgd": found}}
