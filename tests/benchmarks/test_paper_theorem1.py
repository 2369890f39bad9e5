"""`theorem1`: true constants, the paper's Algorithm 1, a plain verdict."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from lwsam_bench.paper.request import Request
from lwsam_bench.paper.theorem1 import bound as theorem1, report
from lwsam_bench.paper.theorem1.problem import batch_loss, LAYERS, Problem, WIDTH
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.row_lock import row_lock


LENGTH = theorem1.Length(steps=30, seeds=2)
SIZE = LAYERS * WIDTH


@pytest.fixture(scope="module")
def problem():
    return Problem.make()


@pytest.fixture(scope="module")
def simulation(problem):
    return theorem1.Simulation(problem)


def points(number, spread=3.0):
    return spread * np.random.default_rng(0).standard_normal((number, SIZE))


def gradient(problem, w, rows=slice(None)):
    """The mean gradient of samples in float64, from the definition."""
    a = problem.features.reshape(-1, SIZE).astype(np.float64)[rows]
    t = a @ w - problem.labels[rows]
    return (2 * t / (1 + t**2) ** 2) @ a / len(a)


def test_measure_agrees_with_jax(problem):
    for w in points(3):
        params = {
            f"layer{i + 1}": x.astype(np.float32)
            for i, x in enumerate(w.reshape(LAYERS, WIDTH))
        }
        value, grads = jax.value_and_grad(batch_loss)(
            params, problem.features, problem.labels
        )
        found = problem.measure(w)
        squared_norm = sum(float(np.vdot(g, g)) for g in grads.values())
        assert found["loss"] == pytest.approx(float(value), rel=1e-5)
        assert found["squared_norm"] == pytest.approx(squared_norm, rel=1e-4)
        own = np.stack([gradient(problem, w, [i]) for i in range(len(problem.labels))])
        variance = np.sum((own - own.mean(axis=0)) ** 2, axis=1).mean()
        assert found["variance"] == pytest.approx(variance)


def test_hessian_agrees_with_finite_differences(problem):
    w = points(1, spread=0.5)[0]
    step = 1e-5
    for sample in (0, 100):
        columns = [
            gradient(problem, w + e, [sample]) - gradient(problem, w - e, [sample])
            for e in step * np.eye(SIZE)
        ]
        expected = np.stack(columns, axis=1) / (2 * step)
        np.testing.assert_allclose(problem.hessian(w, sample), expected, atol=1e-8)


def largest(matrix):
    """The spectral norm, by power iteration."""
    v = np.ones(len(matrix))
    for _ in range(60):
        v = matrix @ v
        v /= max(np.linalg.norm(v), 1e-300)
    return np.linalg.norm(matrix @ v)


def test_beta_bounds_every_hessian_and_is_reached(problem):
    found = [
        largest(problem.hessian(w, sample))
        for w in points(20, spread=1.0)
        for sample in range(0, 256, 16)
    ]
    assert max(found) <= problem.beta * (1 + 1e-12)
    rows = problem.features.reshape(-1, SIZE).astype(np.float64)
    steepest = int(np.argmax(np.sum(rows**2, axis=1)))
    row = rows[steepest]
    w = problem.labels[steepest] * row / (row @ row)  # its residual is 0
    assert largest(problem.hessian(w, steepest)) == pytest.approx(problem.beta)


def test_sigma_bounds_the_variance_even_where_it_is_sought(problem):
    ws = np.concatenate([points(200, spread) for spread in (0.3, 1.0, 3.0, 10.0)])
    # Hill climbing with random steps, from the best of many points.
    ws = ws[np.argsort(problem.measure(ws)["variance"])[-20:]]
    rng = np.random.default_rng(1)
    for _ in range(100):
        tries = ws + 0.1 * rng.standard_normal(ws.shape)
        better = problem.measure(tries)["variance"] > problem.measure(ws)["variance"]
        ws = np.where(better[:, None], tries, ws)
    most = problem.measure(ws)["variance"].max()
    assert 0.4 * problem.sigma2 < most <= problem.sigma2


@pytest.mark.parametrize(("x", "y"), [(0.5, 0.5), (0.25, 0.5), (0.25, 0.05)])
@pytest.mark.parametrize("layers", [(), (0,), (1, 4), tuple(range(LAYERS))])
def test_a_step_descends_as_the_mended_proof_says(problem, x, y, layers):
    """The inequality of the module, with the expectation over batches of one sample."""
    r, eta = x / problem.beta, y / problem.beta
    chosen = np.isin(np.arange(LAYERS), layers).repeat(WIDTH)
    for w in points(5, spread=1.0):
        after = []
        for sample in range(len(problem.labels)):
            moved = w + r * chosen * gradient(problem, w, [sample])
            after.append(w - eta * gradient(problem, moved, [sample]))
        now = problem.measure(w)
        bound = (
            now["loss"]
            - eta / 2 * (1 - 2 * x * (1 - y * (1 - x))) * now["squared_norm"]
            + eta * (y + x**2) * problem.sigma2
        )
        assert problem.measure(np.array(after))["loss"].mean() <= bound


@pytest.mark.parametrize("k", [0, 2, LAYERS])
def test_simulation_is_algorithm_1(problem, simulation, k):
    """Against the paper's lines 4 to 9 in float64, on the same batches."""
    size, seed = 0.25, 1
    found = simulation(k, size, LENGTH)[seed]
    w = problem.start.reshape(-1).astype(np.float64)
    norms = np.zeros(LAYERS)
    squares, losses = [], [problem.measure(w)["loss"]]
    for step in range(LENGTH.steps):
        key = jax.random.fold_in(jax.random.key(seed), step)
        rows = jax.random.randint(key, (theorem1.BATCH_SIZE,), 0, len(problem.labels))
        squares.append(problem.measure(w)["squared_norm"])
        # On a tie, as in step 0, the deeper layer.
        order = sorted(range(LAYERS), key=lambda i: (norms[i], i), reverse=True)
        chosen = np.isin(np.arange(LAYERS), order[:k]).repeat(WIDTH)
        ascent = gradient(problem, w, np.asarray(rows))
        descent = gradient(problem, w + size * chosen * ascent, np.asarray(rows))
        w = w - size * descent
        norms = np.linalg.norm(descent.reshape(LAYERS, WIDTH), axis=1)
        losses.append(problem.measure(w)["loss"])
    horizons = found["horizons"]
    assert horizons[0] == 1
    assert horizons[-1] == LENGTH.steps
    means = np.cumsum(squares) / np.arange(1, LENGTH.steps + 1)
    np.testing.assert_allclose(
        found["mean_squared_norm"], means[np.array(horizons) - 1], rtol=1e-4
    )
    assert found["first_loss"] == pytest.approx(losses[0])
    np.testing.assert_allclose(found["loss"], [losses[h] for h in horizons], rtol=1e-4)


