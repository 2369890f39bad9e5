"""The command `faults`: breaks runs in every way it knows, and says what was lost."""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Sequence

from rich.console import Console

from lwsam_bench.faults import devices, disks, kills, processes, table
from lwsam_bench.faults.trainer import Trainer
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.rows import (
    output_folder,
    read_rows,
    Row,
    write_rows,
    write_text,
)


ROWS, TABLE = "faults.jsonl", "faults.md"


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much is broken.

    Attributes:
      kills: How often a run is killed.
      steps: Of each run.
      every: Steps between two checkpoints.
      method: What trains; its arguments.
      images: On what; its arguments.
      few_steps: Of runs on several devices, and in several processes.
      processes: That train together, of which one is killed.
      victims: Which of them, one after the other; 0 is the coordinator.
    """

    kills: int = 10
    steps: int = 400
    every: int = 7
    # All layers but one: a selection that changes from step to step.
    method: tuple[str, ...] = ("lwsam", "--k", "9")
    images: tuple[str, ...] = ("--batch-size", "32")
    few_steps: int = 60
    processes: int = 4
    victims: tuple[int, ...] = (3, 0)

    @property
    def fewer(self) -> tuple[int, ...]:
        """How many go on after that: halves, down to one."""
        return tuple(self.processes >> i for i in range(1, self.processes.bit_length()))


SMOKE = Extent(
    kills=2,
    steps=20,
    every=4,
    method=("sam",),
    images=("--batch-size", "8", "--train-images", "100", "--test-images", "50"),
    few_steps=20,
    processes=2,
    victims=(1,),
)
_RUN = ("--dataset", "digits", "--log-every", "1", "--method")


def run(
    extent: Extent, out_name: str, docs: str | None, console: Console, render_only: bool
) -> int:
    """Break runs, print and write what was lost.

    Returns:
      0, or 1 if something was.

    Raises:
      UserError: If a run ends as it should not.
    """
    out = output_folder(out_name)
    if render_only:
        rows = list(read_rows(out / ROWS))
        if not rows:
            raise UserError(f"{out / ROWS} has no rows")
    else:
        rows = list(_rows(extent, console))
        write_rows(out / ROWS, rows)
    text = table.markdown(rows)
    write_text(out / TABLE, text)
    console.print(text, highlight=False, soft_wrap=True)
    if docs is not None:
        table.update_page(pathlib.Path(docs), rows)
    return 0 if all(table.holds(row) for row in table.faults(rows)) else 1


def _rows(extent: Extent, console: Console) -> Sequence[Row]:
    with tempfile.TemporaryDirectory(prefix="lwsam-faults-") as name:
        folder = pathlib.Path(name)
        arguments = (
            *_RUN,
            *extent.method,
            *extent.images,
            "--steps",
            str(extent.steps),
        )
        arguments += ("--checkpoint-every", str(extent.every))
        trainer = Trainer(arguments, folder / "cache")
        unbroken, half = folder / "unbroken", folder / "half"
        ended = trainer.run(unbroken)
        if ended.code:
            raise UserError(f"the unbroken run fails: {ended.output}")
        disks.stop_half_way(trainer, half, extent.steps)
        together = processes.Together(
            trainer, folder / "processes", extent.processes, extent.few_steps
        )
        tests = [
            lambda: kills.kill(
                trainer,
                folder / "killed",
                unbroken,
                times=extent.kills,
                steps=extent.steps,
            ),
            *(
                lambda name=name: disks.damage(
                    trainer, half, folder / name.replace(" ", "-"), unbroken, name
                )
                for name in disks.DAMAGES
            ),
            lambda: disks.fill(trainer, folder / "full", unbroken),
            lambda: disks.forbid(trainer, folder / "closed", unbroken),
            lambda: devices.change(trainer, folder / "devices", extent.few_steps),
            lambda: together.kill_one(extent.victims),
            lambda: together.fewer(extent.fewer),
        ]
        rows: list[Row] = [
            {"kind": "config", **dataclasses.asdict(extent), **provenance()}
        ]
        for test in tests:
            began = time.perf_counter()
            row = {"kind": "fault", **test()}
            rows.append({**row, "seconds": round(time.perf_counter() - began, 1)})
            console.print(table.line(row), highlight=False, soft_wrap=True)
        return rows
