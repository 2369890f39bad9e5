"""Sweeps: each run is trained once, goes on where it was cut off, and fails alone."""

import collections
import dataclasses
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import filelock
import pytest
from rich.console import Console

import fake_runs
import tiny_task
from lwsam_bench.paper.runs import attempts, pool
from lwsam_bench.paper.runs.attempts import Result
from lwsam_bench.paper.runs.outcome import judge, record_failure
from lwsam_bench.paper.runs.sweep import Stopped, Sweep
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import read_rows
from lwsam_bench.support.stopping import Stop
from lwsam_bench.training.config import LOG_EVERY, RunOptions, TrainConfig


CONFIG = TrainConfig(
    dataset="digits",
    model="smallcnn",
    method="sgd",
    k=0,
    rho=0.0,
    alpha=1.0,
    normalize="none",
    steps=8,
    epochs=None,
    batch_size=5,
)
SEEDS = [dataclasses.replace(CONFIG, seed=seed) for seed in range(3)]
OTHERS = [
    dataclasses.replace(CONFIG, dataset="cifar100", seed=seed) for seed in range(2)
]


def sweep(out, data_dir=None, **options):
    console = Console(file=io.StringIO(), width=200)
    made = Sweep(out, data_dir, console, **options)
    return made, console.file


@pytest.fixture
def tried(monkeypatch):
    """Replaces an attempt by one that takes no time; returns the configurations."""
    made = []

    def attempt(config, options, console):
        made.append(config)
        out = pathlib.Path(options.out).parents[1]
        if config.dataset == "cifar100":
            return Result("missing data", "cifar100 is not there")
        if config.seed == 1:
            record_failure(pathlib.Path(options.out), "out of memory")
            return Result("failed", "out of memory")
        fake_runs.write(out, config)
        return Result("done")

    monkeypatch.setattr("lwsam_bench.paper.runs.sweep.attempt", attempt)
    return made


def test_each_run_is_trained_once_and_failures_and_missing_data_stay(tmp_path, tried):
    made, printed = sweep(tmp_path)
    found = made.ensure([*SEEDS, SEEDS[0], *OTHERS])
    assert [found[c].status for c in SEEDS] == ["done", "failed", "done"]
    assert [found[c].status for c in OTHERS] == ["missing data"] * 2
    assert found[SEEDS[1]].reason == "out of memory"
    assert found[OTHERS[1]].reason == "cifar100 is not there"
    assert tried == [*SEEDS, OTHERS[0]]  # the other one needs not be tried
    text = printed.getvalue()
    assert text.count("cifar100 is not there") == 1
    assert "run 1 of 5: digits-smallcnn-sgd-s0-" in text
    assert "run 2 of 5, about " in text
    assert "failed: out of memory" in text

    # Another command: what has ended has ended, data may have come.
    made, printed = sweep(tmp_path)
    found = made.ensure([*SEEDS, OTHERS[0]])
    assert [found[c].status for c in SEEDS] == ["done", "failed", "done"]
    assert tried[4:] == [OTHERS[0]]
    assert "3 of 4 runs have ended" in printed.getvalue()


def test_a_signal_ends_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lwsam_bench.paper.runs.sweep.attempt", lambda *_: Result("stopped", code=143)
    )
    with pytest.raises(Stopped) as stopped:
        sweep(tmp_path)[0].ensure(SEEDS)
    assert stopped.value.code == 143


def test_a_run_of_another_process_is_waited_for(tmp_path, tried):
    made, printed = sweep(tmp_path, patience=0.1)
    folder = made.folder(SEEDS[0])
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / ".lock"):
        with pytest.raises(UserError, match="another process is training"):
            made.ensure(SEEDS)
    assert "waiting" in printed.getvalue()
    assert not tried
    folder.joinpath(".lock").unlink(missing_ok=True)
    folder.rmdir()
    assert made.ensure(SEEDS[:1])[SEEDS[0]].status == "done"


def test_long_runs_leave_fewer_rows(tmp_path):
    made, _ = sweep(tmp_path, "data")
    options = made._options(CONFIG)
    assert (options.log_every, options.data_dir) == (1, "data")
    assert options.checkpoint_every == 3  # of eight steps
    long = dataclasses.replace(CONFIG, steps=None, epochs=150)
    assert made._options(long).log_every == LOG_EVERY
    assert made._options(long).checkpoint_every is None
    # Methods that ascend in every second, third or fifth step are seen in all phases.
    assert all(math.gcd(LOG_EVERY, period) == 1 for period in (2, 3, 5, 10))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr("lwsam_bench.training.tasks.make", tiny_task.make)


def options(folder):
    return RunOptions(str(folder), None, log_every=1, checkpoint_every=None)


