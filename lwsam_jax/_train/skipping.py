"""Steps that are not finite: what of the state stays as it was, and what goes on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


ON_NONFINITE = ("report", "skip")
# Where a step is skipped, these stay; counters, keys and the masks to come go on.
_STATE = ("params", "model_state", "opt_state")
_METHOD_STATE = ("norms", "value", "memory", "ascent")


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
