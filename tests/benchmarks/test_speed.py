"""`lwsam-bench speed`: what it measures, and what its check finds missing."""

import dataclasses
import inspect
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

import lwsam_jax as lwsam
from lwsam_bench import cli_cost, docs_page, speed, speed_report, text, workloads
from lwsam_bench._errors import UserError
from lwsam_bench.models.gpt import GPT
from lwsam_bench.racers import budget, everyone, OPTAX_SAM, PAPER, SGD
from lwsam_bench.speed_race import Lane, race, timing


SMALL = budget(0.10)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A few steps of three methods on the digits; the folder of the results."""
    out = tmp_path_factory.mktemp("speed")
    config = dataclasses.replace(
        speed.SMOKE, only={SGD: 4, OPTAX_SAM: 4, SMALL: 4}, burst=2
    )
    console = Console(file=io.StringIO(), width=200)
    assert speed.run(config, None, str(out), None, console) == 0
    return out


def test_rows_hold_every_figure(measured):
    rows = [json.loads(x) for x in (measured / "speed.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == [SGD, OPTAX_SAM, SMALL]
    sgd, sam, small = rows
    for name in ("flops", "flops_xla", "time", "memory"):
        assert sgd[name] == pytest.approx(1.0)
        assert small[name] > 0
    assert sam["flops"] == 2.0
    assert sam["flops_xla"] == pytest.approx(2.0, abs=0.05)
    # The digits' last layers cost less than a tenth.
    assert 1.0 < small["flops"] <= small["flops_most"] <= 1.1
    assert small["flops_xla"] == pytest.approx(small["flops"], abs=0.03)
    assert small["executables"] == len(small["programs"]) == 1
    assert small["programs"][0]["steps"] == 4
    assert small["layers"] == len(small["layer_names"]) == 10
    assert [bits.bit_count() > 0 for bits in small["selections"]] == [True] * 4
    assert 0 < small["host_us"] < 1e5
    assert sgd["host_us"] is None
    assert small["burst"] == 2
    assert small["origin"]["packages"]["jax"] == jax.__version__
    assert small["data"].startswith("digits")


def test_table_and_chart_are_written(measured):
    table = (measured / "speed-table.md").read_text()
    assert table.startswith("### small CNN, batch 8")
    assert all(f"| {method} |" in table for method in (SGD, OPTAX_SAM, SMALL))
    assert (measured / "speed-smallcnn.png").read_bytes().startswith(b"\x89PNG")


def test_tables_come_from_the_rows_alone(measured, tmp_path):
    """Rows of another model stay; the documentation has what the folder has."""
    row = json.loads((measured / "speed.jsonl").read_text().splitlines()[0])
    lines = [{**row, "model": "gpt", "unit": "tokens"}, row]
    (tmp_path / "speed.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    (tmp_path / "images").mkdir()
    page = tmp_path / "cost.md"
    page.write_text(
        "# Cost\n\n{}\n\nold\n{}\n\nend\n".format(*docs_page.marks("speed"))
    )
    console = Console(file=io.StringIO(), width=200)
    arguments = (speed.SMOKE, None, str(tmp_path), str(tmp_path), console)
    assert speed.run(*arguments, render_only=True) == 0
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
        speed.run(*arguments, render_only=True)


def test_methods_are_those_of_the_table():
    labels = [racer.label for racer in everyone()]
    assert labels[0] == SGD
    assert len(labels) == len(set(labels)) == 9
    assert {OPTAX_SAM, PAPER, *map(budget, (0.05, 0.10, 0.25))} < set(labels)
    assert set(speed.CHECK.only) <= set(labels)


def test_command_line_knows_the_models():
    assert set(cli_cost.SPEED_MODELS) == set(workloads.WORKLOADS)
    assert set(speed.MODELS) < set(workloads.WORKLOADS)


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


def rows_of_a_check(**changes):
    row = {
        "flops": 1.05,
        "flops_most": 1.09,
        "flops_most_xla": 1.095,
        "flops_xla": 1.05,
        "time": 1.1,
        "memory": 1.02,
        "programs": [{}] * 20,
        "layers": 20,
        "waits": 0.01,
        "steps": 400,
        "host_us": 200.0,
    }
    rows = {
        OPTAX_SAM: {**row, "time": 1.8},
        SMALL: row,
        PAPER: {**row, "flops": 1.5, "flops_xla": 1.51},
    }
    for method, change in changes.items():
        rows[method] = {**rows[method], **change}
    return [{"method": method, **row} for method, row in rows.items()]


def test_check_passes_where_all_limits_are_kept():
    assert all(figure.holds for figure in speed_report.figures(rows_of_a_check()))


@pytest.mark.parametrize(
    ("method", "change"),
    [
        (SMALL, {"flops_most": 1.11}),
        (SMALL, {"flops_most_xla": 1.11}),
        (SMALL, {"time": 1.13}),
        (SMALL, {"time": float("nan")}),
        (OPTAX_SAM, {"time": 1.6}),
        (PAPER, {"flops_xla": 1.55}),
        (PAPER, {"flops": 1.7, "flops_xla": 1.7}),
        (PAPER, {"programs": [{}] * (20 + 1 + speed_report.EXACT_SETS + 1)}),
        (PAPER, {"waits": 0.02}),
        (SMALL, {"memory": 1.06}),
        (PAPER, {"memory": 1.16}),
        (PAPER, {"host_us": 301.0}),
    ],
)
def test_check_finds_a_broken_limit(method, change):
    figures = speed_report.figures(rows_of_a_check(**{method: change}))
    assert not all(figure.holds for figure in figures)
    assert "missed" in speed_report.figures_table(figures)


def test_the_cap_of_the_check_is_the_default_of_the_library():
    default = inspect.signature(lwsam.TrainStep).parameters["exact_sets"].default
    assert speed_report.EXACT_SETS == default


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
