"""`lwsam-bench pareto`: runs, resumption, the choice of radii, tables and sentences."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import optax
import pytest
from rich.console import Console

import lwsam_jax as lwsam
from lwsam_bench.commands import pareto as command
from lwsam_bench.comparison import pareto, pareto_report
from lwsam_bench.comparison.pareto_methods import configure, LADDER, METHODS
from lwsam_bench.pages import docs
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import read_rows
from lwsam_bench.training.methods import with_radius


CONFIG = pareto.ParetoConfig(
    datasets=("digits",),
    methods=pareto.choose_methods(("sgd", "max-0.10-all")),
    seeds=2,
    steps=3,
    ladder=(0.6, 0.9),
)


def run(out, config=CONFIG, **options):
    console = Console(file=io.StringIO(), width=200)
    assert pareto.run(config, None, str(out), None, console, **options) == 0
    return console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("pareto")
    run(out)
    return out


def test_each_run_is_a_row(finished):
    rows = list(read_rows(finished / "digits.jsonl"))
    runs = [(r["method"], r["phase"], r["rho"], r["seed"]) for r in rows]
    assert runs[:2] == [("sgd", "evaluation", None, s) for s in (0, 1)]
    assert sorted(runs[2:6]) == [
        ("max-0.10-all", "tuning", rho, seed)
        for rho in CONFIG.ladder
        for seed in pareto.TUNING_SEEDS["digits"]
    ]
    chosen = runs[6][2]
    assert runs[6:] == [("max-0.10-all", "evaluation", chosen, s) for s in (0, 1)]
    for row in rows:
        assert 0 <= row["test_accuracy"] <= 1
        assert row["overhead"] <= row["overhead_most"] <= 0.1
        assert row["task"]["label_noise"] == 0.4
        assert row["origin"]["packages"]["jax"]
    assert [row["overhead"] for row in rows[:2]] == [0, 0]
    # One train step serves all seeds and radii, which still cost the same on their own.
    assert [row["compile_seconds"] for row in rows[1:2] + rows[3:]] == [0] * 6
    assert rows[0]["executables"] == rows[1]["executables"] == 1


def test_an_interrupted_command_runs_what_is_missing(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    path = out / "digits.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])  # as a crash leaves it
    printed = run(out)
    assert printed.count("seed") == 1
    again = path.read_text().splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    result = lambda line: {
        k: v
        for k, v in json.loads(line).items()
        if "seconds" not in k and k != "origin"
    }
    assert result(again[-1]) == result(lines[-1])
    assert "seed" not in run(out)


def test_another_task_is_refused(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(UserError, match="steps: 3 -> 5"):
        run(out, dataclasses.replace(CONFIG, steps=5))


def test_rendering_trains_nothing(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "pareto.md").unlink()
    run(out, render_only=True)
    text = (out / "pareto.md").read_text()
    assert text == (finished / "pareto.md").read_text()
    assert "| SGD | – |" in text
    assert "- Up to 1.1 ×: **" in text
    assert (out / "images" / "pareto-digits.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_the_documentation_is_brought_up_to_date(finished, tmp_path):
    page = tmp_path / "pareto.md"
    page.write_text("# Title\n\n{}\nold\n{}\n\nend\n".format(*docs.marks("pareto")))
    rows = {"digits": list(read_rows(finished / "digits.jsonl"))}
    for _ in range(2):
        pareto_report.render(rows, tmp_path, str(tmp_path))
    text = page.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\nend\n")
    assert "old" not in text
    assert text.count("## Digits") == 1
    assert (tmp_path / "images" / "pareto-digits.png").exists()
    page.write_text("no marks")
    with pytest.raises(UserError, match="no page with the marks"):
        pareto_report.render(rows, tmp_path, str(tmp_path))


def test_methods():
    assert len({method.name for method in METHODS}) == len(METHODS)
    assert all(method.start is None or method.start in LADDER for method in METHODS)
    for method in METHODS:
        made = configure(method, 0.3)
        assert made.is_plain == (method.name == "sgd")
        assert made.max_overhead == method.max_overhead
        assert made.mean_overhead == method.mean_overhead
    with pytest.raises(UserError, match="unknown method nonsense"):
        pareto.choose_methods(["sgd", "nonsense"])


def test_command_line_knows_the_datasets():
    assert command.PARETO_DATASETS == tuple(pareto.TASKS)


def test_a_train_step_takes_its_radius_from_the_state():
    """As if the method had been made for it, and without compiling again."""

    def loss_fn(params, model_state, batch, key):
        return jnp.sum((params["w"] @ batch) ** 4), (model_state, {})

    def make(rho):
        method = configure(METHODS[1], rho)
        return lwsam.TrainStep(loss_fn, optax.sgd(0.01), method)

    def train(step, rho):
        params = {"w": jnp.eye(3)}
        batch = jnp.full((3, 2), 0.3)
        state = step.init(params, {}, batch, key=jax.random.key(0))
        state = with_radius(state, rho)
        for _ in range(3):
            state, info = step(state, batch)
        assert float(info.rho) == pytest.approx(rho)
        return state.params["w"]

    shared = make(1.0)
    for rho in (0.1, 0.2, 0.4):
        own = train(make(rho), rho)
        assert jnp.array_equal(train(shared, rho), own)
    assert len(shared.executables) == 1


@pytest.mark.parametrize("peak", range(6))
@pytest.mark.parametrize("start", [0.1, 0.32, 2.0])
def test_the_climb_ends_on_the_peak(peak, start):
    ladder = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
    looked = []

    def measure(rho):
        looked.append(rho)
        return -abs(ladder.index(rho) - peak)

    assert pareto.climb(ladder, start, measure) == ladder[peak]
    assert len(looked) == len(set(looked))


def test_a_radius_that_diverges_is_no_good():
    row = lambda accuracy, diverged: {
        "validation_accuracy": accuracy,
        "diverged": diverged,
    }
    good, bad = [row(0.5, False)], [row(0.9, True)]
    assert pareto.merit(good) > pareto.merit(bad)


def summary(label, family, price, *accuracies):
    return pareto_report.Summary(
        label=label,
        family=family,
        rho=0.3,
        accuracy=dict(enumerate(accuracies)),
        price=price,
        diverged=0,
    )


SGD = summary("SGD", "SGD", 1.0, 0.70, 0.72)
SAM = summary("SAM", pareto_report.SAM, 2.0, 0.90, 0.92)
OURS = summary("ours", "layer-wise", 1.302, 0.80, 0.83)


def test_the_winner_is_named_whoever_it_is():
    say = lambda *args: pareto_report.winner(args, 2.0)
    assert say(SGD, OURS, SAM) == (
        "Up to 2 ×: **SAM**, 91.0 ± 1.0 % at 2.00 ×. The best of layer-wise SAM is ours,"
        " 81.5 ± 1.5 % at 1.30 ×: 9.5 ± 0.5 points less."
    )
    text = pareto_report.winner([SGD, OURS, SAM], 1.3)
    assert text.startswith("Up to 1.3 ×: **ours**, 81.5 ± 1.5 % at 1.30 ×.")
    assert "The best of SAM or SGD is SGD" in text
    assert pareto_report.winner([SGD], 1.1) == (
        "Up to 1.1 ×: **SGD**, 71.0 ± 1.0 % at 1.00 ×."
    )
    assert pareto_report.winner([SAM], 1.1) == "Up to 1.1 ×: nothing."


def test_a_lead_within_the_noise_is_called_that():
    close = summary("close", "layer-wise", 1.0, 0.74, 0.70)
    assert "within twice its standard error" in pareto_report.winner([SGD, close], 1.1)


def test_a_single_seed_has_no_standard_error():
    one, other = (
        summary("one", "SGD", 1.0, 0.7),
        summary("ours", "layer-wise", 1.0, 0.6),
    )
    text = pareto_report.winner([one, other], 1.1)
    assert text.endswith(": 10.0 points less.")
