"""The presets that `train` knows by their name alone: published numbers, one radius."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import lwsam_jax as lwsam
from lwsam_bench.support.errors import UserError


@dataclasses.dataclass(frozen=True)
class Facts:
    """What some methods want to know of a run.

    Attributes:
      total_steps: Its length.
      steps_per_epoch: That of an epoch; None if it is not known.
      learning_rate: That of the base optimizer, a schedule of the step count.
      class_counts: Examples of each class, None where there are no classes.
    """

    total_steps: int
    steps_per_epoch: int | None = None
    learning_rate: Any = None
    class_counts: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Preset:
    """A preset of the library, and what `train` says of it.

    Attributes:
      make: `(rho, k, facts, parts) -> Method`.
      own: Arguments of `Method` that are the preset's own.
      reads_losses: Whether it reads the losses of the examples.
    """

    make: Callable[[Any, int, Facts, dict[str, Any]], lwsam.Method]
    own: tuple[str, ...] = ()
    reads_losses: bool = False


def _by_counts(preset: Callable[..., lwsam.Method]) -> Any:
    def make(rho: Any, k: int, facts: Facts, parts: dict[str, Any]) -> lwsam.Method:
        del k
        if facts.class_counts is None:
            raise UserError("this method is for data sets with classes")
        labels = lambda batch: batch["label"]
        return preset(rho, facts.class_counts, labels, **parts)

    return make


def _plain(preset: Callable[..., lwsam.Method], *numbers: Any, **named: Any) -> Any:
    return lambda rho, k, facts, parts: preset(rho, *numbers, **{**named, **parts})


_DIRECTION = ("ascent",)
FAMILY: Mapping[str, Preset] = {
    "sparse_sam": Preset(
        lambda rho, k, facts, parts: lwsam.sparse_sam(
            rho,
            period=facts.steps_per_epoch or 100,
            total_steps=facts.total_steps,
            **parts,
        ),
    ),
    "sl_sam": Preset(lambda rho, k, facts, parts: lwsam.sl_sam(rho, k, **parts)),
    "gcsam": Preset(_plain(lwsam.gcsam)),
    "lightsam": Preset(_plain(lwsam.lightsam)),
    "mup_perturbation": Preset(_plain(lwsam.mup_perturbation, per="layer")),
    "stable_sam": Preset(_plain(lwsam.stable_sam)),
    "wsam": Preset(
        lambda rho, k, facts, parts: lwsam.wsam(
            rho, learning_rate=facts.learning_rate, **parts
        ),
    ),
    "gam": Preset(_plain(lwsam.gam)),
    "ae_sam": Preset(
        lambda rho, k, facts, parts: lwsam.ae_sam(rho, facts.total_steps, **parts),
        own=("when",),
    ),
    "csam": Preset(_plain(lwsam.csam), reads_losses=True),
    "focal_sam": Preset(_by_counts(lwsam.focal_sam), reads_losses=True),
    "imbsam": Preset(_by_counts(lwsam.imbsam), reads_losses=True),
    "adazo_sam": Preset(_plain(lwsam.adazo_sam), own=_DIRECTION),
    "lorenza": Preset(_plain(lwsam.lorenza), own=_DIRECTION),
    "async_sam": Preset(_plain(lwsam.async_sam)),
    "m_sam": Preset(_plain(lwsam.m_sam)),
    "random_sam": Preset(_plain(lwsam.random_sam), own=_DIRECTION),
    "rwp": Preset(_plain(lwsam.rwp), own=_DIRECTION),
    "m_rwp": Preset(_plain(lwsam.m_rwp), own=_DIRECTION),
    "arwp": Preset(_plain(lwsam.arwp), own=_DIRECTION),
    "m_arwp": Preset(_plain(lwsam.m_arwp), own=_DIRECTION),
    "damp": Preset(_plain(lwsam.damp), own=_DIRECTION),
}


def make(
    name: str, rho: Any, k: int, facts: Facts | None, parts: dict[str, Any]
) -> lwsam.Method:
    """Return a method of the family.

    Args:
      name: One of `FAMILY`.
      rho: Radius, a number or a schedule.
      k: Layers, of `sl_sam`.
      facts: What is known of the run.
      parts: Arguments of `Method`; the shape and those that are the preset's own are left
        to it.
    """
    preset = FAMILY[name]
    kept = {n: x for n, x in parts.items() if n not in ("shape", *preset.own)}
    return preset.make(rho, k, facts or Facts(total_steps=1), kept)


def reads_losses(name: str) -> bool:
    """Return whether a method reads the losses of the examples."""
    return name == "esam" or (name in FAMILY and FAMILY[name].reads_losses)
