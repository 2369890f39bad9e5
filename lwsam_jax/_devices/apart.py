"""A step on a mesh where each device has a perturbation of its own: by shard_map.

The loss is that of one device's share there, and the parameters are replicated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from .. import _checks
from .layout import is_cut
from .mesh import OnMesh


class Apart(OnMesh):
    """A step under `jax.shard_map`, each device on its share of the batch."""

    def __init__(self, who: str, mesh: Mesh, batch_axes: Any, donate: bool) -> None:
        """Names the mapped axes."""
        super().__init__(who, mesh, batch_axes, donate)
        self.axis_name = self.axes

    def axis_sizes(self) -> list[tuple[Any, int]]:
        """Returns the mapped axes as `jax.make_jaxpr` takes them."""
        return [(axis, self.mesh.shape[axis]) for axis in self.axes]

    def seen(self, batch: Any) -> Any:
        """Returns the shapes of one device's share."""
        return self.share(batch)

    def place(self, tree: Any) -> Any:
        """Puts parameters everywhere; raises on one that is cut over the mesh."""
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if is_cut(x, self.mesh):
                where = f"params{jax.tree_util.keystr(path)}"
                remedy = "Replicate it, or take one perturbation for all devices."
                expected = "replicated, for each device perturbs it in its own way"
                raise _checks.value_error(
                    self._who, where, expected, f"{x.sharding.spec}", remedy
                )
        return super().place(tree)

    def compile(
        self,
        local: Callable[..., Any],
        lead: int = 0,
        donates: bool = True,
        part: Callable[[Any], Any] = lambda state: state,
        name: Any = None,
    ) -> Any:
        """Returns `local` mapped over the devices, under jit."""

        def mapped(state, batch, constants):
            everywhere, cut = PartitionSpec(), PartitionSpec(*[None] * lead, self.axes)
            usual = self.examples(batch, lead)
            is_batch = lambda x: np.ndim(x) > lead and np.shape(x)[lead] == usual
            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(
                    everywhere,
                    jax.tree.map(lambda x: cut if is_batch(x) else everywhere, batch),
                    everywhere,
                ),
                out_specs=everywhere,
                axis_names=set(self.axes),
                # The check cannot type a scan whose carry starts as a constant, so
                # it would refuse many models; our casts are exact without it.
                check_vma=False,
            )(state, batch, constants)

        return super().compile(mapped, lead, donates, part, name)

    def on_shares(self, fn: Callable[..., Any], cut: Any, whole: Any) -> Any:
        """Returns `fn(cut, whole)`, on this device's share."""
        return fn(cut, whole)
