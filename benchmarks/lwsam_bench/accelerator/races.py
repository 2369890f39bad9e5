"""A race: steps of all methods on one network, taking turns in one process."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console

import lwsam_jax as lwsam
from lwsam_bench.accelerator.networks import Net, workload
from lwsam_bench.speed import baselines
from lwsam_bench.speed.race import Compiled, fresh_cache, inspect, Lane, race, timing
from lwsam_bench.speed.racers import (
    FRACTION,
    MOMENTUM_RHO,
    MOMENTUM_SAM,
    NOISE,
    NOISE_RHO,
    PAPER_ALPHA,
    PAPER_RHO,
    PlainRacer,
    Racer,
    SAM_RHO,
    SAM_TENTH,
    SGD,
    TrainStepRacer,
)
from lwsam_bench.speed.workloads import Workload
from lwsam_bench.support.rows import Row


SAM = "SAM"
EXECUTABLES = 4  # of layer-wise SAM: each takes a minute to compile for a ViT-B


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a race is.

    Attributes:
      steps: Of each method.
      burst: Steps of a method before the next one has its turn: more than one keep a
        fast device busy.
    """

    steps: int = 200
    burst: int = 10


FULL = Length()
SMOKE = Length(steps=4, burst=1)


def racers(layers: int) -> list[Racer]:
    """Return the methods; the first is what the others are compared with."""
    paper = lwsam.LayerwiseSAM(k=layers, rho=PAPER_RHO, alpha=PAPER_ALPHA)
    tenth = lwsam.micro_batch(FRACTION)
    return [
        PlainRacer(SGD, baselines.sgd, 1.0),
        TrainStepRacer(SAM, lwsam.sam(SAM_RHO)),
        TrainStepRacer(
            f"layer-wise SAM, top {layers}", paper, max_executables=EXECUTABLES
        ),
        TrainStepRacer(SAM_TENTH, lwsam.sam(SAM_RHO, ascent=tenth)),
        PlainRacer(
            MOMENTUM_SAM,
            baselines.plain(lambda base: lwsam.momentum_sam(base, MOMENTUM_RHO)),
            1.0,
        ),
        PlainRacer(
            NOISE,
            baselines.plain(
                lambda base: lwsam.perturbed(base, NOISE_RHO, ascent=lwsam.random())
            ),
            1.0,
        ),
    ]


def config(net: Net, length: Length) -> dict[str, Any]:
    """What decides what is measured, for a row."""
    return {**net.config(), **dataclasses.asdict(length)}


def measure(net: Net, length: Length, seed: int, console: Console) -> list[Row]:
    """Race the methods on a network; return a row for each."""
    made = workload(net, seed)
    lanes = [Lane(racer, length.steps) for racer in racers(net.layers)]
    with fresh_cache(), console.status(net.title) as status:
        for lane in lanes:
            lane.racer.start(made)
        race(
            lanes,
            made.batches,
            length.burst,
            lambda done: status.update(f"{net.title}: step {done} of {length.steps}"),
        )
        status.update(f"{net.title}: reading the executables")
        plain = _plain_flops(lanes)
        return [
            _row(
                made, lane, lanes[0], list(inspect(lane.racer, made.batches(0))), plain
            )
            for lane in lanes
        ]


def _plain_flops(lanes: Sequence[Lane]) -> float:
    """Return the FLOPs of a plain gradient, by the cost model."""
    costs = [
        lane.racer.train_step.cost
        for lane in lanes
        if isinstance(lane.racer, TrainStepRacer)
    ]
    assert costs[0] is not None  # the step was made
    return costs[0].plain


def _row(
    made: Workload, lane: Lane, base: Lane, found: Sequence[Compiled], plain: float
) -> Row:
    took, sgd = timing(lane, base), timing(base, base)
    ratio = statistics.mean(lane.racer.ratios)
    return {
        "method": lane.racer.label,
        "data": made.data,
        "unit": made.unit,
        # SGD's, by the ratio: the machine may drift.
        "items_per_second": made.items / sgd.seconds / took.ratio,
        "seconds": took.seconds,
        "time": took.ratio,
        "time_quartiles": took.quartiles,
        "flops": ratio,
        "step_flops": plain * ratio,
        "step_flops_xla": max(program.flops for program in found),
        "memory_bytes": max(program.memory for program in found),
        "compile_seconds": lane.racer.compile_seconds,
        "executables": len(found),
        "waits": took.waits,
    }
