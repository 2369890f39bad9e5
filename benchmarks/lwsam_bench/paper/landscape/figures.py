"""Figures 2 and 6: the loss around a trained network, layer by layer (Appendix A.2).

Each network has a file in `landscape/` below the output folder, with a row for each row
of a grid, written as they come; a command that was cut off goes on with the next row.
"""

import dataclasses
import math
import pathlib
from collections.abc import Collection, Iterator, Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from lwsam_bench.paper import setups
from lwsam_bench.paper.artefact import Artefact
from lwsam_bench.paper.landscape import report
from lwsam_bench.paper.landscape.grid import choose_layers, Images, Layer, norm, Plane
from lwsam_bench.paper.request import Request
from lwsam_bench.paper.runs.outcome import DONE, Outcome, run_id
from lwsam_bench.paper.runs.sweep import Sweep
from lwsam_bench.support.progress import reading
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.row_lock import row_lock
from lwsam_bench.support.rows import MetricsFile, output_folder, read_rows, Row
from lwsam_bench.training import loop, tasks
from lwsam_bench.training.config import TrainConfig
from lwsam_bench.training.tasks import Task


BENCHMARK = "flowers"
FOLDER = "landscape"
LAYERS = 6

_FULL = tuple(range(-20, 20))  # A.2: from -20 to 19


@dataclasses.dataclass(frozen=True)
class Extent:
    """What a scale measures.

    Attributes:
      images: Training images behind each loss.
      steps: Places along each direction; 0 is the trained network itself.
    """

    images: int
    steps: tuple[int, ...] = _FULL


EXTENTS: Mapping[str, Extent] = {
    "smoke": Extent(images=64, steps=(-20, -10, 0, 10, 19)),
    "small": Extent(images=128),
    "paper": Extent(images=1_024),
}


def figure2(request: Request) -> Artefact:
    """Train with SGD what is missing, look around, and return the artefact.

    The figure shows one network, so the number of seeds is not read.
    """
    return _figure("figure2", ("sgd",), request)


def figure6(request: Request) -> Artefact:
    """Do the same with layer-wise SAM; what `figure2` shows stands beside it."""
    return _figure("figure6", ("sgd", "lwsam"), request)


def _figure(name: str, methods: tuple[str, ...], request: Request) -> Artefact:
    scale, out = request.scale, request.out
    configs = {m: setups.config(BENCHMARK, m, scale, 0) for m in methods}
    outcomes = Sweep.of(request).ensure(configs.values())
    scanner = Scanner(EXTENTS[scale], request.data_dir, out / FOLDER, request.console)
    found, troubles = {}, []
    for method, config in configs.items():
        outcome = outcomes[config]
        if outcome.status == DONE:
            found[method] = scanner.measure(config, outcome)
        else:
            troubles.append(
                f"{setups.METHODS[method]}: {outcome.status}, {outcome.reason}"
            )
    return report.render(name, methods, found, troubles, scale, out)


class Scanner:
    """Measures the landscapes of networks of one structure.

    Args:
      extent: What is measured.
      data_dir: Folder of tensorflow-datasets.
      folder: For the rows.
      console: Where to report.
    """

    def __init__(
        self,
        extent: Extent,
        data_dir: str | None,
        folder: pathlib.Path,
        console: Console,
    ):
        self._extent, self._data_dir, self._console = extent, data_dir, console
        self._folder = output_folder(str(folder))
        # What is read and compiled for one network does for the next.
        self._task: Task | None = None
        self._images: Images | None = None
        self._planes: dict[str, Plane] = {}

    def measure(self, config: TrainConfig, outcome: Outcome) -> list[Row]:
        """Return the rows of a network, after measuring those that are missing.

        Args:
          config: Of the run that trained it.
          outcome: Of that run.
        """
        path = self._folder / f"{run_id(config)}.jsonl"
        with row_lock(path):
            return self._measure(config, outcome, path)

    def _measure(
        self, config: TrainConfig, outcome: Outcome, path: pathlib.Path
    ) -> list[Row]:
        extent = {"images": self._extent.images, "steps": list(self._extent.steps)}
        rows = list(read_rows(path))
        # A run that was trained again is another network: its times tell.
        same_run = rows and rows[0].get("end", outcome.end) == outcome.end
        if not same_run or rows[0].get("extent") != extent:
            rows = []
        known = {(row["layer"], row["alpha"]) for row in rows if row["kind"] == "grid"}
        count = len(rows[0]["layers"]) * len(self._extent.steps) if rows else None
        if len(known) == count:
            return rows
        with MetricsFile(path, keep_until=0 if rows else None) as file:
            for row in self._missing(config, outcome, extent, known, not rows):
                file.write(row)
                rows.append(row)
        return rows

    def _missing(
        self,
        config: TrainConfig,
        outcome: Outcome,
        extent: Row,
        known: Collection[tuple[str, int]],
        first: bool,
    ) -> Iterator[Row]:
        """Yield a head if it is the first row, and what is not known yet."""
        task, images = self._read(config)
        run = outcome.folder
        state = loop.final_state(run, config, task)
        layers = choose_layers(task, LAYERS)
        yield {
            "kind": "landscape" if first else "continued",
            "run": run.name,
            "end": outcome.end,
            "extent": extent,
            "images": images.count,
            "note": task.note,
            "layers": [
                {
                    "name": layer.name,
                    "parameters": math.prod(layer.shape),
                    "norm": norm(layer, state.params),
                }
                for layer in layers
            ],
            "origin": provenance(),
        }
        steps = self._extent.steps
        total = len(layers) * len(steps)
        with self._progress() as bar:
            shown = bar.add_task(run.name, total=total, completed=len(known))
            for number, layer in enumerate(layers, start=1):
                missing = [alpha for alpha in steps if (layer.name, alpha) not in known]
                bar.update(shown, description=f"{run.name}, {layer.name}")
                for alpha in missing:
                    plane = self._plane(task, layer, images)
                    losses = plane.row(state.params, state.model_state, alpha, steps)
                    yield {
                        "kind": "grid",
                        "layer": layer.name,
                        "alpha": alpha,
                        "losses": losses,
                    }
                    bar.advance(shown)
                if missing:
                    self._console.print(
                        f"{run.name}: layer {number} of {len(layers)} done",
                        highlight=False,
                        soft_wrap=True,
                    )

    def _progress(self) -> Progress:
        """Return a bar for the rows, with the time left; for terminals alone."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )

    def _read(self, config: TrainConfig) -> tuple[Task, Images]:
        if self._task is None:
            with reading(self._console, config.dataset) as on_record:
                self._task = tasks.make(config, self._data_dir, on_record)
        if self._images is None:
            self._images = Images(self._task, self._extent.images)
        return self._task, self._images

    def _plane(self, task: Task, layer: Layer, images: Images) -> Plane:
        if layer.name not in self._planes:
            self._planes[layer.name] = Plane(task.network, layer, images)
        return self._planes[layer.name]
