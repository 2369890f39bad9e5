"""`lwsam-bench train` in several processes: as one; killed, and resumed by two or one."""

import concurrent.futures
import pathlib
import re
import shutil
import signal
import socket
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from lwsam_bench.commands.cli import main
from lwsam_bench.data import splits, text
from lwsam_bench.data.pipeline import Batches, HostBatches
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.processes import ALONE, Processes, SharedError
from lwsam_bench.training.checkpoint import Checkpoints


STEPS, EVERY, ON = 50, 5, 20
# Two layers are trained, one of which is perturbed; no statistics of a batch, each of
# which would cost two processes on one core a turn.
RUN = ["train", "--dataset", "cifar10", "--model", "vit-tiny", "--method", "lwsam"]
RUN += ["--k", 1, "--rho", 0.1, "--lr", 0.05, "--batch-size", 8, "--image-size", 16]
RUN += ["--train-images", 64, "--test-images", 120, "--steps", STEPS]
RUN += ["--checkpoint-every", EVERY]
PATIENCE = 240  # seconds
ROOT = pathlib.Path(__file__).resolve().parents[2]


class Group:
    """Two processes of one run."""

    def __init__(self, command, data_dir):
        self._command, self._data = command, data_dir

    def start(self, out, count=2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        several = ["--coordinator", f"localhost:{port}", "--num-processes", count]
        run = [*RUN, "--data-dir", self._data, "--out", out]
        return [
            self._command.start(*run, *several, "--process-id", i, devices=1)
            for i in range(count)
        ]

    def end(self, started):
        """Exit codes and outputs."""
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in started]
        return [process.returncode for process in started], outputs

    def alone(self, out):
        run = [*RUN, "--data-dir", self._data, "--out", out]
        return self.end([self._command.start(*run, devices=1)])


def wait_for_step(out, step):
    """Wait until a run has left the row of a step."""
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + PATIENCE
    row = b'"train", "step": %d,' % step
    while not metrics.exists() or row not in metrics.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def group(command, data_dir):
    return Group(command, data_dir)


