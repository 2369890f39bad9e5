"""The command `find-rho`: run what is missing, then write the table."""

import dataclasses
import pathlib
from collections.abc import Sequence

from rich.console import Console

from lwsam_bench.pages.docs import replace_generated
from lwsam_bench.radius import report, trials
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.row_lock import row_lock
from lwsam_bench.support.rows import MetricsFile, output_folder, read_rows, Row
from lwsam_bench.tuning.tasks import Task, TASKS


ROWS, TABLE, PAGE, PLACE = "rows.jsonl", "table.md", "helps.md", "find-rho"
NOISE = 0.4
# Two of them without noise: there a proposal may do no harm.
FOUR = {
    f"{TASK}, {'40 % noise' if noise else 'no noise'}": dataclasses.replace(
        TASKS[TASK], noise=noise
    )
    for TASK in ("digits", "fashion-1000")
    for noise in (NOISE, 0.0)
}


def run(
    names: Sequence[str],
    data_dir: str | None,
    out: str,
    console: Console,
    *,
    docs: str | None = None,
    render_only: bool = False,
) -> int:
    """Run the trainings and sweeps that are missing, then write the table.

    Args:
      names: Tasks, of `FOUR`.
      data_dir: Folder of tensorflow-datasets.
      out: Folder of the rows and of the table.
      console: Where to report.
      docs: Folder with a page `helps.md` to be brought up to date, or None.
      render_only: Whether to leave it at the rows that are there.
    """
    folder = output_folder(out)
    if not render_only:
        with row_lock(folder / ROWS):
            for name in names:
                _run(name, FOUR[name], folder / ROWS, data_dir, console)
    text = markdown(list(read_rows(folder / ROWS)))
    (folder / TABLE).write_text(text, encoding="utf-8")
    console.print(text, markup=False)
    if docs is not None:
        page = pathlib.Path(docs) / PAGE
        page.write_text(replace_generated(page, PLACE, text), encoding="utf-8")
    return 0


def _run(
    name: str, task: Task, path: pathlib.Path, data_dir: str | None, console: Console
) -> None:
    done = {_key(row) for row in read_rows(path)}
    missing = [key for key in _wanted(name) if key not in done]
    if not missing:
        return
    from lwsam_bench.tuning.runs.course import VALIDATION
    from lwsam_bench.tuning.runs.images import ImageCourse

    courses = (ImageCourse(task, data_dir, held=x) for x in (VALIDATION, trials.HELD))
    trainer, origin = trials.Trainer(*courses), provenance()
    with MetricsFile(path, keep_until=0) as file:
        for kind, _, rho, seed in missing:
            row = trainer.sweep(seed) if rho is None else trainer.grid(rho, seed)
            file.write({"task": name, **row, "origin": origin})
            said = row["why"] if rho is None else f"{row['accuracy']:.3f}"
            console.print(f"{name}: {kind} {rho or ''} {seed}: {said}", markup=False)


def _wanted(name: str) -> list[tuple[str, str, float | None, int]]:
    """Return what identifies each row of a task: kind, task, radius, seed."""
    radii = (0.0, *trials.RADII)
    grid = [("grid", name, rho, seed) for seed in trials.SEEDS for rho in radii]
    return [("sweep", name, None, trials.SWEEP_SEED), *grid]


def _key(row: Row) -> tuple[object, ...]:
    rho = row["rho"] if row["kind"] == "grid" else None
    return row["kind"], row["task"], rho, row["seed"]


def judged(rows: Sequence[Row]) -> list[report.Judged]:
    """Return the tasks of which there are a sweep and a grid."""
    found = []
    for name in FOUR:
        own = [row for row in rows if row["task"] == name]
        if {row["kind"] for row in own} == {"sweep", "grid"}:
            found.append(report.judge(name, own, trials.STEPS))
    return found


def markdown(rows: Sequence[Row]) -> str:
    """Return the table of the tasks whose rows are there, and what it comes to."""
    found = judged(rows)
    if not found:
        return "No rows yet.\n"
    return f"{report.table(found)}\n{report.verdict(found)}"
