"""The command `speed`: the price of each method, measured against SGD in one process."""

import dataclasses
import pathlib
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from lwsam_bench.pages.docs import replace_generated
from lwsam_bench.speed import flops, limits, report, workloads
from lwsam_bench.speed.race import fresh_cache, inspect, Lane, race, timing
from lwsam_bench.speed.racers import everyone, PAPER, TrainStepRacer
from lwsam_bench.speed.workloads import Workload
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.rows import (
    output_folder,
    read_rows,
    Row,
    write_rows,
    write_text,
)


CHECK, ALL = "speed-check", "speed"  # files of rows, and marks of the page
MODELS = ("resnet20", "wrn16-2", "vit-s", "gpt")
HOST_STEPS = 10  # run after the race to measure what the host does


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """Everything that decides what is measured."""

    models: tuple[str, ...] = MODELS
    steps: int = 200
    batch_size: int | None = None  # None: that of each model
    burst: int | None = None  # None: 1 on a CPU, 10 on faster devices
    only: Mapping[str, int] | None = None  # methods with their steps; None: all
    check: bool = False
    seed: int = 0


# A tenth of ten images is one.
SMOKE = SpeedConfig(models=("smallcnn",), steps=6, batch_size=10)

CHECK_STEPS = 400


def check(steps: int | None = None) -> SpeedConfig:
    """Return what is compared with the limits: fewer rows than there are.

    Args:
      steps: Of the paper's rule, whose executables come as it meets new selections.
        Those whose time counts run an eighth of them; None takes `CHECK_STEPS`.
    """
    steps = steps or CHECK_STEPS
    return SpeedConfig(
        models=("resnet20",),
        batch_size=128,
        only={**dict.fromkeys(limits.TIMED, max(1, steps // 8)), PAPER: steps},
        check=True,
    )


def run(
    config: SpeedConfig,
    data_dir: str | None,
    out: str,
    docs: str | None,
    console: Console,
    *,
    render_only: bool = False,
) -> int:
    """Measure, and leave rows, tables and charts in `out`.

    A model that is measured again replaces its rows; those of others stay.

    Args:
      config: What is measured.
      data_dir: Folder of tensorflow-datasets.
      out: Folder of the rows; tables and charts come here, too.
      docs: Folder with a page `cost.md` to be brought up to date, or None.
      console: Where to report.
      render_only: Whether to leave it at the rows that are there.

    Returns:
      0, or 1 if the check was asked for and a limit is broken.
    """
    folder = output_folder(out)
    name = CHECK if config.check else ALL
    path = folder / f"{name}.jsonl"
    rows = list(read_rows(path))
    if not render_only:
        for model, found in _measure_all(config, data_dir, console):
            rows = [row for row in rows if row["model"] != model] + found
            write_rows(path, rows)
    models = report.by_model([row for row in rows if row["kind"] == "speed"])
    figures = limits.figures(rows) if config.check and models else []
    text = "\n".join(map(report.table, models)) + _check(figures)
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    write_text(folder / f"{name}-table.md", text)
    for some in models:
        report.plot(folder / f"{name}-{some[0]['model']}.png", some)
    if docs is not None:
        page = pathlib.Path(docs) / "cost.md"
        for some in models:
            report.plot(page.parent / chart(name, some), some)
        write_text(page, replace_generated(page, name, published(name, rows)))
    console.print(f"rows, tables and charts are in {folder}/", soft_wrap=True)
    return 0 if all(figure.holds for figure in figures) else 1


def published(name: str, rows: Sequence[Row]) -> str:
    """Return what the documentation has of the rows, a chart above each table.

    Args:
      name: `CHECK` or `ALL`.
      rows: Those of its file.
    """
    models = report.by_model([row for row in rows if row["kind"] == "speed"])
    if not models:
        return "No rows yet.\n"
    tables = [report.table(some, chart(name, some)) for some in models]
    return "\n".join(tables) + _check(limits.figures(rows) if name == CHECK else [])


def chart(name: str, rows: Sequence[Row]) -> str:
    """Return the place of a model's chart in the documentation."""
    return f"images/{name}-{rows[0]['model']}.png"


def _check(figures: Sequence[limits.Figure]) -> str:
    """Return the table of what has limits, and what misses its own."""
    if not figures:
        return ""
    missed = [figure.title for figure in figures if not figure.holds]
    kept = f"Missed: {'; '.join(missed)}." if missed else "All limits are kept."
    return f"\n{limits.table(figures).rstrip()}\n\n{kept}\n"


def _measure_all(
    config: SpeedConfig, data_dir: str | None, console: Console
) -> Iterator[tuple[str, list[Row]]]:
    origin = provenance()
    with fresh_cache():
        for model in config.models:
            workload = workloads.make(
                model, batch_size=config.batch_size, data_dir=data_dir, seed=config.seed
            )
            found = measure(workload, config, console)
            if config.check:
                found += _prices(workload.batch_size, console)
            yield model, [{**row, "model": model, "origin": origin} for row in found]


def _prices(batch_size: int, console: Console) -> list[Row]:
    """Return a row for each set of layers whose price has a limit."""
    with console.status("compiling fixed sets of layers"):
        cases = [case for case in flops.CASES if case.limit is not None]
        return [
            {"kind": "price", "case": found.case.title, "flops_xla": found.ratio}
            for found in flops.measure(batch_size, cases)
        ]


def measure(workload: Workload, config: SpeedConfig, console: Console) -> list[Row]:
    """Train all methods on a workload; return a row for each."""
    lanes = [
        Lane(racer, config.steps if config.only is None else config.only[racer.label])
        for racer in everyone()
        if config.only is None or racer.label in config.only
    ]
    burst = config.burst or (1 if jax.default_backend() == "cpu" else 10)
    last = max(lane.steps for lane in lanes)
    with console.status(workload.title) as status, warnings.catch_warnings():
        # A budget below the price of any layer: the row says that its steps are plain.
        warnings.filterwarnings("ignore", message=".*below the price of any layer.*")
        for lane in lanes:
            lane.racer.start(workload)
        race(
            lanes,
            workload.batches,
            burst,
            lambda done: status.update(f"{workload.title}: step {done} of {last}"),
        )
        status.update(f"{workload.title}: reading the executables")
        base: tuple[float, int] | None = None
        rows = []
        for lane in lanes:
            batch = workload.batches(0)
            found = list(inspect(lane.racer, batch))
            host = lane.racer.host_seconds(batch, HOST_STEPS)
            if base is None:  # the first is SGD, of one executable
                base = found[0].flops, found[0].memory
            row = _row(workload, lane, lanes[0], found, *base)
            host_us = 1e6 * statistics.median(host) if host else None
            rows.append({**row, "burst": burst, "host_us": host_us})
    return rows


def _row(
    workload: Workload,
    lane: Lane,
    first: Lane,
    found: Sequence[Any],
    base_flops: float,
    base_memory: int,
) -> Row:
    took = timing(lane, first)
    racer = lane.racer
    programs = [
        {
            "model": program.model,
            "xla": program.flops / base_flops,
            "memory": program.memory / base_memory,
            "steps": program.steps,
        }
        for program in found
    ]
    own: dict[str, Any] = {}
    if isinstance(racer, TrainStepRacer):
        step = racer.train_step
        assert step.layers is not None
        own = {
            "layers": len(step.layers),
            "layer_names": step.layers.names,
            "selections": racer.selections,
        }
    return {
        "kind": "speed",
        "method": racer.label,
        "data": workload.data,
        "batch_size": workload.batch_size,
        "steps": lane.steps,
        "flops": statistics.mean(racer.ratios),
        "flops_most": max(racer.ratios),
        "flops_xla": _mean_xla(programs, racer.ratios),
        "flops_most_xla": max(program["xla"] for program in programs),
        "time": took.ratio,
        "time_quartiles": took.quartiles,
        "seconds": took.seconds,
        # SGD's, by the ratio: the machine may drift, and not all run equally many steps.
        "items_per_second": workload.items / timing(first, first).seconds / took.ratio,
        "unit": workload.unit,
        "memory": max(program["memory"] for program in programs),
        "executables": len(programs),
        "compile_seconds": racer.compile_seconds,
        "waits": took.waits,
        "programs": programs,
        **own,
    }


def _mean_xla(programs: Sequence[Row], ratios: Sequence[float]) -> float:
    """Return the mean over the steps of what XLA counts for the executable that ran."""
    total = 0.0
    for ratio in ratios:
        # The nearest: the step reports the model's ratio in float32.
        nearest = min(programs, key=lambda program: abs(program["model"] - ratio))
        total += nearest["xla"]
    return total / len(ratios)
