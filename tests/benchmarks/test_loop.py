"""A run ends with a row of its own, is written by one process, and can be read back."""

import dataclasses
import io
import json
import shutil
import struct

import filelock
import jax
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

import lwsam_jax as lwsam
from lwsam_bench.commands.cli import _parser
from lwsam_bench.commands.train import train_config
from lwsam_bench.models import smallcnn
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import read_rows
from lwsam_bench.support.tensorboard import Board
from lwsam_bench.training import checkpoint, loop, run_folder, tasks
from lwsam_bench.training.config import METHODS, RunOptions


STEPS = 5


def config(*arguments):
    arguments = ["train", "--method", "sgd", "--batch-size", 8, *arguments]
    return train_config(_parser().parse_args([*map(str, arguments)]))


BRIEF = ("--steps", STEPS, "--train-images", 24, "--test-images", 20)


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smallcnn, "BLOCKS", ((4, 1),))
        yield


def train(out, wanted, **changes):
    """Return exit code and output."""
    console = Console(file=io.StringIO(), width=200)
    options = RunOptions(out=str(out), data_dir=None, log_every=2, checkpoint_every=3)
    code = loop.train(wanted, dataclasses.replace(options, **changes), console)
    return code, console.file.getvalue()


def rows(out):
    return list(read_rows(out / "metrics.jsonl"))


