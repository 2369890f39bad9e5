"""Batches from images that are too many for the memory of the device.

They stay on the host as they were decoded. Grain's threads gather the next batches and
send them ahead; normalisation and augmentation run on the device as they do for images
that lie there, so that the batches are the same.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lwsam_bench.augment import assemble, Batches, Order
from lwsam_bench.data import Split


AHEAD = 4  # batches
THREADS = 2  # that gather them

_NO_END = 2**31 - 1  # steps are counted in 32 bits


def make_batches(split: Split, **options: Any) -> "Batches | HostBatches":
    """Return the training batches of a run, from wherever the images fit.

    Args:
      split: The training images and labels.
      **options: Those of `Batches`.
    """
    return (Batches if split.fits_on_device else HostBatches)(split, **options)


class HostBatches:
    """The batches of `Batches`, in whose place it stands, with the same arguments.

    Batches are prefetched in order of the steps; a call for another step than the one
    after the last begins anew from there.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        mean: np.ndarray,
        std: np.ndarray,
        augment: bool,
    ):
        self._split = split
        self._order = Order(len(split), batch_size, seed)
        self._places = np.arange(batch_size, dtype=np.int32)
        self._seed = seed
        self._mean, self._std = jnp.asarray(mean), jnp.asarray(std)
        self._augment = augment
        self._ahead: Iterator[tuple[Array, Array]] | None = None
        self._next = 0

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in an epoch."""
        return self._order.steps_per_epoch

    def __call__(self, step: int) -> dict[str, Array]:
        """Return the batch of a step: `image` f32[B, H, W, C] and `label` i32[B]."""
        if self._ahead is None or step != self._next:
            self._ahead = self._from(step)
        self._next = step + 1
        images, labels = next(self._ahead)
        return assemble(
            images,
            labels,
            self._places,
            np.int32(self._seed),
            np.int32(step),
            self._mean,
            self._std,
            augment=self._augment,
        )

    def _from(self, step: int) -> Iterator[tuple[Array, Array]]:
        import grain  # it takes a while

        batches = grain.MapDataset.range(step, _NO_END).map(self._gather)
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        return iter(batches.to_iter_dataset(options))

    def _gather(self, step: int) -> tuple[Array, Array]:
        rows = self._order.rows(step)
        return jax.device_put((self._split.images[rows], self._split.labels[rows]))
