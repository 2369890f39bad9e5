"""`lwsam-bench accelerator`: piece by piece, and no row twice."""

import io

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from rich.console import Console

import tiny_task
from lwsam_bench.accelerator import evidence, networks, races, report, runs
from lwsam_bench.commands.cli import main
from lwsam_bench.commands.measures import accelerator as command_line
from lwsam_bench.models.network import Network
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import read_rows
from lwsam_bench.training.recipe import make_loss_fn


METHODS = [racer.label for racer in races.racers(2)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A race and the runs, at the sizes of `--smoke`."""
    folder = tmp_path_factory.mktemp("accelerator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lwsam_bench.support.cache.enable", lambda: None)
        assert smoke(folder, "gpt,cifar10") == 0
    return folder


def smoke(folder, pieces, *more):
    return main(
        ["accelerator", "--smoke", "--out", str(folder), "--pieces", pieces, *more]
    )


def rows_of(folder):
    return list(read_rows(folder / evidence.FILE))


def test_a_race_has_a_row_for_each_method(out):
    rows = [row for row in rows_of(out) if row["kind"] == "race"]
    assert [row["method"] for row in rows] == METHODS
    by_method = {row["method"]: row for row in rows}
    assert by_method["SGD"]["flops"] == by_method["SGD"]["time"] == 1.0
    assert by_method["SAM"]["flops"] == pytest.approx(2.0, abs=0.01)
    assert 1.0 < by_method["layer-wise SAM, top 2"]["flops"] <= 2.0
    assert by_method["SAM, ascent on 1/10"]["flops"] == pytest.approx(1.1, abs=0.01)
    for row in rows:
        assert row["items_per_second"] > 0
        assert row["memory_bytes"] > 0
        assert row["compile_seconds"] > 0
        assert row["config"]["compute"] == "bfloat16"
        assert row["origin"]["packages"]["jax"]


def test_runs_have_a_row_each(out):
    rows = [row for row in rows_of(out) if row["kind"] == "run"]
    assert [row["method"] for row in rows] == ["sgd", "sam", "momentum_sam"]
    assert [row["config"]["method"] for row in rows] == [row["method"] for row in rows]
    for row in rows:
        assert row["seed"] == row["config"]["seed"] == 0
        assert 0 <= row["accuracy"] <= 1
        assert row["data"]["name"] == "digits"
        assert (out / runs.RUNS / f"digits-{row['method']}-0" / "config.json").exists()


def test_what_has_rows_is_not_done_again(out, monkeypatch):
    monkeypatch.setattr("lwsam_bench.support.cache.enable", lambda: None)
    monkeypatch.setattr(races, "measure", None)
    monkeypatch.setattr(runs, "train", None)
    before = (out / evidence.FILE).read_bytes()
    assert smoke(out, "gpt,cifar10") == 0
    assert (out / evidence.FILE).read_bytes() == before


def test_the_page_says_that_a_cpu_is_none(out):
    page = (out / "accelerator.md").read_text()
    assert "These rows are of a CPU" in page
    assert all(f"| {method} |" in page for method in METHODS)
    assert report.published(rows_of(out)) == report.NONE + "\n"
    elsewhere = [
        {**row, "origin": {**row["origin"], "platform": "gpu"}} for row in rows_of(out)
    ]
    assert report.published(elsewhere) == report.section(elsewhere)
    assert "of a CPU" not in report.section(elsewhere)


def test_the_page_says_what_is_to_be_known_of_the_data(out):
    told = "The images of this copy are JPEG."
    rows = [row for row in rows_of(out) if row["kind"] == "run"]
    noted = [{**row, "data": {**row["data"], "note": told}} for row in rows]
    assert f"included. {told} JAX" in report.section(noted)
    assert "included. JAX" in report.section(rows)


class Clock:
    """Stands for the clock, the races and the runs: each takes some minutes."""

    def __init__(self, monkeypatch, takes):
        self.now, self.done, self.given = 0.0, [], []
        self._takes = takes
        monkeypatch.setattr(evidence.time, "monotonic", lambda: 60 * self.now)
        monkeypatch.setattr(races, "measure", self._race)
        monkeypatch.setattr(runs, "train", self._run)
        monkeypatch.setattr(evidence.report, "render", lambda *_: None)
        monkeypatch.setattr(evidence, "provenance", lambda: {"platform": "gpu"})

    def _race(self, net, *_):
        self.now += self._takes
        self.done.append(net.title)
        return [{"method": name} for name in METHODS]

    def _run(self, run, folder, data_dir, console, seconds):
        self.given.append(seconds)
        if seconds is not None and seconds < 60 * self._takes:
            self.now += seconds / 60
            return None, 0
        self.now += self._takes
        self.done.append(run.name)
        return {"method": run.method}, 0


def call(folder, minutes=None, wanted=None):
    console = Console(file=io.StringIO())
    wanted = wanted or evidence.Evidence()
    return evidence.run(wanted, None, str(folder), None, console, minutes=minutes)


def test_calls_of_some_minutes_do_the_same_as_one(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, takes=4)
    assert call(tmp_path / "one") == 0
    everything = list(clock.done)
    assert len(everything) == 4 + 9
    assert len(rows_of(tmp_path / "one")) == 4 * len(METHODS) + 9
    clock.done.clear()
    codes = []
    while not codes or codes[-1]:
        clock.now = 0.0
        codes.append(call(tmp_path / "parts", minutes=9))
        # Neither was begun too late: none can be stopped between, a run is given less.
        assert clock.now <= 9
    assert clock.done == everything
    assert codes == [1] * (len(codes) - 1) + [0]
    parts, one = rows_of(tmp_path / "parts"), rows_of(tmp_path / "one")
    assert parts == one


def test_a_race_begins_in_the_first_half_only(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, takes=5)
    assert call(tmp_path, minutes=9) == 1
    assert clock.done == ["ResNet-20"]
    # But the first of a call does begin, or there would be no end.
    clock.now = 0.0
    assert call(tmp_path, minutes=0.1) == 1
    assert clock.done == ["ResNet-20", "WRN-28-10"]


def test_rows_of_other_settings_are_refused(monkeypatch, tmp_path):
    Clock(monkeypatch, takes=1)
    assert call(tmp_path, wanted=evidence.Evidence(("gpt",))) == 0
    with pytest.raises(UserError, match=r"GPT.*other settings .*batch_size: 8 -> 10"):
        call(tmp_path, wanted=evidence.smoke(("gpt",)))


def test_missing_data_do_not_hide_the_races(monkeypatch, tmp_path):
    Clock(monkeypatch, takes=1)
    seen = []
    monkeypatch.setattr(
        evidence.report, "render", lambda rows, *_: seen.append(len(rows))
    )

    def missing(*_):
        raise UserError("cifar10 is not in")

    monkeypatch.setattr(runs, "train", missing)
    with pytest.raises(UserError, match="cifar10 is not in"):
        call(tmp_path, wanted=evidence.Evidence(("gpt", "cifar10")))
    assert seen == [len(METHODS)]


def test_a_run_stops_when_its_seconds_are_up_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr("lwsam_bench.training.tasks.make", tiny_task.make)
    console = Console(file=io.StringIO(), width=200)
    run = next(runs.runs(runs.SMOKE, 1))
    assert runs.train(run, tmp_path, None, console, 0.0) == (None, 0)
    assert "the same command goes on" in console.file.getvalue()
    row, code = runs.train(run, tmp_path, None, console, None)
    assert code == 0
    assert row["epoch"] == 2


def test_networks_have_the_published_sizes():
    """In shapes alone; and those of the smoke test stand for the same code."""
    millions = {"resnet20": 0.27, "wrn28-10": 36.5, "vit-b16": 86.6}
    for name, expected in millions.items():
        assert size(networks.FULL[name]) / 1e6 == pytest.approx(expected, rel=0.01)
    # GPT-2 small has 124 million; here the output has a matrix of its own, no bias.
    gpt = networks.FULL["gpt"]
    assert (size(gpt) - 50_257 * 768) / 1e6 == pytest.approx(124.4, rel=0.01)
    assert list(networks.SMOKE) == list(networks.FULL)


def size(net):
    made = nnx.eval_shape(lambda: net.build(nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(made, nnx.Param)))


@pytest.mark.parametrize("name", networks.SMOKE)
def test_computing_is_narrow_and_all_that_is_kept_is_wide(name):
    net = networks.SMOKE[name]
    made = networks.workload(net, seed=0)
    grad = jax.eval_shape(jax.grad(made.loss_fn, has_aux=True), *made.args())
    grads, (model_state, _) = grad
    assert {x.dtype for x in jax.tree.leaves((grads, model_state))} == {
        jnp.dtype(jnp.float32)
    }
    text = str(jax.make_jaxpr(made.loss_fn)(*made.args()))
    assert "bf16" in text


def test_narrow_and_wide_losses_are_close():
    net = networks.SMOKE["resnet20"]
    made = networks.workload(net, seed=0)
    wide = make_loss_fn(Network.of(net.build(nnx.Rngs(0))))
    narrow, expected = (f(*made.args())[0] for f in (made.loss_fn, wide))
    assert narrow.dtype == jnp.float32
    narrow, expected = float(narrow), float(expected)
    assert narrow == pytest.approx(expected, rel=0.02)
    assert narrow != expected


def test_the_command_line_knows_the_pieces(capsys):
    assert command_line.PIECES == evidence.PIECES
    with pytest.raises(SystemExit):
        main(["accelerator", "--minutes", "0"])
    assert "expected a finite number > 0, got '0'" in capsys.readouterr().err
    assert main(["accelerator", "--smoke", "--seeds", "2"]) == 2
    assert "--smoke chooses --seeds" in capsys.readouterr().err


def test_nothing_is_there_without_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("lwsam_bench.support.cache.enable", lambda: None)
    code = main(["accelerator", "--render-only", "--out", str(tmp_path)])
    assert code == 0
    assert report.NONE in (tmp_path / "accelerator.md").read_text()
    assert rows_of(tmp_path) == []
