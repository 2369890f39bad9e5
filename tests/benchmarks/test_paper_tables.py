"""Tables from the rows of runs; nothing is trained."""

import io
import json

import pytest
from rich.console import Console

import fake_runs
from lwsam_bench.paper import published, setups, tables
from lwsam_bench.paper.request import Request
from lwsam_bench.paper.runs import grouped
from lwsam_bench.paper.runs.attempts import Result
from lwsam_bench.paper.runs.outcome import run_id
from lwsam_bench.support.rows import read_rows


CONSOLE = Console(file=io.StringIO(), width=200)


@pytest.fixture(autouse=True)
def trained(monkeypatch):
    """What is to be trained has no data; returns what was asked for."""
    asked = []

    def attempt(config, options, console):
        asked.append(config)
        return Result("missing data", f"{config.dataset} is not there")

    monkeypatch.setattr("lwsam_bench.paper.runs.sweep.attempt", attempt)
    return asked


def by_title(artefact):
    return {table.title: table for table in artefact.tables}


def cells(table):
    return {row[0]: row[1:] for row in table.rows}


def test_table1(tmp_path):
    for seed, accuracy in enumerate((0.61, 0.62, 0.66)):
        config = setups.config("cifar10", "sgd", "small", seed)
        fake_runs.write(tmp_path, config, accuracy=accuracy, overhead=0.0)
        config = setups.config("cifar10", "lwsam", "small", seed)
        fake_runs.write(tmp_path, config, diverged=seed == 1, overhead=0.4321)
    config = setups.config("cifar10", "generalized_sam", "small", 0)
    fake_runs.write(tmp_path, config, accuracy=0.7)
    made = tables.table1(Request("small", tmp_path, CONSOLE))
    assert len(made.tables) == 4
    found = cells(by_title(made)["CIFAR-10, resnet8w8"])
    assert found["SGD"] == ("63.00 ± 1.53 %", "1.00 ×", "3", "91.96 ± 0.3 %")
    # A run that failed is told, not dropped.
    ours = found["layer-wise SAM (4)"]
    assert ours == ("50.00 ± 0.00 % (1 of 3 failed)", "1.43 ×", "2", "92.81 ± 0.3 %")
    assert found["generalised SAM"] == ("70.00 %", "1.25 ×", "1", "92.64 ± 0.4 %")
    assert found["LookSAM (3)"] == ("", "", "", "92.14 ± 0.4 %")
    assert found["layer-wise SAM within 1.1 × (4)"] == ("", "", "", "")
    assert found["layer-wise SAM, mean of 1.5 × (4)"] == ("", "", "", "")
    flowers = by_title(made)["Oxford Flowers-102 subset, wrn10-1"]
    assert cells(flowers)["LookSAM (3)"] == ("", "", "", "73.53 ± 0.6 %")
    text = " ".join(made.notes)
    assert "CIFAR-100 is empty: its data (cifar100, and" in text
    failed = run_id(setups.config("cifar10", "lwsam", "small", 1))
    assert f"The run {failed} failed: diverged" in text
    assert f"cifar10: {fake_runs.NOTE}" in text
    assert "resnet8w8 instead of resnet20" in text
    assert published.NOTES["table1"][0] in made.notes
    assert made.name == "table1"
    assert "± 1.53 %" in made.markdown()


def test_table1_without_anything(tmp_path, trained):
    made = tables.table1(Request("paper", tmp_path, CONSOLE, seeds=1))
    for table, benchmark in zip(made.tables, setups.BENCHMARKS, strict=True):
        assert [row[1:4] for row in table.rows] == [("", "", "")] * len(setups.LABELS)
        assert [row[4] for row in table.rows[:4]] == [
            published.accuracy(*published.ACCURACY[benchmark, method])
            for method in setups.METHODS
        ]
    # Once for each dataset and network.
    assert len(trained) == 4


def test_smoke_traces_the_full_size(tmp_path):
    made = tables.table1(Request("smoke", tmp_path, CONSOLE))
    assert "Of the full size only traced: resnet20 with" in " ".join(made.notes)


def test_table3(tmp_path):
    for criterion, accuracy in (("high", 0.6), ("low", 0.5), ("random", 0.55)):
        config = setups.config("cifar10", "lwsam", "smoke", 0, criterion=criterion)
        fake_runs.write(tmp_path, config, accuracy=accuracy)
    made = tables.table3(Request("smoke", tmp_path, CONSOLE))
    found = cells(by_title(made)["CIFAR-10, tinycnn, k = 2"])
    assert found == {
        "None (SGD)": ("", "", "", "91.63 ± 0.3 %"),
        "High-Norm": ("60.00 %", "1.25 ×", "1", "92.81 ± 0.3 %"),
        "Low-Norm": ("50.00 %", "1.25 ×", "1", "91.40 ± 0.5 %"),
        "Random": ("55.00 %", "1.25 ×", "1", "92.46 ± 0.2 %"),
    }
    text = " ".join(made.notes)
    assert "say nothing about the methods" in text


