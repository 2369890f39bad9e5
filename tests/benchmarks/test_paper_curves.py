"""Figures over the epochs: their rows, and that pictures come from them."""

import io

import pytest
from PIL import Image
from rich.console import Console

import fake_runs
from lwsam_bench.paper import setups
from lwsam_bench.paper.curves import figures, plots as curve_plots
from lwsam_bench.paper.request import Request
from lwsam_bench.paper.runs.attempts import Result
from lwsam_bench.support.rows import read_rows


CONSOLE = Console(file=io.StringIO(), width=200)
MORE = (*fake_runs.LAYERS[:1], "stem/scale", *fake_runs.LAYERS[1:], "dense/bias")


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.setattr(
        "lwsam_bench.paper.runs.sweep.attempt",
        lambda config, *_: Result("missing data", "not there"),
    )


@pytest.fixture
def out(tmp_path):
    for method in setups.METHODS:
        # Where every parameter is perturbed each is a layer.
        layers = fake_runs.LAYERS if method in ("sgd", "lwsam") else MORE
        for seed in (0, 1):
            config = setups.config("cifar10", method, "small", seed)
            fake_runs.write(tmp_path, config, layers=layers, accuracy=0.5 + seed / 10)
    return tmp_path


def check(made, out, *plots):
    assert made.plots == plots
    for plot in plots:
        with Image.open(out / plot) as image:
            assert image.width >= 800
            assert image.height >= 300
    assert "CIFAR-100 is empty" in " ".join(made.notes) or made.name == "figure1"
    assert "Oxford Flowers-102 subset is empty" in " ".join(made.notes)
    return list(read_rows(out / f"{made.name}.jsonl"))


def test_figure1(out):
    made = figures.figure1(Request("small", out, CONSOLE, seeds=2))
    rows = check(made, out, "figure1-cifar10.png")
    assert [(row["method"], row["epoch"]) for row in rows] == [
        ("sgd", 1),
        ("sgd", 2),
    ] * 2
    # In the order of depth, whatever the order of the norms.
    assert list(rows[0]["norms"]) == list(fake_runs.LAYERS)
    assert rows[0]["norms"]["stem"] == 4.0
    assert rows[0]["norms"]["block/conv1"] == 3.0


def test_figure3(out):
    made = figures.figure3(Request("small", out, CONSOLE, seeds=2))
    rows = check(made, out, "figure3-cifar10.png")
    assert len(rows) == 4 * 2 * 2
    second = rows[3]
    assert (second["method"], second["epoch"]) == ("sgd", 2)
    assert second["test_accuracy"] == 0.6
    assert second["train_loss"] == pytest.approx(1 + (1 / 4 + 1 / 5 + 1 / 6) / 3)


def test_figure4(out):
    made = figures.figure4(Request("small", out, CONSOLE, seeds=2))
    rows = check(made, out, "figure4-cifar10.png")
    assert len(rows) == 4 * 2 * 2
    norms = {row["method"]: row["norm"] for row in rows}
    # Over the four layers that are weights, also where there are six.
    assert norms["sgd"] == pytest.approx((3**2 + 4**2 + 3**2 + 4**2) ** 0.5)
    assert all(norm <= 8.0 for norm in norms.values())


def test_figure5(out):
    made = figures.figure5(Request("small", out, CONSOLE, seeds=2))
    rows = check(made, out, "figure5-cifar10.png")
    assert {row["method"] for row in rows} == {"generalized_sam", "looksam", "lwsam"}
    ours = next(row for row in rows if row["method"] == "lwsam")
    assert ours["steps"] == 6
    assert ours["perturbations"] == {
        "stem": 1,
        "block/conv1": 2,
        "block/conv2": 2,
        "dense": 1,
    }
    assert {tuple(row["perturbations"]) for row in rows} == {fake_runs.LAYERS}


def test_numbers_that_are_not_finite_leave_gaps(tmp_path):
    assert figures._mean([1.0, None, 3.0]) == 2.0
    assert figures._mean([None]) is None
    assert figures._norm({"a": 3.0, "b": 4.0, "c": None}, ["a", "b"]) == 5.0
    assert figures._norm({"a": 3.0, "c": None}, ["a", "c"]) is None
    rows = [
        {"method": "sgd", "run": "x", "epoch": epoch, "norm": norm}
        for epoch, norm in ((1, 2.0), (2, None), (3, 1.0))
    ]
    curve_plots.full_norm(tmp_path / "x.png", "gaps", rows)
    assert (tmp_path / "x.png").exists()


def test_without_anything_there_is_no_picture(tmp_path):
    made = figures.figure3(Request("smoke", tmp_path, CONSOLE))
    assert made.plots == ()
    assert list(read_rows(tmp_path / "figure3.jsonl")) == []


def test_many_layers_get_a_scale_instead_of_names(tmp_path):
    layers = [f"layer{i}" for i in range(29)]
    rows = [
        {
            "run": "x",
            "epoch": e,
            "norms": {name: 1.0 + i for i, name in enumerate(layers)},
        }
        for e in (1, 2)
    ]
    curve_plots.layer_norms(tmp_path / "x.png", "many", rows)
    assert (tmp_path / "x.png").exists()
