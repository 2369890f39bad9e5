"""Batches from images that are too many for the memory of the device.

They stay on the host as they were decoded. Grain's threads gather the next batches and
send them ahead; normalisation and augmentation run on the device as they do for images
that lie there, so that the batches are the same.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

from lwsam_bench.data.augment import Batches
from lwsam_bench.data.splits import Split


AHEAD = 4  # batches
THREADS = 2  # that gather them

_NO_END = 2**31 - 1  # steps are counted in 32 bits


def make_batches(split: Split, **options: Any) -> Batches:
    """Return the training batches of a run, from wherever the images fit.

    Args:
      split: The training images and labels.
      **options: The other arguments of `Batches`.
    """
    return (Batches if split.fits_on_device else HostBatches)(split, **options)


class HostBatches(Batches):
    """The batches of `Batches`, with its arguments, from images on the host.

    Batches are prefetched in order of the steps; a call for another step than the one
    after the last begins anew from there.
    """

    def _hold(self, split: Split) -> None:
        self._split = split
        self._ahead: Iterator[tuple[Array, Array]] | None = None
        self._next = 0

    def _rows(self, step: int) -> tuple[Array, Array, np.ndarray]:
        if self._ahead is None or step != self._next:
            self._ahead = self._from(step)
        self._next = step + 1
        images, labels = next(self._ahead)
        return images, labels, np.arange(len(labels), dtype=np.int32)

    def _from(self, step: int) -> Iterator[tuple[Array, Array]]:
        import grain  # it takes a while

        batches = grain.MapDataset.range(step, _NO_END).map(self._gather)
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        return iter(batches.to_iter_dataset(options))

    def _gather(self, step: int) -> tuple[Array, Array]:
        rows = self._places(step)
        return jax.device_put((self._split.images[rows], self._split.labels[rows]))
