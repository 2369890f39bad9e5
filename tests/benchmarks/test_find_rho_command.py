"""The command `find-rho`: what it runs, what it finds done, and how it judges."""

import json
import pathlib

import pytest
from rich.console import Console

from lwsam_bench.models import smallcnn
from lwsam_bench.radius import report, run, trials
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import read_rows


ROOT = pathlib.Path(__file__).resolve().parents[2]


def rows_of(rho, by_rho, gradients=5700.0):
    sweep = {"kind": "sweep", "seed": 1000, "rho": rho, "gradients": gradients}
    grid = [
        {"kind": "grid", "rho": radius, "seed": seed, "accuracy": accuracy}
        for radius, found in by_rho.items()
        for seed, accuracy in enumerate(found)
    ]
    return [sweep, *grid]


BY_RHO = {0.0: [0.6, 0.7], 0.4: [0.9, 0.92], 0.8: [0.9, 0.94]}


def test_a_proposal_is_judged_by_the_grid_and_by_sgd():
    judged = report.judge("digits", rows_of(0.4, BY_RHO), 400)
    assert judged.sgd.mean == pytest.approx(0.65)
    assert (judged.best, judged.of_best.mean) == (0.8, pytest.approx(0.92))
    assert (judged.proposed, judged.of_proposed.mean) == (0.4, pytest.approx(0.91))
    assert judged.cost == pytest.approx(14.25)
    assert judged.change.mean == pytest.approx(0.26)
    assert judged.change.error == pytest.approx(0.04)  # of 0.3 and 0.22, paired
    assert judged.does_no_harm
    assert judged.is_near_the_best


def test_a_proposal_of_0_does_no_harm_and_a_worse_one_does():
    nothing = report.judge("digits", rows_of(0.0, BY_RHO), 400)
    assert nothing.change == (0.0, 0.0)
    assert nothing.does_no_harm
    assert not nothing.is_near_the_best
    worse = report.judge("x", rows_of(0.4, {0.0: [0.9, 0.9], 0.4: [0.8, 0.82]}), 400)
    assert not worse.does_no_harm


def test_the_table_has_a_line_for_each_task():
    table = report.table([report.judge("digits", rows_of(0.4, BY_RHO), 400)])
    assert table.splitlines()[-1] == (
        "| digits | 65.0 ± 5.0 | 92.0 ± 2.0 (0.8) | 91.0 ± 1.0 (0.4) | +26.0 ± 4.0"
        " | 14.2 trainings |"
    )


def test_the_verdict_names_the_tasks_that_fail():
    good = report.judge("digits", rows_of(0.4, BY_RHO), 400)
    missed = report.judge("x", rows_of(0.0, BY_RHO), 400)
    harmed = report.judge("y", rows_of(0.4, {0.0: [0.9, 0.9], 0.4: [0.8, 0.82]}), 400)
    assert report.verdict([good]).count("on no task") == 2
    harm, behind = report.verdict([good, missed, harmed]).splitlines()
    assert harm.endswith("two standard errors on y.")
    assert behind.endswith("grid's best on x.")


def test_two_of_the_four_tasks_are_clean():
    assert len(run.FOUR) == 4
    assert [task.noise for task in run.FOUR.values()] == [0.4, 0.0, 0.4, 0.0]
    assert 0.0 not in trials.RADII
    assert sorted(trials.RADII) == list(trials.RADII)


def committed():
    return list(read_rows(ROOT / "benchmarks/results/find-rho" / run.ROWS))


def test_what_the_committed_rows_say():
    """A proposal harms nowhere, and finds what there is to gain under noise."""
    judged = {x.task: x for x in run.judged(committed())}
    assert judged.keys() == run.FOUR.keys()
    assert all(x.does_no_harm for x in judged.values())
    assert judged["digits, 40 % noise"].is_near_the_best
    assert judged["digits, 40 % noise"].proposed > 0


CALLS: list = []


class Fake:
    """A trainer that only counts."""

    def __init__(self, course, sweeping):
        del course, sweeping

    def grid(self, rho, seed):
        CALLS.append((rho, seed))
        row = {"kind": "grid", "rho": rho, "seed": seed, "accuracy": 0.5 + 0.01 * rho}
        return row

    def sweep(self, seed):
        CALLS.append(("sweep", seed))
        found = {"rho": 0.4, "gradients": 400.0, "why": "because"}
        return {"kind": "sweep", "seed": seed, **found}


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "Trainer", Fake)
    monkeypatch.setattr(
        "lwsam_bench.tuning.runs.images.ImageCourse", lambda *_, held: None
    )
    CALLS.clear()
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / run.PAGE
    page.write_text(
        "a\n<!-- generated: find-rho -->\nold\n<!-- end of generated -->\nb\n"
    )
    names, console = list(run.FOUR)[:2], Console(quiet=True)
    out = tmp_path / "out"
    run.run(names, None, str(out), console, docs=str(docs))
    wanted = 2 * (1 + len(trials.SEEDS) * (1 + len(trials.RADII)))
    assert len(CALLS) == wanted
    table = (out / run.TABLE).read_text()
    assert [name in table for name in run.FOUR] == [True, True, False, False]
    assert table in page.read_text()
    assert "old" not in page.read_text()
    lines = (out / run.ROWS).read_text().splitlines()
    (out / run.ROWS).write_text("\n".join(lines[:5] + lines[6:]) + "\n")
    run.run(names, None, str(out), console)
    assert len(CALLS) == wanted + 1  # the one that was missing
    assert len({json.dumps(json.loads(line)) for line in lines}) == wanted
    run.run(names, None, str(out), console, render_only=True)
    with pytest.raises(UserError, match="no page with the marks"):
        run.run(names, None, str(out), console, docs=str(tmp_path), render_only=True)


def test_it_trains_sweeps_and_judges(tmp_path, monkeypatch):
    """Of everything as little as there can be."""
    monkeypatch.setattr(smallcnn, "BLOCKS", ((4, 1),))
    for name, value in (
        ("STEPS", 4),
        ("SWEEP_STEPS", 4),
        ("SEEDS", range(1)),
        ("RADII", (0.4, 0.8)),
    ):
        monkeypatch.setattr(trials, name, value)
    (name, *_) = run.FOUR
    run.run([name], None, str(tmp_path), Console(quiet=True))
    rows = [json.loads(line) for line in (tmp_path / run.ROWS).read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["sweep", "grid", "grid", "grid"]
    sweep, *grid = rows
    tried = {rho for rho, _, _ in sweep["trials"]}
    assert tried == {0.0, *(0.4 * 2.0**i for i in range(-3, 4))}
    assert {len(scores) for _, _, scores in sweep["trials"]} == {trials.REPEATS}
    assert sweep["gradients"] == pytest.approx(1.1 * sweep["steps"], rel=0.02)
    assert [row["rho"] for row in grid] == [0.0, 0.4, 0.8]
    assert all(0 <= row["accuracy"] <= 1 for row in grid)
    assert len({row["validation"] for row in grid}) >= 1
    assert (tmp_path / run.TABLE).read_text().count(name) == 1
