"""What earlier versions left is found again, and means what it meant."""

import dataclasses
import json

import pytest

from lwsam_bench.commands.cli import _parser
from lwsam_bench.commands.train import train_config
from lwsam_bench.front import committed
from lwsam_bench.paper import setups
from lwsam_bench.paper.landscape import figures
from lwsam_bench.paper.runs.outcome import run_id
from lwsam_bench.paper.throughput import race
from lwsam_bench.support.errors import UserError
from lwsam_bench.training import earlier, run_folder
from lwsam_bench.training.config import TrainConfig


RESULTS = committed.RESULTS / "paper"
AXES = ("ascent", "fraction", "shape", "last")  # fields that were not there


def config(*arguments) -> TrainConfig:
    return train_config(_parser().parse_args(["train", *arguments]))


def saved_before(wanted: TrainConfig) -> dict:
    """The configuration as it was written when generalised SAM was called `gsam`."""
    record = json.loads(json.dumps(dataclasses.asdict(wanted)))
    assert record["method"] == "generalized_sam"
    return {**{x: record[x] for x in record if x not in AXES}, "method": "gsam"}


def test_gsam_was_generalised_sam(tmp_path):
    wanted = config("--method", "generalized_sam", "--steps", "3")
    record = saved_before(wanted)
    found = {**earlier.config(record), "decay_at": wanted.decay_at}
    assert found == dataclasses.asdict(wanted)
    path = tmp_path / run_folder.CONFIG
    path.write_text(json.dumps({"config": record, "provenance": []}))
    assert run_folder.check_same_run(tmp_path, wanted)
    gap = config("--method", "gsam", "--steps", "3", "--alpha", "0.8")
    with pytest.raises(UserError, match="method: generalized_sam -> gsam"):
        run_folder.check_same_run(tmp_path, gap)


def test_gsam_is_the_surrogate_gap_now():
    record = dataclasses.asdict(config("--method", "gsam", "--steps", "3"))
    assert earlier.config(record) == record


def test_folders_of_runs_keep_their_names():
    if not RESULTS.exists():
        pytest.skip("installed without the results")
    named = [json.loads(x) for x in (RESULTS / "table1.jsonl").read_text().splitlines()]
    wanted = {
        run_id(setups.config(benchmark, what, "small", seed)): what
        for benchmark in ("cifar10", "flowers")
        for what in setups.LABELS
        for seed in setups.seeds("small")
    }
    assert {row["run"] for row in named} == set(wanted)
    for row in named:
        method = earlier.config(row["config"])["method"]
        assert method == setups.config("cifar10", wanted[row["run"]], "small", 0).method
    measured = {path.stem for path in (RESULTS / figures.FOLDER).glob("*.jsonl")}
    flowers = {
        run_id(setups.config(figures.BENCHMARK, method, "small", 0))
        for method in ("sgd", "lwsam")
    }
    assert measured == flowers


def test_no_two_methods_share_a_folder():
    """As generalised SAM and the surrogate gap would with equal numbers."""
    made = [
        config("--method", method, "--rho", "0.1", "--alpha", "1", "--shape", "raw")
        for method in ("sam", "generalized_sam", "gsam", "lwsam")
    ]
    assert len(set(map(run_id, made))) == len(made)


def test_races_are_found_again():
    if not RESULTS.exists():
        pytest.skip("installed without the results")
    for benchmark in ("cifar10", "flowers"):
        row = race.finished(RESULTS, benchmark, "small")
        assert row is not None
        assert "gsam" not in row["methods"]
        assert row["methods"]["generalized_sam"]["flops"] == pytest.approx(2, abs=0.01)
