"""Tunings of a moment, on real images: rows that survive whatever stops the command."""

import collections
import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lwsam_bench.models import smallcnn
from lwsam_bench.pages import docs as docs_page
from lwsam_bench.support import cores
from lwsam_bench.support.errors import UserError
from lwsam_bench.tuning import results, tune, workers
from lwsam_bench.tuning.methods import BY_NAME, choose
from lwsam_bench.tuning.protocol import Protocol, Request
from lwsam_bench.tuning.report import page, summary
from lwsam_bench.tuning.results import Results
from lwsam_bench.tuning.runs import measures, optimizers
from lwsam_bench.tuning.runs.images import ImageCourse
from lwsam_bench.tuning.runs.runner import Runner
from lwsam_bench.tuning.tasks import TASKS


TASK = dataclasses.replace(
    TASKS["digits"],
    train_images=100,
    test_images=50,
    steps=(2, 4),
    noise=0.4,
    batch_size=20,
)
PROTOCOL = Protocol(trials=2, seeds=2, draws=1)
METHODS = choose(["sgd", "random-relative"])


def run(out, task=TASK, protocol=PROTOCOL, methods=METHODS, **more):
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    assert tune.run(task, methods, protocol, None, str(out), console, **more) == 0
    return printed.getvalue()


def rows_in(folder):
    return [json.loads(x) for x in (folder / results.ROWS).read_text().splitlines()]


def outcomes(folder):
    """All of the rows that does not depend on when and how fast they were made."""
    return [
        {k: v for k, v in row.items() if "seconds" not in k and k != "origin"}
        for row in rows_in(folder)
    ]


