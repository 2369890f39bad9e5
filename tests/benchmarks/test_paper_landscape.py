"""`figure2` and `figure6`: planes through a layer, measured as A.2 says, resumable."""

import io
import json

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

import tiny_task
from lwsam_bench.data.augment import normalize
from lwsam_bench.paper import setups
from lwsam_bench.paper.landscape import figures, report
from lwsam_bench.paper.landscape.figures import Extent
from lwsam_bench.paper.landscape.grid import choose_layers, directions, Images, Plane
from lwsam_bench.paper.request import Request
from lwsam_bench.paper.runs.outcome import DONE, FAILED, Outcome
from lwsam_bench.paper.runs.sweep import Sweep


EXTENT = Extent(images=15, steps=(-20, 0, 3))
NAMES = ["first", "middle", "last"]


@pytest.fixture(scope="module")
def task():
    return tiny_task.make()


def test_layers_are_spread_over_the_depth(task):
    layers = choose_layers(task, 6)  # more than there are
    assert [layer.name for layer in layers] == NAMES
    assert [layer.shape for layer in layers] == [(16, 6), (6, 5), (5, 3)]
    assert [layer.name for layer in choose_layers(task, 2)] == ["first", "last"]
    weights = jax.tree.leaves(task.network.params)
    assert all(weights[layer.leaf].shape == layer.shape for layer in layers)


def test_directions_are_orthonormal_and_fixed_by_the_name(task):
    for layer in choose_layers(task, 6):
        u, v = directions(layer)
        assert u.shape == v.shape == layer.shape
        products = [np.vdot(u, u), np.vdot(v, v), np.vdot(u, v)]
        np.testing.assert_allclose(products, [1, 1, 0], atol=1e-14)
        np.testing.assert_array_equal(directions(layer)[1], v)
    first, middle, _ = choose_layers(task, 6)
    assert not np.isclose(directions(first)[0].flat[0], directions(middle)[0].flat[0])