def timeless(out):
    times = ("seconds", "compile_seconds")
    return [{k: x for k, x in row.items() if k not in times} for row in rows(out)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert train(out, config(*BRIEF))[0] == 0
    return out


def scalars(folder):
    """All (tag, step, value) of the event files in a folder, in order, and restarts."""
    found, restarts = [], []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.HasField("session_log"):
                restarts.append(event.step)
            for value in event.summary.value:
                found.append((value.tag, event.step, value.simple_value))
    return found, restarts


def test_the_last_row(finished):
    *_, test, end = rows(finished)
    assert (test["kind"], end["kind"]) == ("test", "end")
    for name in ("step", "epoch", "loss", "accuracy"):
        assert end[name] == test[name]
    assert end["step"] == STEPS
    assert end["diverged"] is False
    assert end["executables"] == 1
    assert 0 < end["compile_seconds"] < end["seconds"]
    assert [row["step"] for row in rows(finished) if row["kind"] == "train"] == [
        2,
        4,
        5,
    ]


def test_a_run_that_has_ended_is_left_alone(finished, monkeypatch):
    monkeypatch.setattr(tasks, "make", None)  # nothing is read
    before = (finished / "metrics.jsonl").read_bytes()
    code, output = train(finished, config(*BRIEF))
    assert code == 0
    assert "finished" in output
    assert (finished / "metrics.jsonl").read_bytes() == before


def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_killed_before_the_last_row(finished, tmp_path):
    out = copied(finished, tmp_path)
    path = out / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert train(out, config(*BRIEF))[0] == 0
    assert timeless(out) == timeless(finished)
    # What was spent before is not forgotten.
    assert rows(out)[-1]["compile_seconds"] == rows(finished)[-1]["compile_seconds"]


def test_an_earlier_version_of_the_configuration(finished, tmp_path):
    out = copied(finished, tmp_path)
    record = json.loads((out / "config.json").read_text())
    for name in ("decay_at", "criterion", "weights"):  # were not there
        del record["config"][name]
    (out / "config.json").write_text(json.dumps(record))
    assert train(out, config(*BRIEF))[0] == 0


def test_one_process_at_a_time(finished):
    with filelock.FileLock(finished / run_folder.LOCK):
        with pytest.raises(UserError, match="another process is writing"):
            train(finished, config(*BRIEF))
    assert train(finished, config(*BRIEF))[0] == 0


def test_the_state_at_the_end(finished):
    wanted = config(*BRIEF)
    task = tasks.make(wanted, None)
    state = loop.final_state(finished, wanted, task)
    assert int(state.step) == STEPS
    result = task.evaluate(state.params, state.model_state)
    assert result["accuracy"] == rows(finished)[-1]["accuracy"]
    assert result["loss"] == rows(finished)[-1]["loss"]


EVERYTHING = (
    ("sam",),
    ("lwsam", "--k", 2, "--ascent", "micro_batch", "--fraction", 0.25),
    ("generalized_sam", "--last", 0.5),
    ("looksam",),
    ("asam",),
    ("sam_on", "--ascent", "previous", "--rho", 0.1),
    ("gsam", "--ascent", "micro_batch", "--fraction", 0.25),
    ("friendly_sam",),
    ("esam",),
    ("perturbed", "--ascent", "random", "--rho", 0.2),
    ("momentum_sam", "--k", 3),
)
EVERYTHING += tuple(
    (name,) for name in METHODS if name not in {"sgd", *(o[0] for o in EVERYTHING)}
)


@pytest.mark.parametrize("options", EVERYTHING, ids=lambda options: options[0])
def test_all_methods_train_and_go_on(tmp_path, options):
    """What a method keeps from step to step is part of the checkpoints."""
    wanted = config(*BRIEF, "--method", *options)
    assert train(tmp_path, wanted)[0] == 0
    whole = timeless(tmp_path)
    assert whole[-1]["diverged"] is False
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert train(tmp_path, wanted)[0] == 0
    assert timeless(tmp_path) == whole


def test_an_ascent_that_takes_no_gradient_costs_none(tmp_path):
    assert train(tmp_path, config(*BRIEF, "--method", "momentum_sam"))[0] == 0
    *steps, _, end = rows(tmp_path)
    assert end["overhead"] == 0.0
    assert [row["rho"] for row in steps if row["kind"] == "train"] == [3.0] * 3


def test_statistics_are_those_of_the_weights_that_are_evaluated(tmp_path):
    """A BatchNorm gathers them at the perturbed weights; so they are gathered again."""
    wanted = config(*BRIEF, "--method", "perturbed", "--rho", 1)
    assert train(tmp_path, wanted)[0] == 0
    end = rows(tmp_path)[-1]
    task = tasks.make(wanted, None)
    state = loop.final_state(tmp_path, wanted, task)
    batches = map(task.batches, range(loop.REFRESH))
    expected = lwsam.refresh(
        task.loss_fn, state.params, task.network.model_state, batches
    )
    for found, other in zip(
        jax.tree.leaves(state.model_state), jax.tree.leaves(expected), strict=True
    ):
        # What is left of those before is little.
        np.testing.assert_allclose(found, other, rtol=0.1, atol=0.1)
    assert task.evaluate(state.params, state.model_state)["loss"] == end["loss"]
    assert end["loss"] == pytest.approx(
        task.evaluate(state.params, expected)["loss"], rel=0.1
    )


def test_a_checkpoint_of_an_earlier_version(finished, tmp_path, monkeypatch):
    out = copied(finished, tmp_path)
    (out / "metrics.jsonl").write_text("")
    monkeypatch.setattr(checkpoint, "_LAYOUT", checkpoint._LAYOUT + 1)
    with pytest.raises(UserError, match="holds a run of an earlier version"):
        train(out, config(*BRIEF))
    with pytest.raises(UserError, match="holds a run of an earlier version"):
        loop.final_state(out, config(*BRIEF), tasks.make(config(*BRIEF), None))


def test_the_state_of_no_run(finished, tmp_path):
    wanted = config(*BRIEF)
    task = tasks.make(wanted, None)
    with pytest.raises(UserError, match="holds no checkpoint"):
        loop.final_state(tmp_path, wanted, task)
    assert not list(tmp_path.iterdir())
    other = dataclasses.replace(wanted, lr=0.3)
    with pytest.raises(UserError, match="lr: 0.1 -> 0.3"):
        loop.final_state(finished, other, task)


def test_tensorboard(finished):
    found, restarts = scalars(finished / run_folder.TENSORBOARD)
    values = {(tag, step): value for tag, step, value in found}
    for row in rows(finished):
        names = {"train": ("loss", "accuracy", "lr", "overhead"), "test": ("loss",)}
        for name in names.get(row["kind"], ()):
            value = values[f"{row['kind']}/{name}", row["step"]]
            assert value == pytest.approx(row[name], rel=1e-6)
    assert restarts == [1]  # steps from 1 on


def test_tensorboard_hides_what_an_interrupted_run_logged(tmp_path):
    with Board(tmp_path, done=0, total=10) as board:
        for step in range(1, 6):
            board.write({"kind": "test", "step": step, "loss": float(step)})
    with Board(tmp_path, done=3, total=10) as board:
        board.write({"kind": "test", "step": 4, "loss": float("nan"), "accuracy": 0.5})
    found, restarts = scalars(tmp_path)
    assert restarts == [1, 4]
    assert found[-1] == ("test/accuracy", 4, 0.5)
    assert len(found) == 6  # what is not finite has no point


def test_a_long_run_has_a_thousand_points(tmp_path):
    row = {"loss": 1.0, "perturbed_loss": 1.0, "accuracy": 1.0, "lr": 1.0}
    with Board(tmp_path, done=0, total=10_000) as board:
        for step in range(1, 101):
            board.write({"kind": "train", "step": step, "overhead": 0.0, **row})
    found, _ = scalars(tmp_path)
    assert [step for tag, step, _ in found if tag == "train/loss"] == [
        *range(1, 101, 10)
    ]


def test_a_run_that_diverges_goes_on_to_its_end(tmp_path):
    code, _ = train(tmp_path, config(*BRIEF, "--lr", 1e30))
    assert code == 0
    *_, end = rows(tmp_path)
    assert (end["kind"], end["step"], end["diverged"]) == ("end", STEPS, True)
    assert end["loss"] is None


def test_weights_are_part_of_a_run(tmp_path):
    wanted = config(*BRIEF)
    record = {"config": dataclasses.asdict(wanted), "provenance": []}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**record, "weights_sha256": "a"}))
    moved = dataclasses.replace(wanted, weights="elsewhere.safetensors")
    assert run_folder.check_same_run(tmp_path, moved, "a")
    assert run_folder.check_same_run(tmp_path, moved, None)
    with pytest.raises(UserError, match="weights_sha256: a -> b"):
        run_folder.check_same_run(tmp_path, moved, "b")


def test_starting_over_removes_what_a_run_left(finished, tmp_path):
    out = copied(finished, tmp_path)
    (out / "mine.txt").touch()
    run_folder.start_over(out)
    assert {p.name for p in out.iterdir()} == {"mine.txt", run_folder.LOCK}


def test_checkpoints_hold_the_tally(finished):
    position = finished / "checkpoints" / str(STEPS) / "position" / "metadata"
    tally = json.loads(position.read_text())["tally"]
    assert len(tally["executables"]) == 1
    assert tally["diverged"] is False
    assert tally["steps"] == STEPS