def test_an_attempt_tells_what_it_came_to(tmp_path, monkeypatch):
    console = Console(file=io.StringIO())
    ask = lambda: attempts.attempt(CONFIG, options(tmp_path), console)

    def ends(how):
        def train(*_):
            if isinstance(how, Exception):
                raise how
            return how

        monkeypatch.setattr("lwsam_bench.training.loop.train", train)

    monkeypatch.setattr("lwsam_bench.training.tasks.make", tiny_task.make)
    ends(0)
    assert ask() == Result("done")
    ends(143)
    assert ask() == Result("stopped", code=143)
    assert judge(tmp_path).status == "pending"
    ends(MemoryError("no room\nat all"))
    assert ask() == Result("failed", "MemoryError: no room")
    assert judge(tmp_path).reason == "MemoryError: no room"
    trace = json.loads((tmp_path / "failed.json").read_text())["traceback"]
    assert "at all" in trace[-1]
    ends(UserError("too many layers"))
    assert ask() == Result("failed", "too many layers")

    locked = UserError("another process")
    locked.__cause__ = filelock.Timeout("x")
    (tmp_path / "failed.json").unlink()
    ends(locked)
    assert ask() == Result("locked", "another process")

    def missing(*_):
        raise UserError("no data")

    monkeypatch.setattr("lwsam_bench.training.tasks.make", missing)
    ends(UserError("no data"))
    assert ask() == Result("missing data", "no data")
    assert judge(tmp_path).status == "pending"


def test_missing_data_for_real(tmp_path):
    configs = [dataclasses.replace(c, dataset="cifar10") for c in SEEDS]
    made, printed = sweep(tmp_path, str(tmp_path / "data"))
    found = made.ensure(configs)
    assert {found[c].status for c in configs} == {"missing data"}
    assert printed.getvalue().count("cifar10 is not in") == 1


def without_seconds(folder):
    rows = list(read_rows(folder / "metrics.jsonl"))
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in rows]


def test_stopped_and_resumed(tmp_path, monkeypatch, tiny):
    config = dataclasses.replace(CONFIG, method="lwsam", k=1, rho=0.1, alpha=0.8)
    unbroken, _ = sweep(tmp_path / "unbroken")
    assert unbroken.ensure([config])[config].status == "done"

    def stops(*arguments):
        task = tiny_task.make(*arguments)

        def batches(step):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return task.batches(step)

        return dataclasses.replace(task, batches=batches)

    broken, _ = sweep(tmp_path / "broken")
    monkeypatch.setattr("lwsam_bench.training.tasks.make", stops)
    with pytest.raises(Stopped) as stopped:
        broken.ensure([config])
    assert stopped.value.code == 143
    assert judge(broken.folder(config)).status == "pending"
    monkeypatch.setattr("lwsam_bench.training.tasks.make", tiny_task.make)
    found = broken.ensure([config])[config]
    assert found.status == "done"
    assert broken.ensure([config])[config].status == "done"
    expected = without_seconds(unbroken.folder(config))
    assert without_seconds(found.folder) == expected
    assert [row["step"] for row in found.rows("train")] == list(range(1, 9))
    end = found.end
    assert sum(end["perturbed"].values()) == sum(
        len(row["perturbed"]) for row in found.rows("train")
    )


def test_a_signal_in_the_last_step_is_not_lost(tmp_path, monkeypatch, tiny):
    def stops(*arguments):
        task = tiny_task.make(*arguments)

        def evaluate(*state):
            os.kill(os.getpid(), signal.SIGTERM)
            return task.evaluate(*state)

        return dataclasses.replace(task, evaluate=evaluate)

    monkeypatch.setattr("lwsam_bench.training.tasks.make", stops)
    made, _ = sweep(tmp_path)
    short = [dataclasses.replace(c, steps=1) for c in SEEDS]
    with pytest.raises(Stopped):
        made.ensure(short)
    found = [judge(made.folder(config)).status for config in short]
    assert found == ["done", "pending", "pending"]


# Processes side by side: what they run is replaced by a few lines of Python.


def stand_in(monkeypatch, code):
    """Make processes of a pool run `code`, with the request in `wanted`."""
    whole = (
        f"import json, os, sys, time, signal\nwanted = json.loads(sys.argv[1])\n{code}"
    )

    def request(config, options, result):
        wanted = {"seed": config.seed, "out": options.out, "result": str(result)}
        return [sys.executable, "-c", whole, json.dumps(wanted)]

    monkeypatch.setattr(pool, "request", request)


def work_of(out, configs):
    folders = [out / str(config.seed) for config in configs]
    return collections.deque(
        (config, options(folder))
        for config, folder in zip(configs, folders, strict=True)
    )


