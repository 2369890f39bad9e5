"""Which runs a tuning has: trials, the best again, the best of those on fresh seeds.

Each run is asked for when it is known which it is, and whoever runs it may find it done:
so a tuning that was stopped goes on where it was.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lwsam_bench.support.rows import Row
from lwsam_bench.tuning.space import drawn, points, rounds, Space


AGAIN = 3  # configurations that run again,
AGAIN_SEEDS = 2  # each on so many more seeds
# A base optimizer's final runs are also for half and for twice the steps.
LENGTHS = (1.0, 0.5, 2.0)

# Tuning seeds are none of the final ones, and each set of draws has its own.
_TUNING_SEED, _SEEDS_OF_DRAWS = 1000, 10


@dataclasses.dataclass(frozen=True)
class Request:
    """A run.

    Attributes:
      phase: "trial", "again" or "final".
      trial: Number of the trial whose configuration it has.
      seed: Decides initial parameters, noise, validation images and order.
      config: What was drawn.
      length: Its steps over those of the configuration.
      space: The ranges of the round that the configuration was drawn in.
    """

    phase: str
    trial: int
    seed: int
    config: Mapping[str, Any]
    length: float = 1.0
    space: Space = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What no other run of the tuning of this method has."""
        return self.phase, self.trial, self.seed, self.length


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How much is tried, the same for all methods.

    Attributes:
      trials: Configurations that are drawn.
      seeds: Fresh seeds, 0 and up, on which the best one runs.
      draws: Sets of draws: the whole tuning is done so often.
    """

    trials: int = 32
    seeds: int = 5
    draws: int = 2

    def runs(self, base: bool) -> int:
        """Return the number of runs of a method in one set of draws.

        Args:
          base: Whether it is a base optimizer, which also runs at other lengths.
        """
        again = min(AGAIN, self.trials) * AGAIN_SEEDS
        return self.trials + again + self.seeds * (len(LENGTHS) if base else 1)


def tune(
    space: Space,
    protocol: Protocol,
    draws: int,
    base: bool,
    run: Callable[[Request], Row],
) -> None:
    """Ask for all runs of a method in one set of draws.

    Args:
      space: The method's ranges.
      protocol: How much is tried.
      draws: Number of the set of draws.
      base: Whether it is a base optimizer.
      run: Runs, or finds what a run left: a row with `validation`, see `merit`.
    """
    seed = _TUNING_SEED + _SEEDS_OF_DRAWS * draws
    tried: dict[int, list[Row]] = {}
    asked: dict[int, Request] = {}
    cube = points(protocol.trials, draws)
    for number in rounds(protocol.trials):
        if tried:
            best = asked[_best(tried)].config
            space = {name: space[name].after(best[name]) for name in space}
        for _ in range(number):
            trial = len(tried)
            config = drawn(space, cube[trial], trial)
            asked[trial] = Request("trial", trial, seed, config, space=space)
            tried[trial] = [run(asked[trial])]
    chosen = sorted(tried, key=lambda trial: merit(tried[trial]), reverse=True)
    for trial in chosen[:AGAIN]:
        for more in range(1, AGAIN_SEEDS + 1):
            again = dataclasses.replace(asked[trial], phase="again", seed=seed + more)
            tried[trial].append(run(again))
    best = max(chosen[:AGAIN], key=lambda trial: merit(tried[trial]))
    for length in LENGTHS if base else LENGTHS[:1]:
        for fresh in range(protocol.seeds):
            run(
                dataclasses.replace(
                    asked[best], phase="final", seed=fresh, length=length
                )
            )


def merit(rows: Sequence[Row]) -> tuple[float, float]:
    """Return what makes a configuration the best: see `goodness`, mean over seeds.

    Of the last step, in validation, where labels have noise as those that are learned.
    """
    found = [goodness(row["validation"]) for row in rows]
    first, second = (statistics.mean(some) for some in zip(*found, strict=True))
    return first, second


def goodness(validation: Row) -> tuple[float, float]:
    """Return what is the greater the better: accuracy, and then how low the loss is.

    Where the row has `bits` (per character), it is the loss alone.
    """
    loss = validation["loss"]
    low = -float("inf") if loss is None else -loss  # rows have no infinities
    return low if "bits" in validation else validation["accuracy"], low


def _best(tried: Mapping[int, Sequence[Row]]) -> int:
    return max(tried, key=lambda trial: merit(tried[trial]))
