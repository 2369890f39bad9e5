"""The command `accelerator`: what is missing is measured, piece by piece.

A piece is a race of all methods on one network, or a run on CIFAR-10. Its rows are
written when it has ended, all at once; what has rows is not done again. A race cannot be
stopped between: it begins in the first half of the time that is given, and one that was
cut off starts over. A run stops when the time is up, and goes on in the next call.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from lwsam_bench.accelerator import networks, races, report, runs
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.row_lock import row_lock
from lwsam_bench.support.rows import output_folder, read_rows, Row, write_rows
from lwsam_bench.training.config import differences


FILE = "accelerator.jsonl"
CIFAR10 = "cifar10"
PIECES = (*networks.FULL, CIFAR10)  # most telling first


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Everything that decides what is measured.

    Attributes:
      pieces: Some of `PIECES`.
      seeds: Runs of each method on CIFAR-10.
      nets: The networks that are raced.
      length: Of a race.
      recipe: Of the runs.
    """

    pieces: tuple[str, ...] = PIECES
    seeds: int = 3
    nets: Mapping[str, networks.Net] = dataclasses.field(
        default_factory=lambda: networks.FULL
    )
    length: races.Length = races.FULL
    recipe: runs.Recipe = runs.FULL


def smoke(pieces: tuple[str, ...] = PIECES) -> Evidence:
    """Return the same pieces at tiny sizes, on digits: seconds each on a CPU."""
    return Evidence(pieces, 1, networks.SMOKE, races.SMOKE, runs.SMOKE)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What leaves rows together.

    Attributes:
      name: One of `PIECES`.
      title: In messages.
      seed: Of all that is drawn at random.
      config: What its rows are of.
      method: Of a run; None of a race, which has rows of all methods.
      work: Given the seconds left, returns rows, None if it is not done, and an exit
        code.
    """

    name: str
    title: str
    seed: int
    config: dict[str, Any]
    method: str | None
    work: Callable[[float | None], tuple[list[Row] | None, int]]

    def is_done(self, rows: list[Row]) -> bool:
        """Whether its rows are there."""
        return any(
            (row["piece"], row["seed"]) == (self.name, self.seed)
            and self.method in (None, row["method"])
            for row in rows
        )


def run(
    evidence: Evidence,
    data_dir: str | None,
    out: str,
    docs: str | None,
    console: Console,
    *,
    minutes: float | None = None,
    render_only: bool = False,
) -> int:
    """Measure what is missing in `out`, and render its page.

    Args:
      evidence: What is measured.
      data_dir: Folder of tensorflow-datasets.
      out: Folder of the rows, of the runs and of the page.
      docs: Folder with a page `accelerator.md` to be brought up to date, or None.
      console: Where to report.
      minutes: After so many no piece begins and a run stops; None does all in one call.
      render_only: Whether to leave it at the rows that are there.

    Returns:
      0, 1 if something is left to do, or that of a run that was stopped by a signal.

    Raises:
      UserError: If another process writes the rows, they are of other settings, or data
        are missing.
    """
    folder = output_folder(out)
    path = folder / FILE
    try:
        if render_only:
            return 0
        with row_lock(path):
            return _measure(evidence, folder, data_dir, console, minutes)
    finally:  # data that are missing do not hide what was measured
        rows = list(read_rows(path))
        report.render(rows, folder, docs)
        console.print(f"rows and page are in {folder}/", soft_wrap=True)


def _measure(
    evidence: Evidence,
    folder: pathlib.Path,
    data_dir: str | None,
    console: Console,
    minutes: float | None,
) -> int:
    began, path = time.monotonic(), folder / FILE
    pieces = _pieces(evidence, folder, data_dir, console)
    rows = list(read_rows(path))
    _refuse_others(path, rows, pieces)
    left = [piece for piece in pieces if not piece.is_done(rows)]
    for number, piece in enumerate(left):
        used = (time.monotonic() - began) / 60
        late = minutes is not None and used > (
            minutes / 2 if piece.method is None and number else minutes
        )
        if late:
            return _goes_on(console, len(left) - number)
        seconds = None if minutes is None else 60 * (minutes - used)
        found, code = piece.work(seconds)
        if found is not None:
            common = {
                "kind": "race" if piece.method is None else "run",
                "piece": piece.name,
                "title": piece.title,
                "seed": piece.seed,
            }
            end = {"config": piece.config, "origin": provenance()}
            rows += [{**common, **row, **end} for row in found]
            write_rows(path, rows)
            _say(console, f"{piece.title}: done")
        if code:
            return code
        if found is None:
            return _goes_on(console, len(left) - number)
    return 0


def _pieces(
    evidence: Evidence,
    folder: pathlib.Path,
    data_dir: str | None,
    console: Console,
) -> list[_Piece]:
    """Return the pieces that are asked for, in the order in which they are done."""
    made = []
    for name in evidence.pieces:
        if name == CIFAR10:
            made += [
                _run_piece(run, folder, data_dir, console)
                for run in runs.runs(evidence.recipe, evidence.seeds)
            ]
        else:
            made.append(_race_piece(name, evidence, console))
    return made


def _race_piece(name: str, evidence: Evidence, console: Console) -> _Piece:
    net = evidence.nets[name]
    return _Piece(
        name,
        net.title,
        0,
        races.config(net, evidence.length),
        None,
        lambda _: (races.measure(net, evidence.length, 0, console), 0),
    )


def _run_piece(
    run: runs.Run, folder: pathlib.Path, data_dir: str | None, console: Console
) -> _Piece:
    def work(seconds: float | None) -> tuple[list[Row] | None, int]:
        row, code = runs.train(run, folder, data_dir, console, seconds)
        return None if row is None else [row], code

    return _Piece(CIFAR10, run.name, run.seed, runs.config(run), run.method, work)


def _refuse_others(path: pathlib.Path, rows: list[Row], pieces: list[_Piece]) -> None:
    for piece in pieces:
        for row in rows:
            if not piece.is_done([row]):
                continue
            changes = differences(row["config"], piece.config)
            if changes:
                raise UserError(
                    f"{path} holds {piece.title} with other settings"
                    f" ({'; '.join(changes)}); choose another --out"
                )


def _goes_on(console: Console, left: int) -> int:
    pieces = "1 piece is" if left == 1 else f"{left} pieces are"
    _say(console, f"{pieces} left; the same command goes on")
    return 1


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
