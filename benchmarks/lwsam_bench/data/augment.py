"""Batches of a training run: each one a pure function of the seed and the step.

Nothing here carries a state from one batch to the next, so a run that was stopped goes
on with exactly the batches that it would have seen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lwsam_bench.data.splits import Split


PAD = 4  # pixels at each side, as He et al. (2016) for CIFAR-10

# One stream of random numbers for each purpose, all from the one seed of a run.
_ORDER_STREAM, _AUGMENT_STREAM = 1, 2


class Batches:
    """The training batches of a run.

    Args:
      split: The training images and labels.
      batch_size: Images in a batch; what is left over at the end of an epoch is
        dropped, in each epoch another part.
      seed: Decides order and augmentation.
      mean: Per-channel mean f32[C] of the pixels / 255.
      std: Per-channel standard deviation f32[C], likewise.
      augment: Whether to pad, crop and flip.
      own: Places i64[b] in a batch, if only those are wanted: the rows that one of
        several processes feeds. They are what they are in the whole batch.
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
        own: np.ndarray | None = None,
    ):
        self._size, self._own = batch_size, own
        self._order = Order(len(split), batch_size, seed)
        self._seed = seed
        self._mean, self._std = jnp.asarray(mean), jnp.asarray(std)
        self._augment = augment
        self._hold(split)

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in an epoch."""
        return self._order.steps_per_epoch

    def __call__(self, step: int) -> dict[str, Array]:
        """Return the batch of a step: `image` f32[B, H, W, C] and `label` i32[B]."""
        return _assemble(
            *self._rows(step),
            np.int32(self._seed),
            np.int32(step),
            self._mean,
            self._std,
            self._own,
            size=self._size,
            augment=self._augment,
        )

    def _hold(self, split: Split) -> None:
        self._images = jnp.asarray(split.images)
        self._labels = jnp.asarray(split.labels)

    def _rows(self, step: int) -> tuple[Array, Array, np.ndarray]:
        """Return images u8[N, H, W, C], labels i32[N], and where in them the batch is."""
        return self._images, self._labels, self._places(step)

    def _places(self, step: int) -> np.ndarray:
        rows = self._order.rows(step)
        return rows if self._own is None else rows[self._own]


class Order:
    """Which images are in the batch of a step.

    Args:
      size: Number of images.
      batch_size: Images in a batch.
      seed: Decides the order.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self.steps_per_epoch = size // batch_size
        self._size, self._batch_size, self._seed = size, batch_size, seed
        self._latest: tuple[int, np.ndarray] | None = None

    def rows(self, step: int) -> np.ndarray:
        """Return the places i32[B] of the images; threads may call this together."""
        epoch, position = divmod(step, self.steps_per_epoch)
        latest = self._latest
        if latest is None or latest[0] != epoch:
            latest = self._latest = epoch, epoch_order(self._seed, epoch, self._size)
        start = position * self._batch_size
        return latest[1][start : start + self._batch_size]


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order i32[size] in which an epoch visits the images."""
    key = jax.random.fold_in(jax.random.key(seed), _ORDER_STREAM)
    return np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), size))


def normalize(images: Array, mean: Any, std: Any) -> Array:
    """Return u8[B, H, W, C] as f32, with mean 0 and variance 1 in each channel."""
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def crop_and_flip(
    images: Array, key: Array, own: Any = None, size: int | None = None
) -> Array:
    """Pad by `PAD` zeros, crop at random to the old size, flip half of the images.

    Args:
      images: f32[B, H, W, C], normalised: the padding is the mean colour.
      key: A PRNG key.
      own: Where in the batch these images are, i64[B]; None: they are all of it.
      size: Of the batch.

    Returns:
      f32[B, H, W, C].
    """
    batch, height, width, _ = images.shape
    size = batch if size is None else size
    crop_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(crop_key, (size, 2), 0, 2 * PAD + 1)
    flip = jax.random.bernoulli(flip_key, shape=(size,))
    if own is not None:
        offsets, flip = offsets[own], flip[own]
    padded = jnp.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    rows = offsets[:, :1] + jnp.arange(height)
    columns = offsets[:, 1:] + jnp.arange(width)
    columns = jnp.where(flip[:, None], columns[:, ::-1], columns)
    image = jnp.arange(batch)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]]


@functools.partial(jax.jit, static_argnames=("size", "augment"))
def _assemble(
    images: Array,
    labels: Array,
    rows: Array,
    seed: Array,
    step: Array,
    mean: Array,
    std: Array,
    own: Array | None,
    *,
    size: int,
    augment: bool,
) -> dict[str, Array]:
    image = normalize(images[rows], mean, std)
    if augment:
        key = jax.random.fold_in(jax.random.key(seed), _AUGMENT_STREAM)
        image = crop_and_flip(image, jax.random.fold_in(key, step), own, size)
    return {"image": image, "label": labels[rows]}