@pytest.fixture(scope="module")
def unbroken(group, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    codes, outputs = group.end(group.start(out))
    assert codes == [0, 0], outputs
    assert f"step {STEPS}: test accuracy" in outputs[0]
    assert not re.search("step|accuracy", outputs[1])  # the first one speaks
    return out


@pytest.fixture(scope="module")
def killed(group, unbroken, tmp_path_factory):
    """A run of which one process was killed, and how the other one ended."""
    del unbroken  # has filled the cache
    out = tmp_path_factory.mktemp("killed") / "run"
    started = group.start(out)
    wait_for_step(out, EVERY + 2)
    started[1].send_signal(signal.SIGKILL)
    codes, outputs = group.end(started)
    assert codes[1] == -signal.SIGKILL
    # It says so, unless JAX ends it first.
    assert codes[0] == -signal.SIGABRT or "start all of them again" in outputs[0]
    assert codes[0] in (1, -signal.SIGABRT), outputs[0]
    return out


def arrays(out, step):
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(out / "checkpoints" / str(step) / "state")
    return {name: np.asarray(x) for name, x in state.items()}


def said_step(words, output):
    found = re.search(rf"{words} step (\d+) of {STEPS}", output)
    assert found is not None, output
    return int(found[1])


def gone_on(output):
    return said_step("going on from", output)


@pytest.mark.slow
def test_killed_and_resumed_with_two_processes(group, unbroken, killed, rows, tmp_path):
    """Also after a signal to one ended both; bit by bit the unbroken run, to the end."""
    out = shutil.copytree(killed, tmp_path / "run")
    before = rows(out / "metrics.jsonl")[-1]["step"]
    started = group.start(out)
    wait_for_step(out, before + 2)
    started[1].send_signal(signal.SIGTERM)
    codes, outputs = group.end(started)
    assert codes == [143, 143], outputs
    assert 0 < gone_on(outputs[0]) <= before
    step = said_step("stopped at", outputs[0])
    assert (out / "checkpoints" / str(step)).is_dir()

    codes, outputs = group.end(group.start(out))
    assert codes == [0, 0], outputs
    assert gone_on(outputs[0]) == step
    expected = arrays(unbroken, STEPS)
    assert len([name for name in expected if "head" in name]) >= 8  # with the momentum
    for name, x in arrays(out, STEPS).items():
        assert x.tobytes() == expected[name].tobytes(), name
    got, expected = (rows(path / "metrics.jsonl") for path in (out, unbroken))
    assert len({tuple(row.get("perturbed", ())) for row in expected}) > 1
    for row in got + expected:
        for name in ("seconds", "compile_seconds"):
            row.pop(name, None)
    assert got == expected


@pytest.mark.slow
def test_killed_and_resumed_with_one_process(group, unbroken, killed, rows, tmp_path):
    """Sums are taken in another order; twenty steps on it is the same run."""
    out = shutil.copytree(killed, tmp_path / "run")
    (code,), (output,) = group.alone(out)
    assert code == 0, output
    began = gone_on(output)
    assert began % EVERY == 0
    assert began + ON <= STEPS
    by_step = lambda path: {
        row["step"]: row
        for row in rows(path / "metrics.jsonl")
        if row["kind"] == "train"
    }
    got, expected = by_step(out), by_step(unbroken)
    for step in range(began + 1, began + ON + 1):
        one, other = got[step], expected[step]
        assert one["perturbed"] == other["perturbed"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["norms"] == pytest.approx(other["norms"], rel=1e-2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--process-id", 1], "without --coordinator and --num-processes"),
        (["--coordinator", "a:1", "--num-processes", 2], "without --process-id"),
        (
            ["--coordinator", "a:1", "--process-id", 2, "--num-processes", 2],
            "ids are from 0 to 1",
        ),
        (["--distributed", "--process-id", 4, "--num-processes", 3], "from 0 to 2"),
    ],
)
def test_options_that_do_not_go_together(options, said, capsys):
    assert main(["train", *map(str, options)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--coordinator", "here"], ["--coordinator", "a:0"], ["--process-id", "-1"]],
)
def test_options_that_cannot_be_read(options, capsys):
    with pytest.raises(SystemExit):
        main(["train", *options])
    assert "expected" in capsys.readouterr().err


def test_where_there_is_no_cluster_the_remedy_is_named(command, tmp_path):
    process = command.start("train", "--distributed", "--out", tmp_path)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, output
    assert "--coordinator HOST:PORT" in output
    assert "Traceback" not in output


class Thread(Processes):
    """One of two processes that are threads of this one."""

    def __init__(self, index, barrier, said):
        super().__init__(index, 2)
        self._barrier, self._said = barrier, said

    def gather(self, text):
        self._said[self.index] = text
        self._barrier.wait(30)
        found = list(self._said)
        self._barrier.wait(30)
        return found


def in_two(run):
    """What two processes return, or raise."""
    barrier, said = threading.Barrier(2), ["", ""]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run, Thread(i, barrier, said)) for i in (0, 1)]
    return [future.exception() or future.result() for future in both]


def fail():
    raise UserError("no room")


def test_where_one_process_fails_all_do():
    assert ALONE.first(lambda: 3) == 3
    with pytest.raises(UserError, match="^no room$"):
        ALONE.first(fail)
    assert (
        in_two(lambda p: p.first(lambda: {"index": [p.index]})) == [{"index": [0]}] * 2
    )
    for error in in_two(lambda p: p.first(fail)):
        assert isinstance(error, SharedError)
        assert str(error) == "no room"

    def the_second(processes):
        with processes.together():
            if processes.index:
                fail()

    assert [str(e) for e in in_two(the_second)] == ["process 1: no room"] * 2


