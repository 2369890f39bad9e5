"""The demo takes its recipes from rows, and says what is no difference."""

import dataclasses
import json

import pytest

from lwsam_bench.commands.cli import main
from lwsam_bench.front import committed, demo
from lwsam_bench.models import smallcnn
from lwsam_bench.tuning.report.summary import summarize
from lwsam_bench.tuning.tasks import TASKS


TASK = dataclasses.replace(TASKS["digits"], train_images=100, batch_size=20, noise=0.4)
CONFIG = {"lr": 0.05, "weight_decay": 1e-3, "steps": 4}


def row(method, draws, accuracy, *, seed=0, length=1.0, phase="final", **config):
    """A row as a tuning leaves it."""
    judged = {"accuracy": accuracy, "loss": 1.0, "ece": 0.1, "survival": {}}
    steps = round(CONFIG["steps"] * length)
    return {
        "kind": "run",
        "method": method,
        "draws": draws,
        "phase": phase,
        "trial": 5,
        "seed": seed,
        "length": length,
        "config": {**CONFIG, **config},
        "ranges": {},
        "validation": judged,
        "steps": steps,
        "price": 1.0,
        "gradients": float(steps),
        "cpu_seconds": 1.0,
        "last": judged,
        "selected": judged,
        "trials": 8,
        "task": dataclasses.asdict(TASK),
        "origin": {"packages": {"jax": "0"}, "platform": "cpu", "cores": 1},
    }


TUNED = [
    row("sgd", 0, 0.6),
    row("sgd", 0, 0.7, length=2.0),  # better: this is what runs
    row("sgd", 1, 0.7),
    row("sgd", 1, 0.6, length=2.0),
    row("sgd", 1, 0.9, phase="trial"),  # was not chosen
    row("momentum-relative", 0, 0.7, rho=0.03),
    row("momentum-relative", 1, 0.7, rho=0.05),
    row("random-relative", 0, 0.7, rho=0.03),  # not in the demo
]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The results of a demo of some steps with a network of four layers."""
    folder = tmp_path_factory.mktemp("demo")
    recipes = folder / "recipes.jsonl"
    recipes.write_text("".join(json.dumps(x) + "\n" for x in TUNED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lwsam_bench.support.cache.enable", lambda: None)
        patch.setattr(smallcnn, "BLOCKS", ((4, 1),))
        arguments = ["--out", str(folder), "--seeds", "2", "--rows", str(recipes)]
        assert main(["demo", *arguments]) == 0
    return folder


def test_every_recipe_runs_as_its_tuning_left_it(out, rows):
    made = rows(out / "demo-rows.jsonl")
    by_seed = {}
    for found in made:
        by_seed.setdefault(found["seed"], []).append(found)
    assert len(by_seed) == 2
    assert min(by_seed) >= demo.FIRST_SEED
    for some in by_seed.values():
        ran = [(x["method"], x["draws"], x["steps"], x["config"]) for x in some]
        assert ran == [
            ("sgd", 0, 8, CONFIG),
            ("sgd", 1, 4, CONFIG),
            ("momentum-relative", 0, 4, {**CONFIG, "rho": 0.03}),
            ("momentum-relative", 1, 4, {**CONFIG, "rho": 0.05}),
        ]
    assert all(x["last"]["accuracy"] and x["cpu_seconds"] > 0 for x in made)


def test_files(out):
    assert (out / "tuning-digits-noise40-batch20-sgd.png").exists()
    table = (out / "demo-table.md").read_text()
    header, _, first, second, *_ = table.splitlines()
    assert header.startswith("| method | gradients a step | tuning 1 | tuning 2 |")
    assert first.startswith("| SGD | 1.00 |")
    assert " | 8; 4 | " in first
    assert second.startswith("| momentum, relative | 1.00 |")
    assert "Digits, 40% noise, batch 20: 100 training images" in table
    assert "over 2 seeds that no tuning has seen" in table
    assert "The rows of the tuning, on 1 seed: **No method is ahead" in table


def test_what_is_ahead_by_luck_is_no_difference():
    made = [
        *(row("sgd", d, x, seed=s) for d in (0, 1) for s, x in enumerate((0.5, 0.6))),
        *(row("sam", 0, x, seed=s) for s, x in enumerate((0.8, 0.91))),
        *(row("sam", 1, x, seed=s) for s, x in enumerate((0.5, 0.62))),
    ]
    header, sgd, sam = demo._lines(made)
    assert header[-3:] == [
        "the worse, over SGD",
        "gradients a run",
        "CPU seconds",
    ]
    assert sgd[4:] == ["–", "4; 4", "1.0; 1.0"]
    assert sam[2:5] == ["85.5 ± 5.5", "56.0 ± 6.0", "+1.0 ± 1.0, no difference"]
    assert "in both tunings: no difference." in committed.verdict(made)
    better = [*made[:6], *(row("sam", 1, 0.9 + s / 10, seed=s) for s in (0, 1))]
    assert committed.verdict(better) == "Ahead of tuned SGD in both tunings: **SAM**."
    text = demo.markdown(made, better)
    assert text.index("no difference.**") < text.index("on 2 seeds: Ahead of tuned SGD")


def test_rows_that_are_not_there_are_named(tmp_path, capsys):
    path = tmp_path / "none.jsonl"
    assert main(["demo", "--out", str(tmp_path), "--rows", str(path)]) == 2
    assert f"{path} has no rows of a tuning" in capsys.readouterr().err
    text = {**TUNED[0], "task": dataclasses.asdict(TASKS["shakespeare"])}
    path.write_text(json.dumps(text) + "\n")
    assert main(["demo", "--out", str(tmp_path), "--rows", str(path)]) == 2
    assert "the demo is for images" in capsys.readouterr().err


def test_the_committed_recipes_are_complete():
    """Each method of the race has as many tunings as SGD, on all final seeds."""
    if not committed.RESULTS.exists():
        pytest.skip("installed without the results")
    rows = committed.tuned_rows(committed.RESULTS / committed.TUNING)
    found = {n: t for n, t in summarize(rows).items() if n in demo.METHODS}
    assert {"sgd", "sam", "micro-layers", "momentum-relative"} <= found.keys()
    for tuned in found.values():
        assert [t.draws for t in tuned] == [t.draws for t in found["sgd"]]
        assert max(seed for t in tuned for seed in t.rows) < demo.FIRST_SEED