@pytest.fixture(scope="module", autouse=True)
def _small_network():
    """Four layers: compiling is what takes time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smallcnn, "BLOCKS", ((4, 1),))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.Hand, "_runner_of", _kept_runner)
        run(folder)
    return folder


RUNNERS = {}
_fresh_runner = workers.Hand._runner_of


def _kept_runner(hand, cell):
    """The runner that an earlier test compiled; hands have their own otherwise."""
    if cell.method.name not in RUNNERS:
        RUNNERS[cell.method.name] = _fresh_runner(hand, cell), hand._origin
    runner, hand._origin = RUNNERS[cell.method.name]
    return runner


@pytest.fixture
def compiled(finished, monkeypatch):
    monkeypatch.setattr(workers.Hand, "_runner_of", _kept_runner)


def test_rows_have_what_is_reported(finished):
    rows = rows_in(finished)
    count = sum(PROTOCOL.runs(method.is_base) for method in METHODS)
    assert len({results.key(row) for row in rows}) == len(rows) == count
    for row in rows:
        assert row["price"] == 1.0
        assert row["gradients"] == row["steps"]
        assert row["flops"] > 0
        assert row["task"]["noise"] == 0.4
        assert row["origin"]["packages"]["jax"]
        assert set(row["validation"]) == {"step", "accuracy", "loss", "ece"}
        # The test images are looked at by final runs alone.
        assert ("last" in row) == (row["phase"] == "final")
    final = [row for row in rows if row["phase"] == "final"]
    by_seed = lambda name: [
        r["seed"] for r in final if r["method"] == name and r["length"] == 1.0
    ]
    assert by_seed("sgd") == by_seed("random-relative") == [0, 1]
    for row in final:
        assert row["steps"] == max(1, round(row["config"]["steps"] * row["length"]))
        assert row["last"]["survival"]["4 bits"] > 0
        best = max(row["validated"], key=lambda v: (v["accuracy"], -v["loss"]))
        assert row["selected"]["step"] == best["step"]
        if best["step"] == row["steps"]:
            assert row["selected"]["accuracy"] == row["last"]["accuracy"]


def test_all_runs_of_a_method_share_what_is_compiled(finished):
    for name in ("sgd", "random-relative"):
        rows = [row for row in rows_in(finished) if row["method"] == name]
        spent = [row["compile_cpu_seconds"] for row in rows]
        assert spent[0] > 0
        assert spent[1:] == [0] * (len(rows) - 1)
        for row in rows:
            assert row["all_cpu_seconds"] >= row["cpu_seconds"] > 0


@pytest.mark.parametrize("kept", [0, 3, 9])
def test_a_killed_tuning_goes_on_where_it_was(finished, tmp_path, compiled, kept):
    _goes_on(finished, tmp_path, kept)


def test_a_killed_tuning_goes_on_in_another_process(finished, tmp_path):
    _goes_on(finished, tmp_path, kept=-2)  # with nothing compiled


def _goes_on(finished, tmp_path, kept):
    out = shutil.copytree(finished, tmp_path / "out")
    path = out / results.ROWS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:kept]) + lines[kept][:30])  # torn by a crash
    run(out)
    assert path.read_text().splitlines(keepends=True)[:kept] == lines[:kept]
    assert outcomes(out) == outcomes(finished)


def test_an_interrupt_leaves_whole_rows(finished, tmp_path, compiled, monkeypatch):
    add, count = Results.add, 4

    def interrupted(self, row):
        add(self, row)
        if len(self.rows) == count:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert outcomes(tmp_path) == outcomes(finished)[:count]
    run(tmp_path)
    assert outcomes(tmp_path) == outcomes(finished)


def test_a_run_is_the_same_each_time(finished):
    """Whatever ran before it, with the same executables."""
    wanted = [row for row in rows_in(finished) if row["phase"] == "trial"]
    for row in (*wanted, *wanted[::-1]):
        asked = Request(
            row["phase"], row["trial"], row["seed"], row["config"], row["length"]
        )
        runner, _ = RUNNERS[row["method"]]
        measured = {k: v for k, v in runner.run(asked).items() if "seconds" not in k}
        assert measured == {name: row[name] for name in measured}


def test_a_finished_tuning_trains_nothing(finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    before = (out / results.ROWS).read_text()
    monkeypatch.setattr(Runner, "run", None)
    run(out)
    assert (out / results.ROWS).read_text() == before
    (out / "tuning.md").unlink()
    run(out, render_only=True)
    assert (out / "tuning.md").read_text() == (finished / "tuning.md").read_text()


def test_a_row_that_is_there_twice_counts_once(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    path = out / results.ROWS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0], lines[-1]]))
    run(out)
    assert path.read_text().splitlines(keepends=True)[: len(lines)] == lines
    assert (out / "tuning.md").read_text() == (finished / "tuning.md").read_text()


@pytest.mark.parametrize(
    ("task", "protocol", "message"),
    [
        (dataclasses.replace(TASK, noise=0.2), PROTOCOL, "noise: 0.4 -> 0.2"),
        (TASK, dataclasses.replace(PROTOCOL, trials=3), "trials: 2 -> 3"),
    ],
)
def test_another_tuning_is_refused(finished, task, protocol, message):
    with pytest.raises(UserError, match=message):
        run(finished, task, protocol)


def test_two_at_a_time_are_refused(finished):
    script = (
        "import pathlib, sys, time; from lwsam_bench.support.row_lock import row_lock\n"
        "with row_lock(pathlib.Path(sys.argv[1])): print('locked', flush=True);"
        " time.sleep(60)"
    )
    held = [sys.executable, "-c", script, str(finished / results.ROWS)]
    with subprocess.Popen(held, stdout=subprocess.PIPE, env=_environment()) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="another process is writing"):
            run(finished)
        other.kill()


def test_the_page_is_made_of_rows(finished, tmp_path):
    text = (finished / "tuning.md").read_text()
    assert text.startswith("## Digits, 40% noise, batch 20")
    assert "| random, relative | 1.00 |" in text
    assert "- Up to 1.10, at the last step: " in text
    (name,) = [path.name for path in finished.glob("*.png")]
    assert f"]({name})" in text
    docs = tmp_path / "docs"
    docs.mkdir()
    target = docs / "tuning.md"
    target.write_text("# Title\n\n{}\nold\n{}\n".format(*docs_page.marks("tuning")))
    beside, verdict = docs / "pareto.md", docs / "choose.md"
    for path in (beside, verdict):
        path.write_text("{}\n{}\n".format(*docs_page.marks(path.stem)))
    (tmp_path / "all").mkdir()
    shutil.copytree(finished, tmp_path / "all" / "digits")
    for _ in range(2):
        page.write_docs(tmp_path / "all", str(docs))
    assert text.splitlines()[0] in target.read_text()
    assert "old" not in target.read_text()
    assert (docs / "images" / name).exists()
    assert f"](images/{name})" in beside.read_text()
    assert "SGD, half the steps" in beside.read_text()
    assert "| Digits, 40% noise, batch 20 | last step |" in verdict.read_text()
    target.write_text("no marks")
    with pytest.raises(UserError, match="no page with the marks"):
        page.write_docs(tmp_path / "all", str(docs))


def test_a_page_without_the_base_has_no_differences(finished):
    rows = [row for row in rows_in(finished) if row["method"] != "sgd"]
    text = page.section(rows, plot_folder="")
    assert "| random, relative | 1.00 |" in text
    assert "Up to" not in text


def tuned(name, draws, *accuracies, price=1.0):
    rows = {
        seed: {"last": {"accuracy": x}, "price": price}
        for seed, x in enumerate(accuracies)
    }
    return summary.Tuned(BY_NAME[name], draws, rows, trials=2)


def test_the_worse_set_of_draws_counts_and_small_gaps_are_none():
    found = {
        "sgd": [tuned("sgd", 0, 0.5, 0.6), tuned("sgd", 1, 0.8, 0.7)],
        "sam": [tuned("sam", 0, 0.9, 0.98, price=2.0), tuned("sam", 1, 0.81, 0.73)],
    }
    first, second = summary.gaps(found, "sam", "last")
    assert first.mean == pytest.approx(0.39)
    assert first.verdict == "better"
    assert summary.worst([first, second]) is second
    assert second.mean == pytest.approx(0.02)
    assert second.error == pytest.approx(0.01)
    assert second.verdict == "no difference"
    assert summary.payable(found, "sgd", 1.1) == []
    assert summary.payable(found, "sgd", 2.0) == [found["sam"]]


def test_processes_die_with_the_one_that_started_them(tmp_path):
    """Even where that is killed, and they are at work."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from lwsam_bench.tuning import workers\n"
        "def work():\n"
        "    workers._die_with_the_parent()\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(120)\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    child.start()\n"
        "    print(child.pid, flush=True)\n"
        "    child.join()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=_environment()
    )
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGKILL)
    parent.communicate()  # until the child, too, has closed the pipe
    deadline = time.monotonic() + 20
    while pathlib.Path(f"/proc/{child}/cmdline").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("allowed", "here", "processes", "expected"),
    [
        ({0, 1}, 0, 2, [0, 1]),
        ({0, 1}, 1, 1, [1]),  # others may hold the first one
        ({4, 5, 7}, 7, 2, [7, 4]),
        ({3}, 3, 2, [3, 3]),
        ({0, 1}, None, 1, [0]),
    ],
)
def test_each_process_gets_a_core(monkeypatch, allowed, here, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    monkeypatch.setattr(cores, "_current", lambda: here)
    assert cores.each_its_own(processes) == expected
    assert cores.count() == len(allowed)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"),
    reason="needs os.sched_getaffinity: elsewhere cores have no names",
)
def test_a_process_knows_its_core():
    assert cores._current() in range(os.cpu_count())


