"""`lwsam-bench speed`: what it measures, and what its check finds missing."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from lwsam_bench.commands.measures import speed as command
from lwsam_bench.data import text
from lwsam_bench.models.gpt import GPT
from lwsam_bench.pages import docs
from lwsam_bench.speed import flops, limits, prices, workloads
from lwsam_bench.speed.race import Lane, race, timing
from lwsam_bench.speed.racers import (
    budget,
    everyone,
    MOMENTUM_SAM,
    NOISE,
    OPTAX_SAM,
    PAPER,
    PERTURBED,
    SAM_TENTH,
    SGD,
    TENTH,
)
from lwsam_bench.support.errors import UserError


SMALL = budget(0.10)
METHODS = (SGD, OPTAX_SAM, SMALL, TENTH, NOISE)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A few steps of some methods on the digits; the folder of the results."""
    out = tmp_path_factory.mktemp("speed")
    config = dataclasses.replace(prices.SMOKE, only=dict.fromkeys(METHODS, 4), burst=2)
    console = Console(file=io.StringIO(), width=200)
    assert prices.run(config, None, str(out), None, console) == 0
    return out


def test_rows_hold_every_figure(measured):
    rows = [json.loads(x) for x in (measured / "speed.jsonl").read_text().splitlines()]
    assert tuple(row["method"] for row in rows) == METHODS
    sgd, sam, small, tenth, noise = rows
    for name in ("flops", "flops_xla", "time", "memory"):
        assert sgd[name] == pytest.approx(1.0)
        assert small[name] > 0
    assert sam["flops"] == 2.0
    assert sam["flops_xla"] == pytest.approx(2.0, abs=0.05)
    # The digits' last layers cost less than a tenth.
    assert 1.0 < small["flops"] <= small["flops_most"] <= 1.1
    assert small["flops_xla"] == pytest.approx(small["flops"], abs=0.03)
    assert small["executables"] == len(small["programs"])
    assert sum(program["steps"] for program in small["programs"]) == 4
    assert small["layers"] == len(small["layer_names"]) == 10
    assert [bits.bit_count() > 0 for bits in small["selections"]] == [True] * 4
    assert 0 < small["host_us"] < 1e5
    assert sgd["host_us"] is noise["host_us"] is None
    # One of ten images, and no gradient at all.
    assert 1.0 < tenth["flops"] <= tenth["flops_most"] <= 1.1
    assert noise["flops"] == 1.0
    assert 1.0 <= noise["flops_xla"] < 1.3  # to draw it counts in a network so small
    assert small["burst"] == 2
    assert small["origin"]["packages"]["jax"] == jax.__version__
    assert small["data"].startswith("digits")


def test_table_and_chart_are_written(measured):
    table = (measured / "speed-table.md").read_text()
    assert table.startswith("### small CNN, batch 10")
    assert all(f"| {method} |" in table for method in METHODS)
    assert (measured / "speed-smallcnn.png").read_bytes().startswith(b"\x89PNG")


