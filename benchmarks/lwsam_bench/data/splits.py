"""Images and labels, decoded once into one uint8 array.

`sources` reads them.
"""

import dataclasses
import hashlib
import os

import numpy as np

from lwsam_bench.support.errors import UserError


_SUBSET_SEED = 0

DEVICE_BYTES = 2**31  # images of a split beyond this stay on the host


@dataclasses.dataclass(frozen=True)
class Split:
    """Images uint8[N, H, W, C] and their labels int32[N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def fits_on_device(self) -> bool:
        """Whether the images may all lie in the memory of the device."""
        return self.images.nbytes <= DEVICE_BYTES


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test split, with where they come from."""

    name: str
    version: str
    num_classes: int
    train: Split
    test: Split
    note: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and number of channels of an image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    def fingerprint(self) -> str:
        """Return a digest of the training images and labels, as 16 hex digits."""
        digest = hashlib.sha256(self.train.images.tobytes())
        digest.update(self.train.labels.tobytes())
        return digest.hexdigest()[:16]

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation f32[C] of the training pixels / 255.

        They are sums of integers, hence exact and the same in whatever order.
        """
        pixels = self.train.images.reshape(-1, self.train.images.shape[-1])
        values = np.arange(256) / 255.0
        mean, std = [], []
        for channel in range(pixels.shape[1]):
            weight = np.bincount(pixels[:, channel], minlength=256) / len(pixels)
            mean.append(np.sum(weight * values))
            std.append(np.sqrt(np.sum(weight * (values - mean[-1]) ** 2)))
        return np.asarray(mean, np.float32), np.maximum(
            np.asarray(std, np.float32), 1e-3
        )


def chosen(size: int, count: int | None, split: str, name: str) -> np.ndarray:
    """Return the places i64[count] of the images of a split that are to be used.

    Args:
      size: Images of the split.
      count: How many of them; None takes all, in their own order.
      split: Name of the split, `train` or `test`.
      name: Name of the dataset.

    Raises:
      UserError: If there are fewer.
    """
    if count is None:
        return np.arange(size)
    if count > size:
        raise UserError(
            f"--{split}-images {count} is more than the {size} images of {name}"
        )
    return np.random.default_rng(_SUBSET_SEED).permutation(size)[:count]


def default_data_dir() -> str:
    """Return `TFDS_DATA_DIR`, or tensorflow-datasets' own default folder."""
    named = os.environ.get("TFDS_DATA_DIR")
    return os.path.expanduser(named or os.path.join("~", "tensorflow_datasets"))


def corrupt_labels(
    labels: np.ndarray, fraction: float, num_classes: int, seed: int
) -> np.ndarray:
    """Return int32[N] with a random `fraction` of the labels drawn anew.

    A new label is uniform over all classes, so it is the old one in 1 of `num_classes`
    cases.
    """
    rng = np.random.default_rng([seed, 0x1ABE1])
    noisy = labels.copy()
    chosen = rng.permutation(len(labels))[: round(fraction * len(labels))]
    noisy[chosen] = rng.integers(0, num_classes, len(chosen), dtype=labels.dtype)
    return noisy
