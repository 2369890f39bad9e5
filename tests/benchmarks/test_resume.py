"""A run that was stopped, by whatever, ends as if it had not been."""

import os
import signal
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from lwsam_bench.support.stopping import Stop


STEPS = 60
# All layers but one of ten: two executables, and a selection that still changes.
RUN = ["train", "--dataset", "digits", "--method", "lwsam", "--k", 9]
RUN += ["--steps", STEPS, "--batch-size", 32, "--checkpoint-every", 7]


def arrays(out):
    """All arrays of the last checkpoint, as written: no template, no code of ours."""
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(out / "checkpoints" / str(STEPS) / "state")
    return {name: np.asarray(x) for name, x in state.items()}


def assert_same_run(out, reference, rows):
    got, expected = arrays(out), arrays(reference)
    assert got.keys() == expected.keys()
    assert sum("kernel" in name for name in got) >= 20  # parameters and momentum
    for name, x in expected.items():
        assert x.tobytes() == got[name].tobytes(), name
    got, expected = (rows(path / "metrics.jsonl") for path in (out, reference))
    for row in got + expected:
        for name in ("seconds", "compile_seconds"):  # all else is reproduced
            row.pop(name, None)
    assert got == expected


def stop_half_way(command, out, signal_number):
    """Start a run and send it a signal when half of its steps are done."""
    process = command.start(*RUN, "--out", out)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < STEPS // 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    code, output = command.run(*RUN, "--out", out)
    assert code == 0, output
    return out


def test_an_unbroken_run_leaves_a_row_for_each_step(unbroken, rows):
    train = [row for row in rows(unbroken / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert train[-1]["loss"] < train[0]["loss"]
    assert len(train[0]["norms"]) == 10
    assert all(len(row["perturbed"]) == 9 for row in train)
    kept = {path.name for path in (unbroken / "checkpoints").iterdir()}
    assert kept == {"56", "60"}


def test_killed_and_resumed(command, unbroken, tmp_path, rows):
    code, _ = stop_half_way(command, tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert rows(tmp_path / "metrics.jsonl")[-1]["step"] < STEPS
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": ')  # torn apart by the crash
    code, output = command.run(*RUN, "--out", tmp_path)
    assert code == 0, output
    assert "going on from step" in output
    assert_same_run(tmp_path, unbroken, rows)


def test_interrupted_and_resumed(command, unbroken, tmp_path, rows):
    code, output = stop_half_way(command, tmp_path, signal.SIGINT)
    assert code == 130, output
    last = rows(tmp_path / "metrics.jsonl")[-1]["step"]
    assert f"stopped at step {last} of {STEPS}" in output
    assert (tmp_path / "checkpoints" / str(last)).is_dir()
    code, output = command.run(*RUN, "--out", tmp_path)
    assert code == 0, output
    assert f"going on from step {last}" in output
    assert_same_run(tmp_path, unbroken, rows)


def test_terminated(command, unbroken, tmp_path, rows):
    del unbroken  # has filled the cache
    code, output = stop_half_way(command, tmp_path, signal.SIGTERM)
    assert code == 143, output
    last = rows(tmp_path / "metrics.jsonl")[-1]["step"]
    assert (tmp_path / "checkpoints" / str(last)).is_dir()


def test_both_signals_are_noted_once():
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)
        with Stop() as stop:
            assert not stop.signal
            os.kill(os.getpid(), number)
            assert stop.signal == number
            # The second one acts as it always does.
            assert signal.getsignal(number) is before
        assert signal.getsignal(number) is before
