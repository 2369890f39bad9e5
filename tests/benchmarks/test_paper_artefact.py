"""Artefacts of the paper's commands: what is written, what is read, what is refused."""

import json
import sys

import pytest

from lwsam_bench.paper import artefact
from lwsam_bench.paper.artefact import Artefact, Table
from lwsam_bench.support.errors import UserError


ORIGIN = {
    "time": "2026-03-04T05:06:07+00:00",
    "commit": "0123456789abcdef",
    "dirty": False,
    "packages": {"jax": "0.7.0", "flax": "0.12.0", "optax": None},
    "platform": "cpu",
    "device": "cpu",
    "device_count": 1,
    "machine": "x86_64",
    "cpu_count": 2,
}
TABLE = Table(
    title="CIFAR-10",
    header=("method", "ours", "a|b"),
    rows=(("SGD", "91.0 %", ""), ("SAM <x>", "*92*", "1\n2")),
    notes=("One.", "Two."),
)
FULL = Artefact(
    name="figure1",
    title="Figure 1",
    scale="small",
    command="lwsam-bench figure1 --scale small",
    tables=(TABLE,),
    plots=("figure1-cifar10_a.png",),
    notes=("JPEG.",),
    origins=(ORIGIN,),
)


def test_what_is_saved_is_loaded(tmp_path):
    other = Artefact("lm", "LM", "smoke", "lwsam-bench lm")
    assert other.save(tmp_path) == tmp_path / "lm.md"
    FULL.save(tmp_path)
    assert artefact.load(tmp_path) == [FULL, other]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "figure1.json",
        "figure1.md",
        "lm.json",
        "lm.md",
    ]


def test_markdown(tmp_path):
    assert FULL.save(tmp_path).read_text(encoding="utf-8") == (
        "# Figure 1\n\n"
        "Scale: small.\n\n"
        "![Figure 1, CIFAR-10 a](figure1-cifar10_a.png)\n\n"
        "## CIFAR-10\n\n"
        "| method | ours | a\\|b |\n"
        "| --- | ---: | ---: |\n"
        "| SGD | 91.0 % |  |\n"
        "| SAM \\<x> | \\*92\\* | 1 2 |\n\n"
        "One.\n\nTwo.\n\n"
        "JPEG.\n\n"
        "```bash\nlwsam-bench figure1 --scale small\n```\n\n"
        "Made with commit 0123456789, jax 0.7.0, flax 0.12.0, CPU (x86_64, 2 cores),"
        " 2026-03-04.\n"
    )


def test_origins_that_differ_in_time_alone_share_a_line():
    gpu = {**ORIGIN, "platform": "gpu", "device": "H200", "dirty": True}
    later = {**ORIGIN, "time": "2026-03-06T00:00:00+00:00"}
    assert artefact.origin_lines([later, ORIGIN, gpu, {**gpu, "device_count": 8}]) == [
        "commit 0123456789, jax 0.7.0, flax 0.12.0, CPU (x86_64, 2 cores), 2026-03-04"
        " to 2026-03-06",
        "commit 0123456789 with changes on top, jax 0.7.0, flax 0.12.0, H200,"
        " 2026-03-04",
        "commit 0123456789 with changes on top, jax 0.7.0, flax 0.12.0, 8 x H200,"
        " 2026-03-04",
    ]
    assert artefact.origin_lines([{}]) == ["code in no repository, unknown device"]


def test_an_empty_folder_has_no_artefacts(tmp_path):
    assert artefact.load(tmp_path) == []
    assert artefact.load(tmp_path / "missing") == []


GOOD = json.dumps(
    {
        "name": "lm",
        "title": "",
        "scale": "",
        "command": "",
        "tables": [],
        "plots": [],
        "notes": [],
        "origins": [],
    }
)


def damage(**changes):
    return json.dumps({**json.loads(GOOD), **changes})


@pytest.mark.parametrize(
    "text",
    [
        GOOD[:30],
        "[]",
        "{}",
        damage(name="table1"),
        damage(name="table9"),
        damage(title=None),
        damage(notes="text"),
        damage(plots=["../secret.png"]),
        damage(plots=["/secret.png"]),
        damage(plots=["secret.txt"]),
        damage(origins=["x"]),
        damage(tables=[{"title": "", "header": ["a"], "rows": [["1", "2"]]}]),
        damage(
            tables=[{"title": "", "header": ["a"], "rows": [["1", "2"]], "notes": []}]
        ),
        "\udcff",
    ],
)
def test_a_damaged_artefact_is_an_error(tmp_path, text):
    path = tmp_path / "lm.json"
    path.write_text(GOOD)
    assert len(artefact.load(tmp_path)) == 1
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"lm\.json is no artefact .*`lwsam-bench lm`"):
        artefact.load(tmp_path)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "table1.json").mkdir()
    with pytest.raises(UserError, match="cannot read"):
        artefact.load(tmp_path)


def test_rows_have_as_many_cells_as_the_header():
    with pytest.raises(ValueError, match="2 columns, but a row of 1 cells"):
        Table("t", ("a", "b"), (("1",),))


def test_the_command_can_be_typed_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/x", "table1", "--out", "my runs"])
    assert artefact.command_line() == "lwsam-bench table1 --out 'my runs'"
