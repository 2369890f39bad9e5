"""Table 2: images a second of each method, all of them taking turns in one process.

Times of different runs cannot be compared, so all methods of a benchmark are raced
against each other, step by step, and leave one row. A benchmark whose row is there is not
raced again; one that was cut off starts over.
"""

import dataclasses
import pathlib
import statistics
import warnings
from collections.abc import Mapping

import jax
from rich.console import Console

from lwsam_bench.paper import published, setups
from lwsam_bench.paper.artefact import Artefact
from lwsam_bench.paper.request import Request
from lwsam_bench.paper.runs import grouped
from lwsam_bench.paper.throughput import report
from lwsam_bench.speed.race import Lane, race, timing
from lwsam_bench.speed.racers import TrainStepRacer
from lwsam_bench.speed.workloads import Workload
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.progress import reading
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.row_lock import row_lock
from lwsam_bench.support.rows import MetricsFile, output_folder, read_rows, Row
from lwsam_bench.training import earlier, methods, tasks
from lwsam_bench.training.config import TrainConfig
from lwsam_bench.training.recipe import make_optimizer, make_schedule


_FILE = "throughput.jsonl"
# A multiple of LookSAM's intervals: else some blocks of steps hold more ascents.
_BLOCK = 12
_BURST = 12  # steps of a turn on a fast device

STEPS: Mapping[str, int] = {"smoke": 4, "small": 60, "paper": 300}


def table2(request: Request) -> Artefact:
    """Race what is missing in `out` and return the artefact.

    Seeds and jobs are not read: a race has one of each, for whatever ran beside it would
    spoil it.
    """
    scale, console = request.scale, request.console
    path = output_folder(str(request.out)) / _FILE
    found: dict[str, Row] = {}
    missing: list[str] = []
    with row_lock(path), MetricsFile(path, keep_until=0) as file:
        for benchmark in setups.BENCHMARKS:
            row = finished(request.out, benchmark, scale)
            if row is None:
                try:
                    row = _row(benchmark, scale, request.data_dir, console)
                except UserError as error:
                    missing.append(benchmark)
                    console.print(
                        f"{error}\n{setups.TITLES[benchmark]} is left out.",
                        highlight=False,
                        soft_wrap=True,
                    )
                    continue
                file.write(row)
            found[benchmark] = row
    return report.render(found, missing, scale)


def configs(benchmark: str, scale: str) -> dict[str, TrainConfig]:
    """Return the configurations of a race, by what is in the tables; SGD is the first.

    Besides the methods of Table 2 these are the k of Table 4 that are not among them;
    smoke leaves them out, for most of its time is compiling.
    """
    setup = setups.setup(benchmark, scale)
    ks = [k for name, k in published.BY_K if name == benchmark and scale != "smoke"]
    lanes = {lane_of(setup, k): k for k in ks}
    return {
        **{what: setups.config(benchmark, what, scale, 0) for what in setups.LABELS},
        **{
            lane: setups.config(benchmark, "lwsam", scale, 0, k=k)
            for lane, k in lanes.items()
            if lane not in setups.LABELS
        },
    }


def lane_of(setup: setups.Setup, k: int | str) -> str:
    """Return what the race of a benchmark calls the layer-wise SAM of some k."""
    if isinstance(k, str) or k >= setup.layers:
        return "generalized_sam"
    return "lwsam" if k == setup.k else f"lwsam, k = {k}"


def _identity(benchmark: str, scale: str) -> Row:
    """Return what a row must agree in to stand for a race."""
    return {
        "kind": "throughput",
        "benchmark": benchmark,
        "steps": STEPS[scale],
        "configs": {
            lane: {**dataclasses.asdict(config), "decay_at": list(config.decay_at)}
            for lane, config in configs(benchmark, scale).items()
        },
    }


def finished(out: pathlib.Path, benchmark: str, scale: str) -> Row | None:
    """Return the row of a race that ended, if there is one in an output folder."""
    wanted = _identity(benchmark, scale)
    for row in map(earlier.race, read_rows(out / _FILE)):
        same = all(row.get(name) == value for name, value in wanted.items())
        if same and "failed" not in row:
            return row
    return None


def _row(benchmark: str, scale: str, data_dir: str | None, console: Console) -> Row:
    """Race the methods of a benchmark; a failure is a row, too."""
    workload = workload_of(benchmark, scale, data_dir, console)
    row = {**_identity(benchmark, scale), "origin": provenance()}
    try:
        return {**row, **measure(workload, configs(benchmark, scale), scale, console)}
    except Exception as error:  # of XLA, such as too little memory
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        console.print(f"{workload.title} failed: {reason}", highlight=False)
        return {**row, "failed": reason}


def workload_of(
    benchmark: str, scale: str, data_dir: str | None, console: Console
) -> Workload:
    """Return what all methods of a benchmark train.

    Raises:
      UserError: If data or weights are missing.
    """
    config = setups.config(benchmark, "sgd", scale, 0)
    with reading(console, config.dataset) as on_record:
        task = tasks.make(config, data_dir, on_record)
    source = f"{task.source['name']} {task.source['version']}"
    # The learning rate of the beginning of the run; it has no part in the time.
    schedule = make_schedule(config.lr, config.total_steps(task.steps_per_epoch))
    return Workload(
        title=f"{grouped.title(benchmark, scale)}, {config.model}",
        data=". ".join(filter(None, (source, task.note))),
        loss_fn=task.loss_fn,
        params=task.network.params,
        model_state=task.network.model_state,
        batches=task.batches,
        optimizer=make_optimizer(config, schedule),
        batch_size=config.batch_size,
        items=task.items_per_batch,
        unit=task.unit,
    )


def measure(
    workload: Workload,
    wanted: Mapping[str, TrainConfig],
    scale: str,
    console: Console,
) -> Row:
    """Race methods on a workload; return what was measured, by method.

    Args:
      workload: What they train.
      wanted: Their configurations; the first is what the others are compared with.
      scale: How long to race.
      console: Where to report.
    """
    steps = STEPS[scale]
    lanes = [
        Lane(TrainStepRacer(name, methods.configure(config, steps)), steps)
        for name, config in wanted.items()
    ]
    burst = 1 if jax.default_backend() == "cpu" else _BURST
    with console.status(workload.title) as status, warnings.catch_warnings():
        # A budget below the price of any layer: the FLOPs say that its steps are plain.
        warnings.filterwarnings("ignore", message=".*below the price of any layer.*")
        for lane in lanes:
            lane.racer.start(workload)
        race(
            lanes,
            workload.batches,
            burst,
            lambda done: status.update(f"{workload.title}: step {done} of {steps}"),
        )
    return {
        "title": workload.title,
        "data": workload.data,
        "burst": burst,
        "methods": {
            lane.racer.label: _measured(lane, lanes[0], workload) for lane in lanes
        },
    }


def _measured(lane: Lane, base: Lane, workload: Workload) -> Row:
    took, sgd = timing(lane, base, _BLOCK), timing(base, base, _BLOCK)
    return {
        # SGD's, by the ratio: what a lane's own seconds say depends on when the machine
        # was busy.
        "images_per_second": workload.items / sgd.seconds / took.ratio,
        "time": took.ratio,
        "time_quartiles": took.quartiles,
        "seconds": took.seconds,
        "flops": statistics.mean(lane.racer.ratios),
        "flops_most": max(lane.racer.ratios),
        "waits": took.waits,
        "compile_seconds": lane.racer.compile_seconds,
    }