def test_tables_come_from_the_rows_alone(measured, tmp_path):
    """Rows of another model stay; the documentation has what the folder has."""
    row = json.loads((measured / "speed.jsonl").read_text().splitlines()[0])
    lines = [{**row, "model": "gpt", "unit": "tokens"}, row]
    (tmp_path / "speed.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    (tmp_path / "images").mkdir()
    page = tmp_path / "cost.md"
    page.write_text("# Cost\n\n{}\n\nold\n{}\n\nend\n".format(*docs.marks("speed")))
    console = Console(file=io.StringIO(), width=200)
    arguments = (prices.SMOKE, None, str(tmp_path), str(tmp_path), console)
    assert prices.run(*arguments, render_only=True) == 0
    text = page.read_text()
    shown = [line for line in text.splitlines() if not line.startswith("![")]
    told = (tmp_path / "speed-table.md").read_text().splitlines()
    assert [x for x in told if x] == [x for x in shown if x in told and x]
    for model in ("gpt", "smallcnn"):
        assert f"](images/speed-{model}.png)" in text
        assert (tmp_path / "images" / f"speed-{model}.png").stat().st_size > 1000
    assert text.index("### GPT") < text.index("### small CNN") < text.index("end")
    assert "old" not in text
    page.write_text("no marks")
    with pytest.raises(UserError, match="generated: speed"):
        prices.run(*arguments, render_only=True)


def test_methods_are_those_of_the_table():
    labels = [racer.label for racer in everyone()]
    assert labels[0] == SGD
    assert len(labels) == len(set(labels)) == 14
    assert {OPTAX_SAM, PAPER, *map(budget, (0.05, 0.10, 0.25))} < set(labels)
    assert {TENTH, SAM_TENTH, MOMENTUM_SAM, PERTURBED, NOISE} < set(labels)


def test_the_check_runs_what_has_a_limit():
    config = prices.check()
    assert set(config.only) == set(limits.METHODS)
    assert set(config.only) <= {racer.label for racer in everyone()}
    assert config.only[PAPER] == 400
    assert {config.only[name] for name in limits.TIMED} == {50}
    assert prices.check(80).only == {**dict.fromkeys(limits.TIMED, 10), PAPER: 80}


def test_command_line_knows_the_models():
    assert set(command.SPEED_MODELS) == set(workloads.WORKLOADS)
    assert set(prices.MODELS) < set(workloads.WORKLOADS)


@pytest.mark.parametrize(
    "arguments",
    [("--models", "vgg"), ("--smoke", "--steps", "3"), ("--check", "--models", "gpt")],
)
def test_arguments_that_make_no_sense(command, arguments):
    code, output = command.run("speed", *arguments)
    assert code == 2
    assert "--models" in output
    assert "Traceback" not in output


def test_missing_data_is_the_users_to_fetch(command, tmp_path):
    arguments = ("--models", "gpt", "--data-dir", tmp_path, "--out", tmp_path / "out")
    code, output = command.run("speed", *arguments)
    assert code == 2
    assert "tiny_shakespeare is not in" in output


class FakeRacer:
    """A method whose steps take a given time; the clock is the test's."""

    def __init__(self, clock, seconds, compiles_at=()):
        self._clock, self._seconds, self._compiles = clock, seconds, compiles_at
        self.compile_seconds, self.steps = 0.0, []

    def step(self, batch):
        if batch in self._compiles:
            self._clock[0] += 100.0
            self.compile_seconds += 100.0
        self._clock[0] += self._seconds[batch % len(self._seconds)]
        self.steps.append(batch)
        return ()

    def note(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("burst", [1, 10])
def test_blocks_of_steps_are_compared(clock, burst):
    """Every second step costs double: the ratio is that of the sums, not of a step."""
    base = Lane(FakeRacer(clock, [1.0]), 60)
    other = Lane(FakeRacer(clock, [2.0, 1.0], compiles_at=(0, 27, 55)), 40)
    rounds = []
    race([base, other], lambda step: step, burst, rounds.append)
    assert rounds[-1] == 60
    assert base.racer.steps == [*range(60)]
    assert other.racer.steps == [*range(40)]  # it runs fewer, and never reaches 55
    found = timing(other, base)
    assert found.ratio == pytest.approx(1.5, abs=0.03)
    assert found.seconds == pytest.approx(1.5, abs=0.05)
    # One step in the second half waited; in bursts, so do those beside it.
    assert found.waits == (1 if burst == 1 else 10) / 20
    assert timing(base, base).ratio == 1.0


def test_blocks_of_whole_periods_are_exact(clock):
    """An ascent in every third step: blocks of ten have three of them, or four."""
    base = Lane(FakeRacer(clock, [1.0]), 60)
    other = Lane(FakeRacer(clock, [2.0, 1.0, 1.0]), 60)
    race([base, other], lambda step: step, 1, lambda done: None)
    assert timing(other, base, 12).ratio == pytest.approx(4 / 3)
    assert timing(other, base, 12).quartiles == pytest.approx((4 / 3, 4 / 3))


def test_time_is_unknown_where_all_steps_compiled(clock):
    base = Lane(FakeRacer(clock, [1.0]), 4)
    other = Lane(FakeRacer(clock, [1.0], compiles_at=range(4)), 4)
    race([base, other], lambda step: step, 1, lambda done: None)
    assert np.isnan(timing(other, base).ratio)


def rows_of_a_check(price=None, **changes):
    row = {
        "flops": 1.05,
        "flops_most": 1.09,
        "flops_most_xla": 1.095,
        "flops_xla": 1.05,
        "time": 1.1,
        "memory": 1.02,
        "programs": [{}] * 9,
        "compile_seconds": 90.0,
        "waits": 0.01,
        "steps": 400,
        "host_us": 200.0,
    }
    rows = {
        SGD: row,
        OPTAX_SAM: {**row, "time": 1.8},
        SMALL: row,
        TENTH: row,
        MOMENTUM_SAM: {**row, "time": 1.01},
        PERTURBED: {**row, "time": 1.01},
        NOISE: {**row, "time": 1.04},
        PAPER: {**row, "flops": 1.79, "flops_xla": 1.8},
    }
    for method, change in changes.items():
        rows[method] = {**rows[method], **change}
    found = [{"kind": "speed", "method": x, **row} for x, row in rows.items()]
    prices = {"last layer (dense)": 1.0, "dense + last conv": 1.0352}
    prices |= {
        "third stage + dense": 1.2837,
        "all (SAM's cost)": 1.9992,
        **(price or {}),
    }
    return found + [
        {"kind": "price", "case": case, "flops_xla": x} for case, x in prices.items()
    ]


def test_check_passes_where_all_limits_are_kept():
    assert all(figure.holds for figure in limits.figures(rows_of_a_check()))


@pytest.mark.parametrize(
    ("method", "change"),
    [
        (SMALL, {"flops_most": 1.11}),
        (SMALL, {"flops_most_xla": 1.11}),
        (SMALL, {"time": 1.13}),
        (SMALL, {"time": float("nan")}),
        (OPTAX_SAM, {"time": 1.6}),
        (PAPER, {"flops_xla": 1.55}),
        (PAPER, {"flops": 1.83, "flops_xla": 1.83}),
        (PAPER, {"programs": [{}] * 13}),
        (PAPER, {"compile_seconds": 126.0}),
        (PAPER, {"waits": 0.02}),
        (SMALL, {"memory": 1.06}),
        (PAPER, {"memory": 1.16}),
        (PAPER, {"host_us": 301.0}),
        (TENTH, {"time": 1.11}),
        (TENTH, {"time": None}),  # as a file has it
        (TENTH, {"flops_most": 1.12}),
        (TENTH, {"flops_xla": 1.08}),
        (TENTH, {"memory": 1.04}),
        (MOMENTUM_SAM, {"time": 1.03}),
        (PERTURBED, {"time": 1.03}),
        (NOISE, {"time": 1.06}),
        ("price", {"dense + last conv": 1.0361}),
    ],
)
def test_check_finds_a_broken_limit(method, change):
    figures = limits.figures(rows_of_a_check(**{method: change}))
    assert not all(figure.holds for figure in figures)
    assert "missed" in limits.table(figures)


def test_a_check_is_rows_and_a_verdict(measured, tmp_path, monkeypatch):
    """All but the measuring itself: the rows are those of another race."""
    row = json.loads((measured / "speed.jsonl").read_text().splitlines()[2])
    fine = {"time": 1.0, "host_us": 100.0, "memory": 1.0, "flops_xla": row["flops"]}
    rows = [{**row, **fine, "method": name} for name in limits.METHODS]
    rows[1]["time"] = 1.8
    monkeypatch.setattr(prices, "measure", lambda *args: rows)
    result = lambda case: flops.Result(case, 1, 1.0)
    monkeypatch.setattr(flops, "measure", lambda batch_size, cases: map(result, cases))
    config = dataclasses.replace(prices.check(8), models=("smallcnn",), batch_size=10)
    console = Console(file=io.StringIO(), width=200)
    run = lambda **more: prices.run(config, None, str(tmp_path), None, console, **more)
    assert run() == 0
    text = (tmp_path / "speed-check-table.md").read_text()
    assert "| last layer (dense): FLOPs | 1 | ≤ 1.0005 | kept |" in text
    assert f"| {NOISE}: time | 1 | ≤ 1.05 | kept |" in text
    assert run(render_only=True) == 0
    assert (tmp_path / "speed-check-table.md").read_text() == text
    rows[1]["time"] = 1.4
    assert run() == 1
    assert "**missed**" in (tmp_path / "speed-check-table.md").read_text()


def test_rows_of_an_earlier_check_are_no_check():
    rows = [row for row in rows_of_a_check() if row.get("method") != TENTH]
    with pytest.raises(UserError, match=f"missing: {TENTH}"):
        limits.figures(rows)


def test_text_batches_follow_from_seed_and_step():
    characters = np.arange(50, dtype=np.uint8)
    make = lambda seed: text.TextBatches(characters, batch_size=4, length=6, seed=seed)
    batch = make(0)(3)
    assert batch["text"].shape == batch["next"].shape == (4, 6)
    np.testing.assert_array_equal(batch["next"], batch["text"] + 1)
    np.testing.assert_array_equal(batch["text"], make(0)(3)["text"])
    assert (make(0)(4)["text"] != batch["text"]).any()
    assert (make(1)(3)["text"] != batch["text"]).any()


def test_a_gpt_learns_from_text():
    source = text.Text(np.tile(np.arange(5, dtype=np.uint8), 40), 5, "test")
    model = GPT(5, context=8, width=16, depth=1, heads=2, rngs=nnx.Rngs(0))
    workload = workloads.gpt_workload(source, model, batch_size=4, seed=0, length=8)
    assert workload.items == 32
    gradient = jax.jit(jax.value_and_grad(workload.loss_fn, has_aux=True))
    params, model_state, batch, key = workload.args()
    opt_state = workload.optimizer.init(params)
    values = []
    for _ in range(15):
        (value, (_, metrics)), grads = gradient(params, model_state, batch, key)
        updates, opt_state = workload.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        values.append(float(value))
    assert values[0] == pytest.approx(np.log(5), abs=0.3)
    assert values[-1] < 0.9 * values[0]
    assert 0 <= float(metrics["accuracy"]) <= 1


@pytest.mark.slow
def test_real_text(data_dir):
    source = text.load(str(data_dir))
    assert len(source.characters) == 1_003_854
    assert source.vocabulary == 65
    assert source.characters.max() == 64
    batch = text.TextBatches(source.characters, batch_size=2, length=9, seed=0)(0)
    assert batch["text"].dtype == jnp.int32