def test_processes_that_differ_are_refused():
    assert in_two(lambda p: p.same({"k": 1})) == [None, None]
    for error in in_two(lambda p: p.same({"seed": 7, "k": 3 + p.index})):
        assert isinstance(error, SharedError)
        assert "k differs between processes: 3 in process 0, 4 in process 1" in str(
            error
        )


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lwsam_bench.support.processes._VISIBLE_AFTER", 0.0)
    (tmp_path / "1").mkdir()
    assert in_two(lambda p: p.share_folder(tmp_path)) == [None, None]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    own = lambda p: tmp_path / "1" if p.index else tmp_path
    for error in in_two(lambda p: p.share_folder(own(p))):
        assert isinstance(error, SharedError)
        assert "that all processes share" in str(error)


class Reader(Checkpoints):
    """Checkpoints of which one process cannot read some."""

    def __init__(self, folder, processes, broken):
        super().__init__(folder)
        self._processes, self._broken = processes, broken

    def restore(self, step, template):
        if step in self._broken:
            raise self._damaged(step, "torn")
        return super().restore(step, template)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (([], []), 2),
        (([2], [2]), 1),
        (([2], []), 1),
        (([], [2]), None),
        (([1, 2],) * 2, 0),
    ],
    ids=["none", "both", "the first", "the second", "all"],
)
def test_all_processes_take_the_same_checkpoint(broken, expected, tmp_path):
    """Set aside is what the first one cannot read; what only others cannot stops all."""
    folder, state = tmp_path / "checkpoints", {"w": jnp.arange(3.0)}
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
    told = [[], []]

    def restored(processes):
        index = processes.index
        with Reader(folder, processes, broken[index]) as reader:
            found = reader.restore_newest(state, told[index].append)
        assert found is not None
        return found[0]

    found = in_two(restored)
    moved = expected == 1
    assert (tmp_path / "damaged-2").is_dir() == moved
    assert (folder / "2").is_dir() != moved
    assert [len(lines) for lines in told] == [int(moved)] * 2
    if expected:
        assert found == [expected] * 2
        return
    message = "torn" if expected == 0 else "process 1: .*though process 0 can read it"
    for error in found:
        assert isinstance(error, SharedError)
        assert re.match(f".*{message}", str(error))


def test_a_batch_is_cut_evenly_or_refused():
    devices = jax.devices()[:3]
    processes = Processes(mesh=Mesh(np.array(devices), ("data",)))
    assert processes.rows(6) is None
    with pytest.raises(UserError, match="--batch-size 8 .* a multiple of 3"):
        processes.rows(8)


@pytest.mark.parametrize("kind", [Batches, HostBatches])
def test_a_share_of_a_batch_is_what_it_is_in_the_whole(kind):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    split = splits.Split(images, np.arange(12, dtype=np.int32))
    options: dict[str, Any] = {
        "mean": np.zeros(3, np.float32),
        "std": np.ones(3, np.float32),
    }
    options |= {"batch_size": 6, "seed": 3, "augment": True}
    own = np.array([1, 2, 5])
    whole, share = kind(split, **options), kind(split, **options, own=own)
    for step in range(3):
        for name, x in share(step).items():
            np.testing.assert_array_equal(x, whole(step)[name][own])


def test_a_share_of_a_text_is_what_it_is_in_the_whole():
    characters = np.arange(100, dtype=np.uint8)
    own = np.array([0, 3])
    options: dict[str, Any] = {"batch_size": 4, "length": 5, "seed": 1}
    whole = text.TextBatches(characters, **options)
    share = text.TextBatches(characters, **options, own=own)
    np.testing.assert_array_equal(share(2)["text"], whole(2)["text"][own])
    np.testing.assert_array_equal(share(2)["next"], whole(2)["next"][own])


def test_each_promise_of_the_page_has_a_test_that_is_there():
    page = (ROOT / "docs" / "hosts.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 8
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name
