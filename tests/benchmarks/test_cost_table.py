"""`lwsam-bench cost`: the price of a network's steps, from a trace."""

import io

import numpy as np
import pytest
from rich.console import Console

import lwsam_jax as lwsam
from lwsam_bench.speed import cost
from lwsam_bench.support.errors import UserError


SMALL = cost.Network("resnet8w4", batch_size=2, image_size=8, classes=5)


def page(network, compiling=False):
    console = Console(file=io.StringIO(), width=200)
    return cost.page(network, console, compiling=compiling)


def table(text, first):
    """The cells of the table whose first column has this title."""
    lines = text.splitlines()
    start = next(i for i, x in enumerate(lines) if x.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_page_of_a_small_network():
    text = page(SMALL)
    steps = {row[0]: [float(x) for x in row[1:]] for row in table(text, "step")}
    assert steps["plain (SGD)"] == [1.0, 1.0]
    assert steps["all layers"] == pytest.approx([2.0, 2.0], abs=0.01)
    assert 1.0 < steps["the last 4 layers"][0] < steps["the last 4 layers"][1] < 2.0
    layers = table(text, "layer")
    assert [layers[0][0], layers[-1][0]] == ["stem_conv", "dense"]
    assert len(layers) == 8
    covers = [float(row[5]) for row in layers]
    assert covers == sorted(covers, reverse=True)
    assert "compiling" not in text


def test_steps_are_compiled_on_demand(monkeypatch):
    programs = lambda layers: [("plain", ()), ("last", ("dense",))]
    monkeypatch.setattr(cost, "_programs", programs)
    plain, last = table(page(SMALL, compiling=True), "program")
    assert [plain[0], last[0]] == ["plain", "last"]
    assert float(plain[3]) == float(plain[4]) == 1.0
    # What is left beside the layers counts in a network as small as this.
    assert float(last[3]) == pytest.approx(float(last[4]), abs=0.1)


def test_programs_are_covers_of_the_deepest_layers():
    params = {f"layer{i}": np.ones((2, 2)) for i in range(6)}
    programs = dict(cost._programs(lwsam.Layers.of(params)))
    assert programs["plain (SGD)"] == ()
    names = programs["cover of the last 4 layers"].names
    assert names == ("layer2", "layer3", "layer4", "layer5")
    assert len(programs["cover of all layers"]) == 6


def test_wrn_28_10_is_only_traced():
    text = page(cost.Network("wrn28-10", 128, 32, 100))
    assert "36,536,884 parameters" in text
    assert len(table(text, "layer")) == 29


def test_networks_for_text_are_refused():
    with pytest.raises(UserError, match="reads text"):
        page(cost.Network("gpt-tiny", 2, 8, 5))


def test_page_is_written(tmp_path):
    console = Console(file=io.StringIO())
    path = tmp_path / "cost.md"
    assert cost.run(SMALL, str(path), console, compiling=False) == 0
    assert path.read_text().startswith("# Cost of a step: resnet8w4, batch 2")
    with pytest.raises(UserError, match="there is no folder"):
        cost.run(SMALL, str(tmp_path / "no" / "x"), console, compiling=False)