@pytest.mark.slow
def test_two_processes_make_the_same_rows(finished, tmp_path):
    """Which trial is the best may differ: theirs is the whole network."""
    run(tmp_path, processes=2)
    kind = lambda row: tuple(
        row[name] for name in ("method", "draws", "phase", "seed", "length")
    )
    count = lambda folder: collections.Counter(map(kind, outcomes(folder)))
    assert count(tmp_path) == count(finished)
    keys = [results.key(row) for row in outcomes(tmp_path)]
    assert len(keys) == len(set(keys))
    assert {row["origin"]["cores"] for row in rows_in(tmp_path)} == {1}
    assert (tmp_path / "tuning.md").exists()


def test_numbers_of_an_optimizer_are_data():
    """A trial's learning rate, decay and schedule are those of a plain optimizer."""
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    grads = {"w": jnp.full((2, 2), 0.5), "b": jnp.full(2, 0.5)}
    tx = optimizers.make("sgd")
    config = {"lr": 0.1, "weight_decay": 0.2, "steps": 3, "rho": 1.0}
    state = optimizers.with_numbers(tx.init(params), config)
    w, b, trace_w, trace_b = 1.0, 1.0, 0.0, 0.0
    for rate in (0.1, 0.1, 0.01):  # divided by ten after two thirds
        updates, state = tx.update(grads, state, params)
        params = {name: params[name] + updates[name] for name in params}
        trace_w = 0.9 * trace_w + 0.5 + 0.2 * w
        trace_b = 0.9 * trace_b + 0.5
        w, b = w - rate * trace_w, b - rate * trace_b
        assert np.allclose(params["w"], w)
        assert np.allclose(params["b"], b)


