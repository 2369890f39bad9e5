"""The rows that a training run leaves in `metrics.jsonl`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import lwsam_jax as lwsam
from lwsam_bench.support.progress import name_layers
from lwsam_bench.support.rows import Row


def train_row(
    info: Any,
    names: Sequence[str],
    lr: Callable[[int], Any],
    where: Row,
    seconds: float,
) -> Row:
    """Return what a step reports.

    Args:
      info: The `StepInfo` of the step.
      names: Of the layers.
      lr: The learning rate, by the number of steps done.
      where: The row's `step` and `epoch`.
      seconds: Since training began or went on.
    """
    host = jax.device_get(info)
    return {
        "kind": "train",
        **where,
        "loss": float(host.value),
        "perturbed_loss": float(host.perturbed_value),
        "accuracy": float(host.metrics["accuracy"]),
        "lr": float(lr(where["step"] - 1)),
        "rho": float(host.rho),
        "overhead": float(host.overhead),
        "finite": bool(host.finite),
        "perturbed": [n for n, on in zip(names, host.mask, strict=True) if on],
        "norms": dict(zip(names, map(float, host.norms), strict=True)),
        "seconds": round(seconds, 3),
    }


def in_short(row: Row, speed: str, layers: int) -> str:
    """Return a row of kind `train` as one line of text."""
    return (
        f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}  {speed}"
        f"  perturbed: {name_layers(row['perturbed'], layers)}"
    )


@dataclasses.dataclass
class Tally:
    """What a run sums up from its beginning; it is part of the checkpoints.

    Attributes:
      seconds: Spent in training and evaluation, compiling included.
      compile_seconds: Spent in first calls of executables.
      executables: Covers for which a step was compiled.
      diverged: Whether a loss or a gradient was not finite.
      steps: Number of steps.
      overhead: Sum over the steps.
      perturbed: In how many steps each layer was perturbed.
    """

    seconds: float = 0.0
    compile_seconds: float = 0.0
    executables: tuple[str, ...] = ()
    diverged: bool = False
    steps: int = 0
    overhead: float = 0.0
    perturbed: tuple[int, ...] = ()

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> "Tally":
        """Return what `dataclasses.asdict` and JSON made of a tally."""
        lists = {name: tuple(saved[name]) for name in ("executables", "perturbed")}
        return cls(**{**saved, **lists})

    def after(self, infos: Sequence[Any]) -> "Tally":
        """Return the tally after some more steps, given their `StepInfo`."""
        seen = jax.device_get([(i.finite, i.overhead, i.mask) for i in infos])
        if not seen:
            return self
        finite, overhead, masks = zip(*seen, strict=True)
        return dataclasses.replace(
            self,
            diverged=self.diverged or not all(finite),
            steps=self.steps + len(seen),
            overhead=self.overhead + sum(map(float, overhead)),
            perturbed=_sum(self.perturbed, tuple(np.sum(masks, axis=0).tolist())),
        )

    def add(self, other: "Tally") -> "Tally":
        """Return the tally of this and what came after it."""
        return Tally(
            self.seconds + other.seconds,
            self.compile_seconds + other.compile_seconds,
            # Each once, in order of first use.
            tuple(dict.fromkeys(self.executables + other.executables)),
            self.diverged or other.diverged,
            self.steps + other.steps,
            self.overhead + other.overhead,
            _sum(self.perturbed, other.perturbed),
        )

    def end_row(self, where: Row, result: Row, layers: lwsam.Layers) -> Row:
        """Return the last row of a run, with the final evaluation.

        Layers are in the order of their depth, from the input on.
        """
        counts = zip(layers.depth, layers.names, self.perturbed, strict=True)
        return {
            "kind": "end",
            **where,
            **result,
            # Rounded: a run that goes on adds the same numbers in another order.
            "overhead": round(self.overhead / self.steps, 6),
            "perturbed": {name: count for _, name, count in sorted(counts)},
            "diverged": self.diverged or not np.isfinite(result["loss"]),
            "executables": len(self.executables),
            "compile_seconds": round(self.compile_seconds, 3),
            "seconds": round(self.seconds, 3),
        }


def _sum(some: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sum, layer by layer; before the first step there are no layers."""
    if not (some and more):
        return some or more
    return tuple(a + b for a, b in zip(some, more, strict=True))
