"""Tasks beyond images with labels: two in turn, a text; and images that are changed."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from lwsam_bench.models import smallcnn
from lwsam_bench.support.errors import UserError
from lwsam_bench.tuning import results
from lwsam_bench.tuning.methods import BY_NAME
from lwsam_bench.tuning.protocol import goodness, merit, Protocol, Request
from lwsam_bench.tuning.report import page, pareto, summary, verdicts
from lwsam_bench.tuning.runs import measures
from lwsam_bench.tuning.runs.images import ImageCourse, in_turn
from lwsam_bench.tuning.runs.runner import Runner
from lwsam_bench.tuning.runs.text import TextCourse
from lwsam_bench.tuning.tasks import TASKS, title, TITLES


TURNS = dataclasses.replace(
    TASKS["forgetting-digits"], train_images=100, batch_size=20, test_images=100
)
TEXT = dataclasses.replace(
    TASKS["shakespeare"],
    train_images=1_000,
    test_images=500,
    batch_size=8,
    model="gpt-tiny",
)
CONFIG = {"lr": 0.05, "weight_decay": 1e-3, "steps": 5}


@pytest.fixture(scope="module", autouse=True)
def _small_network():
    """Four layers: compiling is what takes time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smallcnn, "BLOCKS", ((4, 1),))
        yield


@pytest.fixture(scope="module")
def turns():
    return ImageCourse(TURNS, None)