def test_averaged_weights_are_the_ones_in_use():
    tx = optimizers.averaged(2.0)
    params = {"w": jnp.zeros(1)}
    state = tx.init(params)
    for value in (1.0, 3.0, 7.0):
        updates = {"w": value - params["w"]}
        _, state = tx.update(updates, state, params)
        params = {"w": jnp.full(1, value)}
    assert np.allclose(optimizers.weights_to_use(state, params)["w"], (2 + 7) / 2)
    assert optimizers.weights_to_use((), params) is params


def test_calibration_and_loss_of_known_logits():
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.4, 0.6]]))
    judged = measures.judge(logits, np.array([0, 1, 1, 1]))
    assert judged["accuracy"] == 0.75
    assert judged["loss"] == pytest.approx(-np.log([0.9, 0.1, 0.8, 0.6]).mean())
    # Bins: 0.9 twice, one right; 0.8 and 0.6 alone, both right.
    assert judged["ece"] == pytest.approx((2 * 0.4 + 0.2 + 0.4) / 4)
    lost = measures.judge(np.full((2, 2), np.nan), np.array([0, 1]))
    assert lost["loss"] is lost["ece"] is None


def test_rounding_and_shaking_touch_the_weights_alone():
    params = {"w": jnp.array([[0.9, -3.0], [0.4, 3.0]]), "b": jnp.array([0.123])}
    three = measures.rounded(params, 3)  # seven levels, a step of 1
    assert np.allclose(three["w"], [[1.0, -3.0], [0.0, 3.0]])
    assert np.array_equal(three["b"], params["b"])
    shaken = measures.shaken(params, 0.2, np.random.default_rng(0))
    moved = np.linalg.norm(shaken["w"] - params["w"]) / np.linalg.norm(params["w"])
    assert moved == pytest.approx(0.2)
    assert np.array_equal(shaken["b"], params["b"])


def test_a_tail_costs_its_share():
    task = dataclasses.replace(TASK, steps=(10, 10))
    runner = Runner(ImageCourse(task, None), BY_NAME["sam-tail"])
    config = {"lr": 0.1, "weight_decay": 1e-3, "steps": 10, "rho": 0.1}
    row = runner.run(Request("trial", 0, 0, config))
    assert row["price"] == pytest.approx(1.3, abs=1e-3)
    assert row["gradients"] == pytest.approx(13.0)


def test_validation_images_have_noise_and_are_not_learned_from():
    course = ImageCourse(dataclasses.replace(TASK, noise=0.9), None)
    start = course.start(0)
    ((images, labels),) = start.validation
    batch = start.batches(40)
    assert len(images) == len(labels) == 10
    held = {x.tobytes() for x in np.asarray(images)}
    seen = {x.tobytes() for i in range(40) for x in np.asarray(batch(i)["image"])}
    assert len(seen) > 80
    assert not held & seen
    ((clean, true),) = (
        ImageCourse(dataclasses.replace(TASK, noise=0.0), None).start(0).validation
    )
    assert np.array_equal(clean, images)
    assert not np.array_equal(true, labels)


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