def test_images_are_fixed_and_counted_once(task, monkeypatch):
    monkeypatch.setattr("lwsam_bench.paper.landscape.grid.CHUNK", 6)
    images = Images(task, 15)
    assert images.count == 15
    assert [int(weights.sum()) for _, _, weights in images.chunks] == [6, 6, 3]
    again = Images(task, 15)
    for one, other in zip(images.chunks, again.chunks, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
    assert Images(task, 10**6).count == 20


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_loss_of_the_moved_network(task, monkeypatch, name):
    """Against the whole network, in evaluation mode, with the layer replaced."""
    monkeypatch.setattr("lwsam_bench.paper.landscape.grid.CHUNK", 6)
    (layer,) = [x for x in choose_layers(task, 6) if x.name == name]
    images = Images(task, 15)
    network = task.network
    found = Plane(network, layer, images).row(
        network.params, network.model_state, -2, (0, 1.5)
    )
    u, v = directions(layer)
    pixels, labels = (
        np.concatenate([chunk[i] for chunk in images.chunks])[:15] for i in (0, 1)
    )
    leaves, treedef = jax.tree.flatten(network.params)
    for loss, beta in zip(found, (0, 1.5), strict=True):
        moved = list(leaves)
        moved[layer.leaf] = np.float32(moved[layer.leaf] - 2 * u + beta * v)
        logits, _ = network.apply(
            jax.tree.unflatten(treedef, moved),
            network.model_state,
            normalize(pixels, images.mean, images.std),
            train=False,
        )
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        assert loss == pytest.approx(float(expected.mean()), rel=1e-5)


class State:
    """A trained network, more or less: the initial one, scaled."""

    def __init__(self, task, scale):
        self.params = jax.tree.map(lambda x: scale * x, task.network.params)
        self.model_state = task.network.model_state


@pytest.fixture
def trained(monkeypatch):
    """Runs are there without training; a set of methods whose runs failed."""
    failed = set()

    def ensure(self, configs):
        return {
            config: Outcome(
                self.folder(config),
                FAILED if config.method in failed else DONE,
                "diverged" if config.method in failed else "",
            )
            for config in configs
        }

    def final_state(folder, config, task):
        return State(task, 1.0 if config.method == "sgd" else 0.5)

    monkeypatch.setattr(Sweep, "ensure", ensure)
    monkeypatch.setattr(figures.tasks, "make", tiny_task.make)
    monkeypatch.setattr(figures.loop, "final_state", final_state)
    monkeypatch.setattr(figures, "provenance", lambda: {"commit": None})
    monkeypatch.setitem(figures.EXTENTS, "smoke", EXTENT)
    return failed


def run(name, out):
    make = getattr(figures, name)
    artefact = make(Request("smoke", out, Console(file=io.StringIO())))
    artefact.save(out)
    return artefact


def test_figure6_stands_beside_figure2(tmp_path, trained):
    before, after = run("figure2", tmp_path), run("figure6", tmp_path)
    for artefact in (before, after):
        assert artefact.plots == (f"{artefact.name}.png",)
        png = (tmp_path / artefact.plots[0]).read_bytes()
        assert png.startswith(b"\x89PNG")
        assert any("15 training images" in note for note in artefact.notes)
        assert tiny_task.NOTE in artefact.notes
        (table,) = artefact.tables
        assert [row[0] for row in table.rows] == NAMES
    old, new = (artefact.tables[0] for artefact in (before, after))
    assert [row[:4] for row in new.rows] == list(old.rows)
    titles = [title.split(":")[0] for title in new.header[1:]]
    assert titles == 3 * [setups.METHODS["sgd"]] + 3 * [setups.METHODS["lwsam"]]
    # Half the weights.
    assert float(new.rows[0][4]) == pytest.approx(float(new.rows[0][1]) / 2, abs=0.01)


def test_a_landscape_that_was_cut_off_goes_on(tmp_path, trained, monkeypatch):
    artefact = run("figure2", tmp_path)
    (path,) = (tmp_path / "landscape").glob("*.jsonl")
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 1 + 3 * 3
    # In the middle of the second layer, and of a line.
    cut = text.index('{"kind": "grid", "layer": "middle", "alpha": 3')
    path.write_text(text[: cut + 30])
    assert run("figure2", tmp_path).tables == artefact.tables
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row for row in again if row["kind"] != "continued"] == rows
    # All is there: nothing is read.
    monkeypatch.setattr(figures.tasks, "make", None)
    assert run("figure2", tmp_path).tables == artefact.tables


def test_another_extent_is_another_landscape(tmp_path, trained, monkeypatch):
    run("figure2", tmp_path)
    monkeypatch.setitem(figures.EXTENTS, "smoke", Extent(images=15, steps=(0, 1)))
    artefact = run("figure2", tmp_path)
    assert any("2 x 2 from 0 to 1" in note for note in artefact.notes)


def test_a_run_that_was_trained_again_is_another_landscape(
    tmp_path, trained, monkeypatch
):
    ends = [{"loss": 0.1, "seconds": 3.25}, {"loss": 0.1, "seconds": 3.5}]
    for end in (*ends, ends[1]):
        monkeypatch.setattr(Outcome, "end", end)
        run("figure2", tmp_path)
        (path,) = (tmp_path / "landscape").glob("*.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows[0]["end"] == end
        assert [row["kind"] for row in rows].count("grid") == 9


def test_a_run_that_failed_is_told(tmp_path, trained):
    trained.add("lwsam")
    artefact = run("figure6", tmp_path)
    assert artefact.plots == ()
    assert "layer-wise SAM: failed, diverged" in artefact.notes
    assert artefact.tables[0].rows[0][1] != ""
    assert artefact.tables[0].rows[0][4:] == ("", "", "")


def test_increase_is_over_the_middle():
    losses = np.array([[6.0, 2.0], [1.0, np.inf]])
    surface = report.Surface({}, (-1, 0), np.where(losses > 9, 7.0, losses))
    assert surface.middle == 7.0
    assert surface.increase() == pytest.approx(4.0 - 7.0)
    assert surface.increase(4.5) == pytest.approx(3.0 - 4.5)
    surface = report.Surface({}, (0, 1), losses)
    assert not np.isfinite(surface.increase())
