"""The command `tune`: run what is missing of a tuning, then write its pages."""

import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lwsam_bench.support.row_lock import row_lock
from lwsam_bench.support.rows import output_folder, Row
from lwsam_bench.tuning import workers
from lwsam_bench.tuning.method import Method
from lwsam_bench.tuning.protocol import Protocol
from lwsam_bench.tuning.report import family, page
from lwsam_bench.tuning.results import Cell, Results, ROWS
from lwsam_bench.tuning.tasks import Task


_SPEED_OVER = 600  # seconds: compiling comes and goes
_SAY_EVERY = 60  # seconds, where there is no terminal


def run(
    task: Task,
    methods: Sequence[Method],
    protocol: Protocol,
    data_dir: str | None,
    out: str,
    console: Console,
    *,
    docs: str | None = None,
    processes: int = 0,
    render_only: bool = False,
) -> int:
    """Run what is missing in `out`, then write tables and plots.

    Args:
      task: The task.
      methods: What is tuned.
      protocol: How much is tried.
      data_dir: Folder of tensorflow-datasets.
      out: Folder of the rows; pages come here, too.
      console: Where to report.
      docs: Folder with the pages `tuning.md`, `pareto.md` and `choose.md` to be brought
        up to date, from all tunings beside `out`, or `family.md` if presets are among the
        methods; or None.
      processes: How many run at a time, each on one core; 0: this one alone, on all
        that it has.
      render_only: Whether to leave it at the rows that are there.

    Raises:
      UserError: If another process is writing the rows, or they are of another tuning.
    """
    folder = output_folder(out)
    if not render_only:
        with row_lock(folder / ROWS):
            results = Results(folder, task, protocol)
            try:
                _run(task, methods, protocol, data_dir, results, console, processes)
            finally:
                results.close()
    of_family = family.is_of_family(methods)
    (family if of_family else page).write(folder)
    if docs is not None:
        (family if of_family else page).write_docs(folder.parent, docs)
    console.print(f"rows, tables and plots are in {folder}/", soft_wrap=True)
    return 0


def _run(
    task: Task,
    methods: Sequence[Method],
    protocol: Protocol,
    data_dir: str | None,
    results: Results,
    console: Console,
    processes: int,
) -> None:
    cells = [Cell(m, draws) for m in methods for draws in range(protocol.draws)]
    arguments = task, protocol, data_dir
    with _Bar(console, task.label, _count(cells, protocol)) as bar:
        rows = [row for row in results.rows if any(cell.holds(row) for cell in cells)]
        bar.start_at(len(rows))

        def on_row(row: Row) -> None:
            results.add(row)
            bar.add(row)

        if processes == 0:
            workers.run_here(arguments, cells, rows, on_row)
        else:
            workers.run_apart(arguments, cells, rows, on_row, processes)


def _count(cells: Sequence[Cell], protocol: Protocol) -> int:
    return sum(protocol.runs(cell.method.is_base) for cell in cells)


class _Bar:
    """A line with the time left, on a terminal; a line a minute elsewhere."""

    def __init__(self, console: Console, name: str, total: int):
        self._console, self._name, self._total = console, name, total
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=_SPEED_OVER,
        )
        self._task = self._bar.add_task(name, total=total)
        self._done = self._before = 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start_at(self, done: int) -> None:
        """Say how many runs were there before."""
        self._done = self._before = done
        self._bar.update(self._task, completed=done)

    def add(self, row: Row) -> None:
        """Show one more run."""
        self._done += 1
        what = f"{row['method']}, draws {row['draws'] + 1}, {row['phase']}"
        self._bar.update(self._task, completed=self._done, description=what)
        now = time.monotonic()
        if self._console.is_terminal or now - self._said < _SAY_EVERY:
            return
        self._said = now
        each = (now - self._began) / (self._done - self._before)
        left = each * (self._total - self._done)
        self._console.print(
            f"{self._name}: {self._done} of {self._total} runs, {what};"
            f" {each:.1f} s a run, {left / 60:.0f} min left",
            highlight=False,
            soft_wrap=True,
        )