def test_a_pool_runs_all_and_records_what_is_killed(tmp_path, monkeypatch):
    code = (
        "if wanted['seed'] == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "print('hello', os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "open(wanted['result'], 'w').write(json.dumps({'status': 'done'}))"
    )
    stand_in(monkeypatch, code)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("JAX_PLATFORMS")
    with Stop() as stop:
        ended = list(pool.Pool(2, stop).run(work_of(tmp_path, SEEDS)))
    results = {config.seed: result for (config, _), result in ended}
    assert results[0] == results[2] == Result("done")
    assert results[1].status == "failed"
    assert "killed by signal 9 (SIGKILL)" in results[1].reason
    assert judge(tmp_path / "1").reason == results[1].reason
    assert (tmp_path / "0" / "log.txt").read_text() == "hello 4\n"


def test_a_run_that_was_killed_once_goes_on(tmp_path, monkeypatch):
    code = (
        "began = wanted['out'] + '/began'\n"
        "if not os.path.exists(began):\n"
        "    open(began, 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "open(wanted['result'], 'w').write(json.dumps({'status': 'done'}))"
    )
    stand_in(monkeypatch, code)
    with Stop() as stop:
        ended = list(pool.Pool(2, stop).run(work_of(tmp_path, SEEDS)))
    assert [result for _, result in ended] == [Result("done")] * 3


def test_a_pool_passes_signals_on_and_starts_no_more(tmp_path, monkeypatch):
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "open(wanted['out'] + '/started', 'w').close()\n"
        "time.sleep(60)"
    )
    stand_in(monkeypatch, code)
    with Stop() as stop:
        running = pool.Pool(2, stop)
        work = work_of(tmp_path, SEEDS)
        start = running._start

        def started(*arguments):
            start(*arguments)
            if len(work) == 1:  # two are under way: wait until they listen
                while not all((tmp_path / s / "started").exists() for s in "01"):
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(running, "_start", started)
        ended = list(running.run(work))
    assert [result for _, result in ended] == [Result("stopped", code=143)] * 2
    assert len(work) == 1
    assert not (tmp_path / "2").exists()


def test_devices_are_given_out_in_turn(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert pool.visible_devices() == ("2", "3")
    places = [pool.environment(i, 4, ("2", "3")) for i in range(4)]
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places] == ["2", "3", "2", "3"]
    assert places[0]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in pool.environment(0, 2, ("2", "3"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert pool.visible_devices() == ()
    assert pool.environment(0, 2, ()).get("CUDA_VISIBLE_DEVICES") == "2,3"
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    def listed(*_, **__):
        return subprocess.CompletedProcess([], 0, stdout="GPU 0: a\nGPU 1: b\n")

    monkeypatch.setattr(subprocess, "run", listed)
    assert pool.visible_devices() == ("0", "1")


def test_side_by_side(tmp_path, monkeypatch):
    code = (
        "status, reason = 'done', ''\n"
        "if wanted['seed'] == 9: status, reason = 'missing data', 'no cifar100'\n"
        "open(wanted['result'], 'w').write(json.dumps("
        "{'status': status, 'reason': reason}))"
    )
    stand_in(monkeypatch, code)
    absent = dataclasses.replace(CONFIG, dataset="cifar100", seed=9)
    also = dataclasses.replace(absent, model="resnet8", seed=9)
    fake_runs.write(tmp_path, SEEDS[0])
    made, printed = sweep(tmp_path, jobs=2)
    found = made.ensure([SEEDS[0], absent, also])
    assert found[SEEDS[0]].status == "done"
    assert found[absent].status == found[also].status == "missing data"
    assert "2 runs, 2 at a time" in printed.getvalue()


def test_a_run_that_another_process_begins_is_tried_again(tmp_path, monkeypatch):
    code = (
        "seen = wanted['out'] + '/seen'\n"
        "status = 'done' if os.path.exists(seen) else 'locked'\n"
        "open(seen, 'w').close()\n"
        "open(wanted['result'], 'w').write(json.dumps({'status': status}))"
    )
    stand_in(monkeypatch, code)
    made, printed = sweep(tmp_path, jobs=2)
    made.ensure(SEEDS)
    assert "3 of 3 runs" in printed.getvalue()
    other = [dataclasses.replace(c, steps=9) for c in SEEDS]
    with pytest.raises(UserError):
        sweep(tmp_path, jobs=2, patience=0.0)[0].ensure(other)


@pytest.mark.slow
def test_side_by_side_for_real(tmp_path):
    configs = [dataclasses.replace(c, steps=2) for c in SEEDS[:2]]
    found = sweep(tmp_path, jobs=2)[0].ensure(configs)
    for config in configs:
        outcome = found[config]
        assert outcome.status == "done", (outcome.folder / "log.txt").read_text()
        assert outcome.end["step"] == 2
