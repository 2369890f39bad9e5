"""Steps that are not finite: what of the state stays as it was, and what goes on."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks
from .._engine.loss_scale import as_loss_scale


# Where a step is skipped, these stay; counters, keys and the masks to come go on.
_STATE = ("params", "model_state", "opt_state")
_METHOD_STATE = ("norms", "value", "memory", "ascent", "select")


class Faults(NamedTuple):
    """What is done about a step that is not finite.

    Attributes:
      skips: Whether it is skipped; with a loss scale it always is.
      scaler: The loss scale, or None.
    """

    skips: bool
    scaler: Any


def faults(who: str, on_nonfinite: Any, loss_scale: Any) -> Faults:
    """Returns what the arguments say; raises on what they cannot."""
    _checks.choice(who, "on_nonfinite", on_nonfinite, ("report", "skip"))
    scaler = as_loss_scale(who, loss_scale)
    return Faults(on_nonfinite == "skip" or scaler is not None, scaler)


def held_back(taken: jax.Array, new: Any, old: Any) -> Any:
    """Returns the state after a step, with what stays of the old one if it is skipped.

    Args:
      taken: bool[], whether the step is taken; the same on every device.
      new: `TrainState` after the step.
      old: That before it.
    """
    pick = lambda a, b: jnp.where(taken, a, b)
    choose = lambda names, after, before: {
        name: jax.tree.map(pick, getattr(after, name), getattr(before, name))
        for name in names
    }
    method_state = new.method_state._replace(
        **choose(_METHOD_STATE, new.method_state, old.method_state)
    )
    return new._replace(
        **choose(_STATE, new, old),
        method_state=method_state,
        skipped=old.skipped + jnp.where(taken, 0, 1),
    )