def test_table4(tmp_path):
    for k in (1, 2, 4):
        config = setups.config("cifar10", "lwsam", "small", 0, k=k)
        fake_runs.write(tmp_path, config, accuracy=k / 10)
    fake_runs.write(
        tmp_path, setups.config("cifar10", "generalized_sam", "small", 0), accuracy=0.9
    )
    made = tables.table4(Request("small", tmp_path, CONSOLE, seeds=1))
    table = by_title(made)["CIFAR-10, resnet8w8"]
    assert [row[:2] for row in table.rows] == [
        ("1", "10.00 %"),
        ("2", "20.00 %"),
        ("4", "40.00 %"),
        ("8", "90.00 %"),
        ("all", "90.00 %"),
    ]
    assert table.rows[3][-2:] == ("92.77 ± 0.5 %", "564.5")
    assert table.notes == ("resnet8w8 has 8 layers: k = 8 is all.",)
    assert [row[4] for row in table.rows] == [""] * 5  # no race in this folder
    assert by_title(made)["Oxford Flowers-102 subset, wrn10-1"].notes == ()


def test_lm(tmp_path):
    changes = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1}
    for seed, loss in enumerate((1.0, 1.1)):
        config = setups.config("lm", "lwsam", "small", seed, **changes)
        fake_runs.write(tmp_path, config, loss=loss)
    made = tables.lm(Request("small", tmp_path, CONSOLE, seeds=2))
    (table,) = made.tables
    found = cells(table)
    assert found["AdamW, layer-wise SAM"] == ("2.861 ± 0.143", "1.25 ×", "2", "")
    assert found["SGD"] == ("", "", "", "")
    assert len(found) == 5
    assert "has no numbers" in " ".join(made.notes)
    assert not any("learning rate falls" in note for note in made.notes)


def test_commands_share_their_runs(tmp_path):
    """The same configuration, hence the same folder, whoever asks."""
    asked = {}
    for name, whats in (("table1", "lwsam"), ("table3", "high"), ("table4", 4)):
        seen = {}

        def train(make, benchmarks, *_, seen=seen, **__):
            seen["make"] = make
            raise StopIteration

        patch = pytest.MonkeyPatch()
        with patch.context() as context:
            context.setattr(grouped, "train", train)
            with pytest.raises(StopIteration):
                getattr(tables, name)(Request("small", tmp_path, CONSOLE))
        asked[name] = seen["make"]("cifar10", whats, 2)
    assert asked["table1"] == asked["table3"] == asked["table4"]
    assert asked["table1"] == setups.config("cifar10", "lwsam", "small", 2)


def test_origins_are_told_once(tmp_path):
    early, late = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
    configs = [setups.config("cifar10", "sgd", "small", seed) for seed in range(3)]
    for config, time in zip(configs, (late, early, early), strict=True):
        fake_runs.write(tmp_path, config, time=time)
    path = tmp_path / "runs" / run_id(configs[0]) / "config.json"
    record = json.loads(path.read_text())
    record["provenance"].append({**record["provenance"][0], "commit": "d" * 40})
    path.write_text(json.dumps(record))
    made = tables.table1(Request("small", tmp_path, CONSOLE))
    assert [(o["time"], o["commit"][0]) for o in made.origins] == [
        (early, "c"),
        (late, "c"),
        (late, "d"),
    ]
    assert all("from_step" not in origin for origin in made.origins)


def test_everything_failed(tmp_path):
    config = setups.config("cifar10", "sgd", "smoke", 0)
    fake_runs.write(tmp_path, config, diverged=True)
    made = tables.table3(Request("smoke", tmp_path, CONSOLE))
    assert made.tables[0].rows[0][1:4] == ("failed", "", "")


def test_a_table_leaves_a_row_for_each_run(tmp_path):
    for seed in range(2):
        config = setups.config("cifar10", "lwsam", "small", seed)
        fake_runs.write(tmp_path, config, diverged=seed == 1, overhead=0.4321)
    tables.table1(Request("small", tmp_path, CONSOLE, seeds=2))
    rows = list(read_rows(tmp_path / "table1.jsonl"))
    assert [(row["what"], row["status"]) for row in rows] == [
        ("lwsam", "done"),
        ("lwsam", "failed"),
    ]
    assert rows[0]["config"]["seed"] == 0
    assert rows[0]["end"]["overhead"] == pytest.approx(0.4321)
    assert rows[0]["provenance"]
