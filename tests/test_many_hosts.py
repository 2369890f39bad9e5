"""TrainStep in two and four real processes on loopback, each with its own share."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from host_task import BATCHES, KEY_SEED, loss_fn, PARAMS
from plain import enable_x64


HERE = pathlib.Path(__file__).parent
SECONDS = 300  # for all cases of a group; one that hangs is ended
ALWAYS = ["other_batch", "numpy_shares"]
CASES = {
    2: [
        *ALWAYS,
        "global_arrays",
        "fully_sharded",
        "refreshed",
        "other_parameters",
        "other_selection",
        "alone",
        "pmap",
    ],
    4: [*ALWAYS, "local_arrays"],
}


@functools.cache
def group(processes):
    """What each process said; one group runs all its cases, for starting it is dear."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    started = []
    try:
        for i in range(processes):
            words = [HERE / "host_worker.py", i, processes, port, *CASES[processes]]
            started.append(
                subprocess.Popen(
                    [sys.executable, *map(str, words)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        outputs = [worker.communicate(timeout=SECONDS) for worker in started]
    finally:
        for worker in started:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    said = []
    for worker, (out, err) in zip(started, outputs, strict=True):
        lines = [json.loads(line) for line in out.splitlines() if line[:1] == "{"]
        assert worker.returncode == 0, err[-3000:]
        assert lines[-1]["case"] == "end", err[-3000:]
        said.append(lines)
    return said


def run(case, processes):
    """What each process said in a case, in order."""
    return [[x for x in lines if x["case"] == case] for lines in group(processes)]


@functools.cache
def one_process():
    method = lwsam.LayerwiseSAM(k=1, rho=0.3, alpha=0.7)
    with enable_x64(True):
        step = lwsam.TrainStep(loss_fn, optax.sgd(0.1, momentum=0.9), method)
        constants = (np.ones(3),)
        key = jax.random.key(KEY_SEED)
        state = step.init(PARAMS, {}, BATCHES[0], key=key, constants=constants)
        infos = []
        for batch in BATCHES:
            state, info = step(state, batch, *constants)
            infos.append((float(info.value), np.asarray(info.mask).tolist()))
    return jax.device_get(state.params), infos


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        ("numpy_shares", 2),
        ("numpy_shares", 4),
        ("global_arrays", 2),
        ("local_arrays", 4),
    ],
)
def test_processes_train_as_one(case, processes):
    """Typed and raw keys; NumPy, global and local arrays; the same selections."""
    params, infos = one_process()
    assert len({tuple(mask) for _, mask in infos}) > 1
    said = run(case, processes)
    for lines in said:
        *steps, last = lines
        for line, (value, mask) in zip(steps, infos, strict=True):
            np.testing.assert_allclose(line["value"], value, rtol=1e-9)
            assert line["mask"] == mask
            assert line["rows"] == 8
        for name, expected in params.items():
            np.testing.assert_allclose(last["params"][name], expected, rtol=1e-9)
        assert last["executables"] == said[0][-1]["executables"]


def test_parameters_may_be_sharded_over_processes():
    _, infos = one_process()
    for lines in run("fully_sharded", 2):
        assert [line["cut"] for line in lines] == [True] * len(infos)
        found = [line["value"] for line in lines]
        np.testing.assert_allclose(found, [value for value, _ in infos], rtol=1e-9)


def test_a_model_state_is_refreshed_by_all():
    for (line,) in run("refreshed", 2):
        np.testing.assert_allclose(line["value"], one_process()[1][0][0], rtol=1e-9)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_batch_that_differs_raises_in_every_process(processes):
    """By its shape, or where one process alone refuses its own; then they go on."""
    _, infos = one_process()
    for lines in run("other_batch", processes):
        first, second, after = lines
        assert "`batch` to be the same in every process" in first["error"]
        assert "process 1: ['x']: float64[" in first["error"]
        assert "`arguments`" in second["error"] or "`batch`" in second["error"]
        np.testing.assert_allclose(after["value"], infos[1][0], rtol=1e-9)


def test_parameters_that_differ_raise_in_every_process():
    """Else each would train a network of its own, in silence."""
    for params, key, batch in run("other_parameters", 2):
        assert "`params` to be the same in every process" in params["error"]
        assert "['out']: float64[8, 4]" in params["error"]
        assert "`key` to be the same in every process" in key["error"]
        assert "`arguments`" in batch["error"]
        assert "divisible by the 4 devices" in batch["error"]


def test_a_selection_that_differs_raises_in_every_process():
    for (line,) in run("other_selection", 2):
        assert "`selection` to be the same in every process" in line["error"]


def test_a_mesh_of_one_process_asks_nobody():
    (line,), nobody = run("alone", 2)
    np.testing.assert_allclose(line["value"], one_process()[1][0][0], rtol=1e-9)
    assert not nobody


def test_pmap_in_several_processes_raises():
    for (line,) in run("pmap", 2):
        assert "Mesh" in line["error"]
