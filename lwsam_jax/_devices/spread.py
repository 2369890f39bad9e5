"""Which of the ways to run a step is asked for."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from .. import _checks
from .apart import Apart
from .local import LocalDevices, OneDevice
from .mesh import OnMesh


def spread(
    who: str, parallel: Any, batch_axes: Any, donate: bool, is_apart: bool = False
) -> OneDevice:
    """Returns how steps run; refuses what is no way to.

    Args:
      who: Who asks, for messages.
      parallel: None, "pmap", or a `jax.sharding.Mesh`.
      batch_axes: Of a mesh, the axes over which a batch is cut; None: all.
      donate: Whether steps donate their state.
      is_apart: Whether devices have perturbations of their own.
    """
    if isinstance(parallel, Mesh):
        kind = Apart if is_apart else OnMesh
        return kind(who, parallel, batch_axes, donate)
    if batch_axes is not None:
        remedy = "Leave it out, or pass a jax.sharding.Mesh as `parallel`."
        raise _checks.value_error(
            who, "batch_axes", "None without a mesh", repr(batch_axes), remedy
        )
    if parallel is None:
        return OneDevice(who, donate)
    if isinstance(parallel, str) and parallel == "pmap":
        return LocalDevices(who, donate)
    remedy = "Pass None, 'pmap', or a jax.sharding.Mesh."
    raise _checks.value_error(
        who, "parallel", "a way to spread", repr(parallel), remedy
    )
