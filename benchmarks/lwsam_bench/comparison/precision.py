"""The command `precision`: one training in float32, bfloat16 and float16, with faults.

Some batches of every run have a NaN in them, and these steps are skipped. Each run is one
row of a file that is written as the runs end; the command goes on where it was stopped.
"""

import dataclasses
import statistics
from collections.abc import Sequence

from rich.console import Console

from lwsam_bench.comparison.precision_train import Course, PRECISIONS, Task
from lwsam_bench.pages import report
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.progress import reading
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.row_lock import row_lock
from lwsam_bench.support.rows import (
    MetricsFile,
    output_folder,
    read_rows,
    Row,
    write_text,
)
from lwsam_bench.training.config import differences


ROWS, TABLE, MARK = "precision.jsonl", "precision.md", "precision"
LIMIT = 0.01  # of the mean accuracy, below that of float32


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Everything that decides which runs there are."""

    task: Task = dataclasses.field(default_factory=Task)
    precisions: tuple[str, ...] = PRECISIONS
    seeds: int = 3


def run(
    config: PrecisionConfig, data_dir: str | None, out: str, console: Console
) -> int:
    """Train what is missing in `out`, then write the table.

    Returns:
      0; 1 if a precision is more than a point below float32, or if a step was taken
      that should have been skipped.

    Raises:
      UserError: If another process is writing the rows, or they are of another task.
    """
    folder = output_folder(out)
    path = folder / ROWS
    with row_lock(path):
        rows = list(read_rows(path))
        for row in rows:
            wanted = dataclasses.asdict(config.task)
            changes = differences(row.get("task", {}), wanted)
            if changes:
                raise UserError(
                    f"{path} holds runs of another task ({'; '.join(changes)}); choose"
                    " another --out"
                )
        with MetricsFile(path, keep_until=0) as file:
            rows += _missing(config, data_dir, rows, file, console)
    text = markdown(rows)
    write_text(folder / TABLE, text)
    console.print(text, highlight=False, soft_wrap=True)
    failures = broken(rows)
    for failure in failures:
        console.print(failure, highlight=False, soft_wrap=True)
    return 1 if failures else 0


def markdown(rows: Sequence[Row]) -> str:
    """Return the table of the rows, with a note on the task."""
    header, cells = _table(rows)
    return report.markdown(header, cells, _notes(rows))


def _missing(
    config: PrecisionConfig,
    data_dir: str | None,
    rows: Sequence[Row],
    file: MetricsFile,
    console: Console,
) -> list[Row]:
    """Run what has no row yet; return the rows."""
    done = {(row["precision"], row["seed"]) for row in rows}
    wanted = [(p, seed) for p in config.precisions for seed in range(config.seeds)]
    course, found = None, []
    for precision, seed in wanted:
        if (precision, seed) in done:
            continue
        if course is None:
            with reading(console, config.task.dataset) as on_record:
                course = Course(config.task, data_dir, on_record)
        row: Row = {
            "kind": "run",
            "precision": precision,
            "seed": seed,
            **course.run(precision, seed),
            "task": dataclasses.asdict(config.task),
            "origin": provenance(),
        }
        file.write(row)
        found.append(row)
        console.print(
            f"{precision}, seed {seed}: {row['test_accuracy']:.1%},"
            f" {row['skipped']} skipped, {row['seconds']:.0f} s",
            highlight=False,
        )
    return found


def _of(rows: Sequence[Row], precision: str) -> list[Row]:
    return [row for row in rows if row["precision"] == precision]


def _mean(rows: Sequence[Row]) -> float:
    return statistics.mean(row["test_accuracy"] for row in rows)


def broken(rows: Sequence[Row]) -> list[str]:
    """Return what does not hold, as sentences."""
    found = [
        f"{row['precision']}, seed {row['seed']}: {row['faults']} batches had a NaN, but"
        f" {row['skipped']} steps were skipped"
        for row in rows
        if row["skipped"] < row["faults"]
    ]
    base = _of(rows, PRECISIONS[0])
    for precision in PRECISIONS[1:]:
        mine = _of(rows, precision)
        if base and mine and _mean(mine) < _mean(base) - LIMIT:
            found.append(
                f"{precision} is {100 * (_mean(base) - _mean(mine)):.1f} points below"
                f" {PRECISIONS[0]}"
            )
    return found


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    header = [
        "precision",
        "test accuracy",
        "over float32",
        "with a NaN",
        "skipped",
        "loss scale at the end",
    ]
    cells = []
    base = _of(rows, PRECISIONS[0])
    for precision in PRECISIONS:
        mine = _of(rows, precision)
        if not mine:
            continue
        mean, error = report.mean_and_error([row["test_accuracy"] for row in mine])
        more = f"{100 * (_mean(mine) - _mean(base)):+.2f}" if base else "-"
        scales = {row["loss_scale"] for row in mine} - {None}
        cells.append(
            [
                precision,
                f"{100 * mean:.2f} ± {100 * error:.2f}",
                more,
                ", ".join(str(row["faults"]) for row in mine),
                ", ".join(str(row["skipped"]) for row in mine),
                ", ".join(f"{scale:g}" for scale in sorted(scales)) or "-",
            ]
        )
    return header, cells


def _notes(rows: Sequence[Row]) -> str:
    task = Task(**rows[0]["task"])
    number = len({row["seed"] for row in rows})
    return (
        f"{task.dataset} at {task.image_size} x {task.image_size}, {task.train_images:,}"
        f" training images, a residual CNN of 10 layers, SAM at rho {task.rho:g},"
        f" {task.steps} steps of {task.batch_size}, {number} seeds (± is the standard"
        " error), on CPU. Parameters, BatchNorm statistics and the cross-entropy are"
        " float32, the network computes in the precision named; float16 has a dynamic"
        " loss scale, whose overflows are skipped beside the batches with a NaN."
    )
