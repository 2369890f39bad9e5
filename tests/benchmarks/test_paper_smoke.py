"""Every command of the paper, from its arguments to what it leaves in one folder."""

import contextlib
import io
import json

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import fake_runs
from lwsam_bench.commands import paper
from lwsam_bench.commands.cli import main
from lwsam_bench.paper import artefact, setups
from lwsam_bench.paper.runs import sweep
from lwsam_bench.paper.runs.outcome import judge


def run(name, *arguments):
    """Return exit code and output of a command in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main([name, *map(str, arguments)])
    return code, output.getvalue()


@pytest.fixture
def no_data(monkeypatch):
    """Nothing that is to be trained has data."""
    monkeypatch.setattr(
        "lwsam_bench.paper.runs.sweep.attempt",
        lambda config, *_: sweep.Result("missing data", f"{config.dataset} is absent"),
    )


def test_there_is_a_command_for_each_artefact():
    assert tuple(paper.COMMANDS) == artefact.NAMES


def test_a_command_saves_its_artefact(tmp_path, no_data):
    code, output = run("table1", "--scale", "smoke", "--out", tmp_path)
    assert code == 0
    assert "Table 1: accuracy: " in output
    assert "table1.md" in output
    saved = json.loads((tmp_path / "table1.json").read_text())
    assert (saved["name"], saved["scale"]) == ("table1", "smoke")


def test_failures_are_tried_again_only_if_asked(tmp_path, no_data):
    config = setups.config("cifar10", "sgd", "smoke", 0)
    folder = fake_runs.write(tmp_path, config, diverged=True)
    run("figure1", "--scale", "smoke", "--out", tmp_path)
    assert judge(folder).status == "failed"
    again = ("--scale", "smoke", "--out", tmp_path, "--retry-failed")
    code, output = run("figure1", *again)
    assert code == 0
    assert "tried again: 1" in output
    assert judge(folder).status == "pending"


@pytest.mark.parametrize("code", [130, 143])
def test_a_signal_is_the_exit_code(tmp_path, monkeypatch, code):
    monkeypatch.setattr(
        "lwsam_bench.paper.runs.sweep.attempt",
        lambda *_: sweep.Result("stopped", code=code),
    )
    assert run("lm", "--scale", "smoke", "--out", tmp_path)[0] == code
    assert not (tmp_path / "lm.json").exists()


def test_an_unknown_scale(capsys):
    with pytest.raises(SystemExit):
        main(["table1", "--scale", "huge"])
    assert "invalid choice: 'huge'" in capsys.readouterr().err


@pytest.fixture
def persistent_cache(tmp_path_factory):
    """Commands share compiled programs as a user's do, in a folder of their own."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # whether there is one is asked once
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("persistent_cache")
def test_all_commands_at_the_scale_smoke(tmp_path, data_dir):
    for name in artefact.NAMES:
        arguments = ("--scale", "smoke", "--out", tmp_path, "--data-dir", data_dir)
        code, output = run(name, *arguments)
        assert code == 0, output
    made = artefact.load(tmp_path)
    assert tuple(one.name for one in made) == artefact.NAMES
    for one in made:
        assert one.scale == "smoke"
        assert one.tables or one.plots
        for plot in one.plots:
            assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{one.name}.md").stat().st_size > 200
    # CIFAR-10 and the flowers have run in every table.
    by_name = {one.name: one for one in made}
    for name in ("table1", "table3", "table4"):
        for table in by_name[name].tables:
            if "CIFAR-100" not in table.title:
                assert all(row[1] for row in table.rows), table
    assert all(row[1] for row in by_name["lm"].tables[0].rows)
    for name in ("figure1", "figure3", "figure4", "figure5"):
        assert by_name[name].plots == (f"{name}-cifar10.png", f"{name}-flowers.png")
    # A run is trained once, whoever wants it, and nothing is trained again.
    folders = {
        path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*.jsonl")
    }
    texts = {name: (tmp_path / f"{name}.json").read_text() for name in artefact.NAMES}
    for name in ("table1", "table4", "figure5"):
        assert run(name, *arguments)[0] == 0
    assert folders == {
        path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*.jsonl")
    }
    strip = lambda text: {**json.loads(text), "command": ""}
    for name in ("table1", "table4", "figure5"):
        again = (tmp_path / f"{name}.json").read_text()
        assert strip(again) == strip(texts[name])
    code, _ = run("report", tmp_path)
    assert code == 0