def test_a_run_of_several_chunks_is_one_run(simulation, monkeypatch):
    whole = simulation(2, 0.25, LENGTH)
    monkeypatch.setattr(theorem1, "_CHUNK", 12)  # which does not divide the length
    assert simulation(2, 0.25, LENGTH) == whole


def rows_above_and_below(loss):
    return [
        {
            "setting": "edge",
            "k": 0,
            "seed": seed,
            "problem": {"beta": 2.0, "sigma2": 0.5},
            "batch_size": 4,
            "steps": 10,
            "eta": 0.25,
            "r": 0.125,
            "horizons": [1, 10],
            "mean_squared_norm": [1.0, 0.4 + 0.2 * seed],
            "first_loss": 0.7,
            "loss": [0.6, loss],
            "most_variance": 0.3,
            "origin": {},
        }
        for seed in range(2)
    ]


@pytest.mark.parametrize(("loss", "holds"), [(0.5, True), (0.65, False)])
def test_the_verdict_follows_from_the_numbers(tmp_path, loss, holds):
    rows = rows_above_and_below(loss)
    # 4 / (10 / 4) (0.7 - E[L]) + 4 (1/2 + 1/16) 0.5 / 4
    expected = 1.6 * (0.7 - loss) + 0.28125
    assert report.bound(rows)[-1] == pytest.approx(expected)
    artefact = report.render(rows, {"edge": "edge"}, "smoke", tmp_path, "-")
    assert artefact.tables[0].rows[0][-1] == ("yes" if holds else "no")
    assert ("NOT below the bound for k = 0" in artefact.notes[0]) != holds


def run(out):
    console = Console(file=io.StringIO())
    artefact = theorem1.theorem1(Request("smoke", out, console, seeds=2, jobs=1))
    artefact.save(out)
    return artefact


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(theorem1.LENGTHS, "smoke", LENGTH)
    # The executable is that of the other tests.
    monkeypatch.setattr(theorem1, "provenance", lambda: {"commit": None})
    artefact = run(tmp_path)
    assert [len(table.rows) for table in artefact.tables] == [LAYERS + 1] * 2
    assert "is below the bound for every k" in artefact.notes[0]
    path = tmp_path / "theorem1.jsonl"
    rows = path.read_text()
    assert len(rows.splitlines()) == 2 * (LAYERS + 1) * 2
    # In the middle of a k, and of a line.
    path.write_text(rows[: rows.index("\n", len(rows) // 3) + 40])
    assert run(tmp_path) == artefact
    assert path.read_text() == rows
    assert json.loads((tmp_path / "theorem1.json").read_text())["name"] == "theorem1"
    assert (tmp_path / "theorem1.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes_cannot_write_one_file(tmp_path):
    with row_lock(tmp_path / "theorem1.jsonl"):
        with pytest.raises(UserError, match="another process is writing"):
            run(tmp_path)
    with row_lock(tmp_path / "theorem1.jsonl"):
        pass
