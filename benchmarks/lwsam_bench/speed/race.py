"""Running the methods of `speed` in turns, and what is read off their executables."""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from lwsam_bench.speed.racers import Racer
from lwsam_bench.support.measure import flops


BLOCK = 10  # steps: a multiple of every period in the table


@dataclasses.dataclass
class Lane:
    """A method in the race, and the time of each of its steps.

    Attributes:
      racer: The method.
      steps: How many steps it runs.
      seconds: Of each step, until its result is there.
      compiled: Whether the step waited for a compiler.
    """

    racer: Racer
    steps: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    compiled: list[bool] = dataclasses.field(default_factory=list)

    def run(self, batches: Sequence[Any]) -> None:
        """Run a burst of steps on an idle device, and wait for them."""
        before = self.racer.compile_seconds
        began = time.perf_counter()
        result = None
        for batch in batches:
            result = self.racer.step(batch)
        jax.block_until_ready(result)
        took = (time.perf_counter() - began) / len(batches)
        compiled = self.racer.compile_seconds > before
        self.racer.note()
        self.seconds += [took] * len(batches)
        self.compiled += [compiled] * len(batches)


def race(
    lanes: Sequence[Lane],
    batches: Callable[[int], Any],
    burst: int,
    on_steps: Callable[[int], None],
) -> None:
    """Run all methods, a burst of steps each in turn, on the same batches.

    Args:
      lanes: The methods.
      batches: The batch of a step.
      burst: Steps of a method before the next one has its turn. 1 sees the same machine
        for all, more keep a fast device busy.
      on_steps: Called with the steps done after each round.
    """
    last = max(lane.steps for lane in lanes)
    for number, first in enumerate(range(0, last, burst)):
        group = [batches(step) for step in range(first, min(first + burst, last))]
        jax.block_until_ready(group)
        # Nobody always runs first.
        turn = number % len(lanes)
        for lane in (*lanes[turn:], *lanes[:turn]):
            mine = group[: max(0, lane.steps - first)]
            if mine:
                lane.run(mine)
        on_steps(first + len(group))


@dataclasses.dataclass(frozen=True)
class Timing:
    """A method's time over that of the first one, over blocks of steps."""

    ratio: float  # median
    quartiles: tuple[float, float]
    seconds: float  # median, of a step
    waits: float  # share of the second half's steps that waited for a compiler


def timing(lane: Lane, base: Lane, block_size: int = BLOCK) -> Timing:
    """Compare the steps that both ran, without warm-up and steps that compiled.

    A method's steps may differ in cost, so blocks of steps are compared: the sum of
    their times. Each step of a block was run close to that of the other method.

    Args:
      lane: The method.
      base: What it is compared with.
      block_size: Steps of a block, and of the warm-up; shorter races have smaller ones.
        A multiple of every period of the method.
    """
    count = min(lane.steps, base.steps)
    mine, other = np.asarray(lane.seconds[:count]), np.asarray(base.seconds[:count])
    valid = ~np.asarray(lane.compiled[:count]) & ~np.asarray(base.compiled[:count])
    size = min(block_size, max(1, count // 4))
    valid[: min(block_size, count // 4)] = False
    ratios, steps = [], []
    for start in range(0, count, size):
        block = slice(start, start + size)
        use = valid[block]
        if 2 * use.sum() >= size:
            ratios.append(mine[block][use].sum() / other[block][use].sum())
            steps.append(mine[block][use].mean())
    if not ratios:
        ratios = steps = [float("nan")]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    second_half = lane.compiled[lane.steps // 2 :]
    return Timing(
        ratio=median,
        quartiles=(low, high),
        seconds=statistics.median(steps),
        waits=sum(second_half) / max(1, len(second_half)),
    )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of one executable."""

    model: float  # FLOPs over a plain gradient, by the cost model
    steps: int
    flops: float
    memory: int  # bytes


def inspect(racer: Racer, batch: Any) -> Iterator[Compiled]:
    """Yield what XLA says of each executable that ran."""
    for program in racer.programs(batch):
        compiled = program.lower().compile()
        yield Compiled(program.model, program.steps, flops(compiled), memory(compiled))


def memory(compiled: Any) -> int:
    """Return the bytes that an executable needs, arguments and results included."""
    stats = compiled.memory_analysis()
    return (
        stats.temp_size_in_bytes
        + stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes  # results that take the place of arguments
    )


@contextlib.contextmanager
def fresh_cache() -> Iterator[None]:
    """Keep compiled programs in a folder that is empty at first and then thrown away.

    What a run compiles is measured, so nothing may be there before; what it inspects
    afterwards need not be compiled again.
    """
    options = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with tempfile.TemporaryDirectory() as folder:
        try:
            options["jax_compilation_cache_dir"] = folder
            _use(options)
            yield
        finally:
            _use(before)


def _use(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it holds on to the folder it first saw
