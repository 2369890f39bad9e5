"""Who runs the cells: this process, or others that die with it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

from lwsam_bench.support import cores
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.rows import Row
from lwsam_bench.tuning.methods import BY_NAME
from lwsam_bench.tuning.protocol import Protocol, Request, tune
from lwsam_bench.tuning.results import Cell, lookup
from lwsam_bench.tuning.tasks import Task


Arguments = tuple[Task, Protocol, str | None]
OnRow = Callable[[Row], None]


class Hand:
    """Runs cells one after another; what is compiled stays for the next one's sake.

    Args:
      task: The task.
      protocol: How much is tried.
      data_dir: Folder of tensorflow-datasets.
    """

    def __init__(self, task: Task, protocol: Protocol, data_dir: str | None):
        self._task, self._protocol, self._data_dir = task, protocol, data_dir
        self._course: Any = None
        self._runner: Any = None
        self._runs = ""  # name of the runner's method
        self._origin: Any = None

    def run(self, cell: Cell, known: Sequence[Row], on_row: OnRow) -> None:
        """Run what is missing in a cell.

        Args:
          cell: The cell.
          known: Its rows so far.
          on_row: Takes each new row.
        """

        def one(request: Request) -> Row:
            row = lookup(known, request)
            if row is None:
                found = self._runner_of(cell).run(request)
                row = cell.row(request, found, self._task, self._protocol.trials)
                on_row({**row, "origin": self._origin})
            return row

        method = cell.method
        space = method.space(self._task.steps)
        tune(space, self._protocol, cell.draws, method.is_base, one)

    def _runner_of(self, cell: Cell) -> Any:
        # Imported late: a tuning that is complete needs none of it.
        from lwsam_bench.tuning.runs.images import ImageCourse
        from lwsam_bench.tuning.runs.runner import Runner
        from lwsam_bench.tuning.runs.text import TextCourse

        if self._course is None:
            kind = TextCourse if self._task.is_text else ImageCourse
            self._course = kind(self._task, self._data_dir)
            self._origin = provenance()
        if self._runs != cell.method.name:
            self._runner = Runner(self._course, cell.method)
            self._runs = cell.method.name
        return self._runner


def run_here(
    arguments: Arguments, cells: Sequence[Cell], rows: Sequence[Row], on_row: OnRow
) -> None:
    """Run cells in this process.

    Args:
      arguments: Those of `Hand`.
      cells: The cells.
      rows: Those that are there.
      on_row: Takes each new row.
    """
    hand = Hand(*arguments)
    for cell in cells:
        hand.run(cell, [row for row in rows if cell.holds(row)], on_row)


def run_apart(
    arguments: Arguments,
    cells: Sequence[Cell],
    rows: Sequence[Row],
    on_row: OnRow,
    processes: int,
) -> None:
    """Run cells in so many processes, each on one core; arguments as of `run_here`.

    Raises:
      UserError: What one of them raised.
      RuntimeError: If one of them ended.
    """
    waiting, known = list(cells), list(rows)
    context = multiprocessing.get_context("spawn")
    workers: dict[Any, Any] = {}
    busy: dict[Any, str] = {}  # the method that a worker has compiled
    try:
        for core in cores.each_its_own(min(processes, len(cells))):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_work, args=(theirs, core, arguments), daemon=True
            )
            worker.start()
            theirs.close()
            workers[ours] = worker
            _send_next(ours, waiting, known, busy)
        while workers:
            for found in connection.wait(list(workers)):
                pipe: Any = found
                try:
                    message = pipe.recv()
                except EOFError:
                    workers[pipe].join()
                    code = workers[pipe].exitcode
                    raise RuntimeError(
                        f"a process of `tune` ended with {code}"
                    ) from None
                if isinstance(message, UserError):
                    raise message
                if message is not None:
                    on_row(message)
                elif not _send_next(pipe, waiting, known, busy):
                    workers.pop(pipe).join()
    finally:
        for worker in workers.values():
            worker.terminate()


def _send_next(
    pipe: Any, waiting: list[Cell], rows: Sequence[Row], busy: dict[Any, str]
) -> bool:
    """Give a worker a cell; tell it to end and return False if there is none.

    The next cell is of the method that it has compiled, else of one that nobody else has.
    """
    if not waiting:
        busy.pop(pipe, None)
        pipe.send(None)
        return False
    mine = busy.get(pipe)
    others = {name for other, name in busy.items() if other is not pipe}
    cell = min(waiting, key=lambda c: (c.method.name != mine, c.method.name in others))
    waiting.remove(cell)
    busy[pipe] = cell.method.name
    known = [row for row in rows if cell.holds(row)]
    pipe.send((cell.method.name, cell.draws, known))
    return True


def _work(pipe: Any, core: int | None, arguments: Arguments) -> None:
    """Run what comes through a pipe, until None comes."""
    _die_with_the_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    cores.stay_on(core)
    from lwsam_bench.support import cache

    cache.enable()
    hand = Hand(*arguments)
    while (order := pipe.recv()) is not None:
        name, draws, known = order
        try:
            hand.run(Cell(BY_NAME[name], draws), known, pipe.send)
        except UserError as error:
            pipe.send(error)
            return
        pipe.send(None)


def _die_with_the_parent() -> None:
    """End this process when its parent ends, be it by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
