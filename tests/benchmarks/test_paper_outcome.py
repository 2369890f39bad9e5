"""What became of a run, from its folder alone."""

import dataclasses
import json

import pytest

import fake_runs
from lwsam_bench.paper import setups
from lwsam_bench.paper.runs import outcome
from lwsam_bench.paper.runs.outcome import judge, run_id
from lwsam_bench.support.errors import UserError
from lwsam_bench.training.config import TrainConfig


CONFIG = setups.config("cifar10", "lwsam", "small", 1)


def test_the_name_of_a_run_is_readable_and_stable():
    assert run_id(CONFIG) == "cifar10-resnet8w8-lwsam-k4-s1-ae6ec9b4"
    low = dataclasses.replace(CONFIG, criterion="low", max_overhead=0.1)
    assert run_id(low).startswith("cifar10-resnet8w8-lwsam-k4-low-max0.1-s1-")
    every = dataclasses.replace(CONFIG, criterion="all", k=0, mean_overhead=0.5)
    assert run_id(every).startswith("cifar10-resnet8w8-lwsam-all-mean0.5-s1-")
    assert run_id(dataclasses.replace(CONFIG, dataset="/a/b/own.npz")).startswith(
        "own-"
    )
    assert "adamw" in run_id(dataclasses.replace(CONFIG, optimizer="adamw"))


def test_configurations_that_differ_have_folders_that_differ():
    every = [
        setups.config(benchmark, method, scale, seed)
        for benchmark in (*setups.BENCHMARKS, "lm")
        for method in setups.LABELS
        for scale in setups.SCALES
        for seed in range(3)
    ]
    assert len({run_id(config) for config in every}) == len(every)
    # The path of a file decides nothing.
    assert run_id(dataclasses.replace(CONFIG, weights="x")) == run_id(CONFIG)


def test_a_field_that_is_added_later_renames_no_run(monkeypatch):
    before = run_id(CONFIG)
    Later = dataclasses.make_dataclass(
        "Later", [("new", str, "default")], bases=(TrainConfig,), frozen=True
    )
    monkeypatch.setattr(outcome, "TrainConfig", Later)
    later = Later(**dataclasses.asdict(CONFIG))
    assert run_id(later) == before
    assert run_id(dataclasses.replace(later, new="other")) != before


def test_judging(tmp_path):
    folder = fake_runs.write(tmp_path, CONFIG)
    found = judge(folder)
    assert found.status == "done"
    assert found.end["accuracy"] == 0.5
    assert len(found.rows("train")) == 6
    assert len(found.rows()) == 9
    assert found.record()["data"]["note"] == fake_runs.NOTE

    other = dataclasses.replace(CONFIG, seed=2)
    diverged = judge(fake_runs.write(tmp_path, other, diverged=True))
    assert diverged.status == "failed"
    assert diverged.reason.startswith("diverged")

    other = dataclasses.replace(CONFIG, seed=4)
    huge = judge(fake_runs.write(tmp_path, other, loss=1e5))
    assert (huge.status, huge.reason) == ("failed", "diverged: its loss is 1e+05")

    other = dataclasses.replace(CONFIG, seed=3)
    assert judge(fake_runs.write(tmp_path, other, ended=False)).status == "pending"

    nothing = judge(tmp_path / "runs" / "nothing")
    assert nothing.status == "pending"
    assert nothing.end is None
    assert nothing.rows() == []
    assert nothing.record() == {}


def test_an_end_that_was_torn_apart_is_none(tmp_path):
    folder = fake_runs.write(tmp_path, CONFIG)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-1])
    assert judge(folder).status == "pending"


def test_failures_are_recorded_and_forgotten(tmp_path):
    folder = tmp_path / "runs" / "one"
    try:
        raise ValueError("too hot")
    except ValueError as error:
        outcome.record_failure(folder, "it was too hot", error)
    assert judge(folder).status == "failed"
    assert judge(folder).reason == "it was too hot"
    written = json.loads((folder / "failed.json").read_text())
    assert written["traceback"][-1] == "ValueError: too hot"

    diverged = fake_runs.write(tmp_path, CONFIG, diverged=True)
    done = fake_runs.write(tmp_path, dataclasses.replace(CONFIG, seed=2))
    assert outcome.forget_failures(tmp_path) == 2
    assert judge(folder).status == judge(diverged).status == "pending"
    assert not (diverged / "metrics.jsonl").exists()  # it starts over
    assert judge(done).status == "done"


def test_a_folder_that_cannot_be_gone_on_with_starts_over(tmp_path):
    """Its checkpoint, say, cannot be read, and could not be the next time either."""
    folder = tmp_path / "runs" / "some"
    (folder / "checkpoints").mkdir(parents=True)
    outcome.record_failure(folder, "damaged", UserError("damaged"))
    assert outcome.forget_failures(tmp_path) == 1
    assert not (folder / "checkpoints").exists()
    (folder / "checkpoints").mkdir()
    outcome.record_failure(folder, "no memory", RuntimeError("no memory"))
    assert outcome.forget_failures(tmp_path) == 1
    assert (folder / "checkpoints").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"why": 1}'])
def test_a_damaged_record_of_a_failure_is_a_failure(tmp_path, text):
    (tmp_path / "failed.json").write_text(text)
    found = judge(tmp_path)
    assert found.status == "failed"
    assert "cannot be read" in found.reason