def test_each_turn_has_its_own_classes(turns):
    start = turns.start(0)
    batch = start.batches(5)
    learned = [np.asarray(batch(step)["label"]) // 5 for step in range(5)]
    assert [set(turn) for turn in learned] == [{0}, {0}, {0}, {1}, {1}]
    assert [set(labels // 5) for _, labels in start.validation] == [{0}, {1}]
    assert sum(len(labels) for _, labels in turns._test) == 100


def test_noise_stays_within_the_turn():
    start = ImageCourse(dataclasses.replace(TURNS, noise=1.0), None).start(0)
    batch = start.batches(8)
    for step in range(8):
        assert {*(np.asarray(batch(step)["label"]) // 5)} == {step // 4}


def test_a_turn_has_to_fill_a_batch():
    course = ImageCourse(dataclasses.replace(TURNS, batch_size=60), None)
    with pytest.raises(
        UserError, match="--batch 60 is more than the .. training images"
    ):
        course.start(0)


def test_turns_share_the_steps():
    each = [lambda step: ("first", step), lambda step: ("second", step)]
    assert [in_turn(each, 3)(step) for step in range(3)] == [
        ("first", 0),
        ("first", 1),
        ("second", 0),
    ]
    assert in_turn(each[:1], 3)(2) == ("first", 2)


def test_an_image_is_told_from_its_own_turn_alone(turns):
    """The cross-entropy over the outputs of its turn, whatever the others are."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 10)), np.array([0, 4, 5, 9, 2, 7])
    mine, answers = turns._answers(logits, labels)
    expected = [
        row[:5] if label < 5 else row[5:]
        for row, label in zip(logits, labels, strict=True)
    ]
    assert np.array_equal(mine, expected)
    assert answers.tolist() == [0, 4, 0, 4, 2, 2]


def test_forgetting_is_measured_after_both_turns(turns):
    row = Runner(turns, BY_NAME["sgd"]).run(Request("final", 0, 0, CONFIG))
    for judged in (row["validation"], row["last"], row["selected"]):
        assert judged["accuracy"] == pytest.approx(np.mean(judged["parts"]))
        assert len(judged["parts"]) == 2
    assert set(row["last"]["survival"]) >= {"4 bits", "blur", "input noise 0.5"}
    assert merit([row]) == (row["validation"]["accuracy"], -row["validation"]["loss"])


def test_a_text_is_judged_by_its_bits(data_dir):
    course = TextCourse(TEXT, str(data_dir))
    row = Runner(course, BY_NAME["adamw"]).run(
        Request("final", 0, 0, {**CONFIG, "steps": 2})
    )
    assert row["last"]["bits"] == pytest.approx(row["last"]["loss"] / math.log(2))
    assert 2 < row["last"]["bits"] < 7  # of 65 characters: 6.02 for none the likelier
    assert set(row["last"]["survival"]) == {
        "4 bits",
        "3 bits",
        "weight noise 0.2",
        "weight noise 0.4",
    }
    validation = row["validation"]
    assert goodness(validation) == (-validation["loss"], -validation["loss"])
    with pytest.raises(UserError, match="--methods smoothing is for images"):
        course.loss_fn("smoothing")


def test_what_validates_a_text_is_a_stretch_that_is_not_learned(data_dir):
    course = TextCourse(TEXT, str(data_dir))
    whole = course._train.tobytes()
    stretches = set()
    for seed in range(2):
        ((read, then),) = course.start(seed).validation
        assert np.array_equal(read[:, 1:], then[:, :-1])
        stretch = np.asarray(read, np.uint8).tobytes()
        assert stretch in whole
        stretches.add(stretch)
        batch = course.start(seed).batches(1)
        learned = b"".join(
            np.asarray(row, np.uint8).tobytes()
            for step in range(40)
            for row in batch(step)["text"]
        )
        assert stretch[:16] not in learned
    assert len(stretches) == 2


def test_a_text_has_no_labels_to_be_wrong():
    with pytest.raises(UserError, match="--noise 0.4: shakespeare has no labels"):
        dataclasses.replace(TEXT, noise=0.4)


def test_images_are_changed_as_said():
    images = jnp.zeros((1, 4, 4, 1)).at[0, 1, 1].set(16.0)
    found = measures.changed(images, np.random.default_rng(0))
    kernel = np.outer([1, 2, 1, 0], [1, 2, 1, 0])  # a point, seen through the blur
    assert np.allclose(found["blur"][0, ..., 0], kernel)
    paler = found["contrast 0.5"][0, ..., 0]
    assert np.allclose(paler, 0.5 + 0.5 * np.asarray(images)[0, ..., 0])
    assert np.allclose(found["brightness 0.5"], images + 0.5)
    flat = jnp.ones((50, 8, 8, 3))
    found = measures.changed(flat, np.random.default_rng(0))
    assert np.allclose(found["blur"], 1.0)
    dropped = np.asarray(found["20% of the pixels"])
    assert np.mean(dropped == 0) == pytest.approx(0.2, abs=0.02)
    assert np.array_equal(dropped.min(axis=-1), dropped.max(axis=-1))
    noise = np.asarray(found["input noise 0.5"]) - 1
    assert noise.std() == pytest.approx(0.5, rel=0.05)


def test_a_mean_over_turns_has_each_of_them():
    one = {"accuracy": 0.5, "loss": 1.0, "ece": 0.1}
    assert measures.mean([one]) is one
    other = {"accuracy": 1.0, "loss": None, "ece": 0.3}
    assert measures.mean([one, other]) == {
        "accuracy": 0.75,
        "loss": None,
        "ece": pytest.approx(0.2),
        "parts": [0.5, 1.0],
    }


def test_fewer_bits_are_better():
    def tuned(name, draws, *bits):
        rows = {seed: {"last": {"bits": x}} for seed, x in enumerate(bits)}
        return summary.Tuned(BY_NAME[name], draws, rows, trials=2)

    found = {
        "adamw": [tuned("adamw", 0, 2.0, 2.2), tuned("adamw", 1, 2.1, 2.1)],
        "adamw-sam": [tuned("adamw-sam", 0, 1.9, 2.0), tuned("adamw-sam", 1, 2.2, 2.2)],
    }
    first, second = summary.gaps(found, "adamw-sam", "last")
    assert first.mean == pytest.approx(0.15)
    assert str(first) == "-0.150 ± 0.050"
    assert first.verdict == "better"
    assert second.verdict == "worse"
    assert summary.worst([first, second]) is second
    assert summary.counted(found["adamw-sam"], "last").draws == 1


def rows_of(task, **last):
    """Rows that are just enough for a page."""
    config = {"lr": 0.1, "weight_decay": 0.01, "steps": 9}
    for name, seed in (("adamw", 0), ("adamw", 1), ("adamw-sam", 0), ("adamw-sam", 1)):
        judged = {"accuracy": 0.5, "loss": 1.0, "ece": 0.1, "survival": {"4 bits": 1.5}}
        judged |= {k: v + (name == "adamw-sam") for k, v in last.items()}
        yield {
            "kind": "run",
            "method": name,
            "draws": 0,
            "phase": "final",
            "trial": 0,
            "seed": seed,
            "length": 1.0,
            "config": config if name == "adamw" else {**config, "rho": 0.1},
            "ranges": {"rho": [0.03, 1.2]},
            "validation": {"step": 9, **judged},
            "steps": 9,
            "price": 1.0 + (name == "adamw-sam"),
            "gradients": 9.0,
            "cpu_seconds": 1.0,
            "all_cpu_seconds": 1.0,
            "wall_seconds": 1.0,
            "last": judged,
            "selected": judged,
            "trials": 2,
            "task": dataclasses.asdict(task),
            "origin": {"packages": {"jax": "0"}, "platform": "cpu"},
        }


def test_the_page_of_a_text_counts_bits(tmp_path):
    rows = list(rows_of(TASKS["shakespeare"], bits=2.0))
    text = page.section(rows, plot_folder="")
    assert text.startswith("## Tiny Shakespeare, 4,000 characters, batch 100\n")
    assert "Bits per character of the test (fewer are better)" in text
    assert "| 3.000 ± 0.000 | +1.000 ± 0.000 |" in text
    assert "Up to 2.00, at the last step: no difference to AdamW." in text
    page.plot.draw(tmp_path, rows)
    assert (tmp_path / "tuning-shakespeare-noise0-batch100-adamw.png").exists()


def final(name, length, gradients, *accuracies, draws=0):
    """Final rows of a method, of one length, on the digits."""
    for seed, accuracy in enumerate(accuracies):
        judged = {"accuracy": accuracy, "loss": 1.0}
        yield {
            "method": name,
            "draws": draws,
            "phase": "final",
            "seed": seed,
            "length": length,
            "gradients": gradients,
            "validation": judged,
            "last": judged,
            "task": dataclasses.asdict(TASKS["digits"]),
        }


def test_a_method_stands_beside_the_base_that_may_cost_as_much():
    rows = [
        *final("sgd", 0.5, 50.0, 0.6, 0.7),
        *final("sgd", 1.0, 100.0, 0.7, 0.9),
        *final("sgd", 2.0, 200.0, 0.9, 1.0),
        *final("sam", 1.0, 120.0, 0.8, 0.98),  # dearer than SGD: twice that is allowed
        *final("micro", 1.0, 30.0, 0.5, 0.6),  # cheaper than all of them
        *final("momentum", 1.0, 100.2, 0.85, 0.8),  # as dear, but for rounding
    ]
    found = {point.label: point for point in pareto.points(rows, "sgd")}
    assert found["SAM"].rival.one["length"] == 2.0
    assert found["SAM"].lead.mean == pytest.approx(-0.06)
    assert found["10 examples"].rival.one["length"] == 0.5
    assert found["momentum"].rival.one["length"] == 1.0
    best = [point.label for point in pareto.front([*found.values()])]
    # Its price apart, SGD as tuned has 80 %, and momentum 82.5 %.
    assert best == [
        "10 examples",
        "SGD, half the steps",
        "SGD, as tuned",
        "momentum",
        "SAM",
        "SGD, twice the steps",
    ]
    text = pareto.section(rows)
    assert "| **SAM** | 120 | 89.0 ± 9.0 | 200 | 95.0 ± 5.0 | (-6.0 ± 4.0) |" in text
    assert "No method is ahead of SGD that may cost as much: no difference." in text
    rows += final("random-relative", 1.0, 90.0, 0.75, 0.96)
    assert "Ahead of SGD that may cost as much: random, relative." in pareto.section(
        rows
    )
    assert "Not run: Nesterov; " in text


def test_the_verdict_names_who_is_ahead_in_both_tunings_at_a_price():
    def rows(name, price, *pairs, **config):
        for draws, accuracies in enumerate(pairs):
            for row in final(name, 1.0, 100 * price, *accuracies, draws=draws):
                last = {
                    **row["last"],
                    "survival": {"3 bits": 1 - row["last"]["accuracy"]},
                }
                place = {"config": config, "ranges": {"rho": [0.03, 1.2]}}
                yield {**row, **place, "price": price, "last": last, "selected": last}

    some = [
        *rows("sgd", 1.0, (0.5, 0.6), (0.6, 0.7)),
        *rows("momentum", 1.0, (0.9, 0.99), (0.61, 0.72), rho=0.5),  # worse: +1.5 ± 0.5
        *rows("micro-layers", 1.08, (0.8, 0.91), (0.7, 0.81), rho=0.04),
        *rows("sam", 2.0, (0.2, 0.31), (0.9, 0.99), rho=0.06),
    ]
    text = verdicts.sections([some])
    label = "Digits, no noise, batch 100"
    assert (
        f"| {label} | last step | **momentum**, +1.5 ± 0.5 |"
        " **10 examples, top 4 layers**, +10.5 ± 0.5 |"
        " **10 examples, top 4 layers**, +10.5 ± 0.5 | 1 of 3 |"
    ) in text
    # What survives is here the worse, the better as trained.
    assert (
        f"| {label} | 3 bits | no difference | no difference | no difference |"
    ) not in text
    assert f"No difference at any price:\n\n- {label}: 3 bits.\n" in text
    assert "| SAM | 0.03 to 1.2 | 0.06 to 0.06 | 0.06 | 2 of 2 |" in text
    assert "| momentum | 0.3 to 6 | 0.5 to 0.5 | 0.5 | 0 of 2 |" in text
    assert verdicts.sections([]) == "No rows yet.\n"


def test_what_is_not_there_is_said():
    rows = [
        *final("sgd", 1.0, 100.0, 0.7, 0.9),
        *final("sgd", 1.0, 100.0, 0.7, 0.9, draws=1),
        *final("sam", 1.0, 200.0, 0.7, 0.9),
    ]
    text = pareto.sections([rows])
    assert "Not finished: SAM." in text
    assert "No method is ahead of SGD that may cost as much: no difference." in text
    assert f"No rows yet of: {TITLES['fashion-1000']}; " in text
    assert "\n| SAM | 200 | 80.0" in text
    assert pareto.sections([]).startswith("No rows yet of: Digits; ")


def test_rows_of_before_a_task_had_turns_are_gone_on_with(tmp_path):
    task = TASKS["digits"]
    row = next(rows_of(task))
    row["task"] = {
        k: v for k, v in row["task"].items() if k not in ("turns", "test_images")
    }
    file = tmp_path / results.ROWS
    with results.MetricsFile(file, keep_until=0) as rows:
        rows.write(row)
    found = results.Results(tmp_path, task, Protocol(trials=2))
    assert len(found.rows) == 1
    found.close()
    with pytest.raises(UserError, match="turns: 1 -> 2"):
        results.Results(
            tmp_path, dataclasses.replace(task, turns=2), Protocol(trials=2)
        )


def test_every_task_has_a_title():
    assert TITLES.keys() == TASKS.keys()
    for name, task in TASKS.items():
        assert task.name == name
        assert title(dataclasses.asdict(task)).startswith(TITLES[name])
