"""The presets in a tuning: how each is run, and who dominates whom."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest

import lwsam_jax as lwsam
from lwsam_bench.models import smallcnn
from lwsam_bench.pages import docs as docs_page
from lwsam_bench.support.errors import UserError
from lwsam_bench.training.config import FAMILY as TRAINED
from lwsam_bench.tuning import results
from lwsam_bench.tuning.family import FAMILY, GROUP, NAMES
from lwsam_bench.tuning.methods import BY_NAME, choose, METHODS
from lwsam_bench.tuning.protocol import Request
from lwsam_bench.tuning.report import family, page
from lwsam_bench.tuning.results import Cell
from lwsam_bench.tuning.runs import trajectory
from lwsam_bench.tuning.runs.images import ImageCourse
from lwsam_bench.tuning.runs.runner import Runner
from lwsam_bench.tuning.tasks import TASKS


ROOT = pathlib.Path(__file__).resolve().parents[2]
TASK = dataclasses.replace(
    TASKS["digits"], train_images=100, steps=(4, 12), noise=0.4, batch_size=20
)
CONFIG = {"lr": 0.05, "weight_decay": 1e-3, "steps": 10}


@pytest.fixture(scope="module")
def course():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smallcnn, "BLOCKS", ((4, 1),))
        yield ImageCourse(TASK, None)


def test_the_family_has_every_preset_of_a_training():
    assert set(TRAINED) <= NAMES
    assert [m.name for m in choose(["family"])] == sorted(
        GROUP, key=list(BY_NAME).index
    )
    assert not NAMES & {method.name for method in METHODS}
    assert choose(["all"]) == METHODS


@pytest.mark.parametrize("method", FAMILY, ids=lambda method: method.name)
def test_every_method_can_be_made_and_reaches_down(method):
    numbers = {"lr": 0.1, "steps": 50, "gamma": 0.5}
    made = method.make(**{name: numbers[name] for name in method.fixed})
    assert made.is_plain == (method.loss in trajectory.LOSSES)
    assert (method.radius is None) == made.is_plain
    space = method.space((50, 400))
    if method.radius is not None:
        assert space["rho"].high >= 20 * space["rho"].low
    settable = made.hyperparams(np.float32)
    for name in {"rho", "alpha"} & space.keys():
        assert name in settable


@pytest.fixture(scope="module")
def runner_of(course):
    """Runners that the tests share."""
    return functools.cache(lambda name: Runner(course, BY_NAME[name]))


def request_of(name, **more):
    space = BY_NAME[name].space(TASK.steps)
    own = {n: within.at(0.5) for n, within in space.items() if n not in CONFIG}
    return Request("trial", 0, 0, {**CONFIG, **own, **more})


# One of each kind: numbers inside, losses of the examples, memory, another base.
@pytest.mark.parametrize(
    ("name", "price"),
    [
        ("ae_sam", None),
        ("csam", 2.0),
        ("saf", 1.0),
        ("mesa", 4 / 3),
        ("adasam", 2.0),
    ],
)
def test_runs_of_each_kind(runner_of, name, price):
    runner, request = runner_of(name), request_of(name)
    row = runner.run(request)
    assert 0 <= row["validation"]["accuracy"] <= 1
    assert row["validation"]["loss"] is not None
    if price is not None:
        assert row["price"] == pytest.approx(price, rel=0.1)
    else:
        assert 1 < row["price"] <= 2
    again = runner.run(request)
    assert again["validation"] == row["validation"]
    assert again["compile_cpu_seconds"] == 0


def test_numbers_inside_a_step_make_another(runner_of):
    first, other = (
        runner_of("wsam").run(request_of("wsam", gamma=gamma)) for gamma in (0.5, 0.9)
    )
    assert first["validation"] != other["validation"]


def test_a_weight_of_nothing_is_the_plain_loss(runner_of):
    request = request_of("sgd", steps=16)  # the terms begin with step 8
    plain = runner_of("sgd").run(request)["validation"]["loss"]
    for name in trajectory.LOSSES:
        none, much = (
            runner_of(name).run(request_of(name, weight=weight, steps=16))[
                "validation"
            ]["loss"]
            for weight in (0.0, 3.0)
        )
        assert none == pytest.approx(plain, rel=1e-4)
        assert much != pytest.approx(none, rel=1e-4)


def test_rows_are_those_of_the_batch(course):
    start = course.start(0)
    batch = start.batches(20)
    seen = {}
    for step in range(12):
        rows = start.rows(step)
        assert rows.epoch == step // 4
        for at, image in zip(rows.index, np.asarray(batch(step)["image"]), strict=True):
            assert np.array_equal(seen.setdefault(int(at), image), image)
    assert rows.total == 90
    assert jax.tree.structure(
        trajectory.model_state("mesa", start)[1]
    ) == jax.tree.structure(start.params)


def test_turns_are_refused():
    turns = dataclasses.replace(TASKS["forgetting-digits"], train_images=100)
    for name in ("losses", "saf"):
        with pytest.raises(UserError, match="for all classes at once"):
            ImageCourse(turns, None).loss_fn(name)


def rows_of(method, gradients, *accuracies, length=1.0):
    """Final rows of both sets of draws, alike."""
    for draws in range(2):
        cell = Cell(BY_NAME[method], draws)
        for seed, accuracy in enumerate(accuracies):
            judged = {"accuracy": accuracy, "loss": 1.0, "ece": 0.1}
            found = {
                "validation": judged,
                "last": judged,
                "steps": 100,
                "price": 1.0,
                "gradients": gradients,
                "wall_seconds": 36.0,
            }
            config = {**CONFIG, "rho": 0.1, "weight": 0.1, "alpha": 0.5}
            request = Request("final", 0, seed, config, length=length)
            origin = {"packages": {"jax": "1"}, "platform": "cpu"}
            yield {**cell.row(request, found, TASK, 8), "origin": origin}


@pytest.fixture(scope="module")
def some_rows():
    return [
        *rows_of("sgd", 50, 0.70, 0.72, length=0.5),
        *rows_of("sgd", 100, 0.80, 0.82),
        *rows_of("sgd", 200, 0.80, 0.82, length=2.0),
        *rows_of("saf", 100, 0.90, 0.91),
        *rows_of("gsam", 200, 0.85, 0.87),
        *rows_of("csam", 300, 0.90, 0.95),
        *rows_of("rwp", 90, 0.60, 0.61),
    ]


def test_who_is_dominated(some_rows):
    by = {e.point.label: e.by and e.by[0] for e in family.entries(some_rows, "sgd")}
    assert by["GSAM"] == "SAF"
    assert by["CSAM"] is None  # better in the mean than nothing that costs less
    assert by["SAF"] is None
    assert by["RWP"] == "SGD, half the steps"
    assert by["SGD, as tuned"] is None  # the base is what the others are held against
    text = family.section(some_rows, plot_folder="")
    assert "- Dominated: RWP (by SGD, half the steps, +10.5" in text
    assert "- Ahead of SGD that may cost as much: SAF" in text
    assert "Not run: SAM; ASAM; " in text
    assert "AdamW that may" not in text


def test_the_page_is_made_of_rows(some_rows, tmp_path):
    folder = tmp_path / "all" / "digits"
    folder.mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in some_rows]
    (folder / results.ROWS).write_text("".join(lines))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "family.md").write_text(
        "{}\nbefore\n{}\n".format(*docs_page.marks("family"))
    )
    family.write(folder)
    family.write_docs(folder.parent, str(docs))
    shown = (docs / "family.md").read_text()
    assert "before" not in shown
    assert "8 trials for each method" in shown
    (plot,) = (docs / "images").iterdir()
    assert f"(images/{plot.name})" in shown
    assert (folder / plot.name).exists()
    assert f"({plot.name})" in (folder / "family.md").read_text()


def test_the_page_of_the_documentation_is_that_of_the_committed_rows():
    opening, closing = docs_page.marks(family.PAGE)
    _, _, rest = (ROOT / "docs" / "family.md").read_text().partition(opening)
    shown, _, _ = rest.partition(closing)
    tunings = page.all_rows(ROOT / "benchmarks" / "results" / "family")
    assert shown.strip() == family.sections(tunings).strip()


def test_a_preset_makes_it_a_tuning_of_the_family():
    assert family.is_of_family(choose(["family"]))
    assert not family.is_of_family(choose(["all"]))
    assert isinstance(BY_NAME["gam"].make(), lwsam.Method)
