"""Datasets by name: scikit-learn's, prepared ones, and files of arrays.

`digits` comes with scikit-learn, the other datasets lie in a folder that
tensorflow-datasets prepared, and a path that ends in `.npz` is read as a file of arrays.
Nothing is downloaded and nothing is written.
"""

import dataclasses
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from lwsam_bench.data import images
from lwsam_bench.data.names import DATASETS
from lwsam_bench.data.splits import chosen, Dataset, default_data_dir, Split
from lwsam_bench.support.errors import UserError


DIGITS_TRAIN_SIZE = 1_000

# Fixed: every run, whatever its seed, holds out the same images, and learns from the same
# ones if there are to be fewer.
_DIGITS_SPLIT_SEED = 0

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load(
    name: str,
    data_dir: str | None = None,
    on_record: Callable[[int, int], None] | None = None,
    *,
    image_size: int | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
) -> Dataset:
    """Read a dataset.

    Args:
      name: One of `names.DATASETS`, or the path of an `.npz` file with the arrays
        `x_train` and `x_test`, uint8[N, H, W] or uint8[N, H, W, C], and the integer
        labels `y_train` and `y_test`, [N].
      data_dir: The folder of tensorflow-datasets; see `default_data_dir`.
      on_record: Called now and then with the records decoded so far and their number.
      image_size: Sides in pixels to which images are resized, see `images.fit`; None
        leaves them, but for images that differ in size.
      train_images: Only so many training images, the first of a fixed random order.
      test_images: Only so many test images, likewise.

    Returns:
      The dataset.

    Raises:
      UserError: If it is not known, not there, too small, or cannot be read.
    """
    if name == "digits":
        dataset = _load_digits()
    elif name.endswith(".npz"):
        dataset = _load_npz(name)
    elif name in DATASETS:
        from lwsam_bench.data import prepared  # it takes a while to import

        return prepared.load(
            name,
            data_dir or default_data_dir(),
            on_record,
            image_size=image_size,
            train_images=train_images,
            test_images=test_images,
        )
    else:
        raise UserError(
            f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}, or the"
            " path of an .npz file"
        )
    return dataclasses.replace(
        dataset,
        train=_reduced(dataset.train, train_images, image_size, "train", name),
        test=_reduced(dataset.test, test_images, image_size, "test", name),
    )


def _reduced(
    split: Split, count: int | None, image_size: int | None, which: str, name: str
) -> Split:
    if count is not None:
        places = chosen(len(split), count, which, name)
        split = Split(split.images[places], split.labels[places])
    if image_size is not None:
        fitted = [images.fit(image, image_size) for image in split.images]
        split = Split(np.stack(fitted), split.labels)
    return split


def _load_digits() -> Dataset:
    import sklearn
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    # The pixels count to 16; 255/16 of it uses the range of a byte.
    images = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    order = np.random.default_rng(_DIGITS_SPLIT_SEED).permutation(len(labels))
    train, test = order[:DIGITS_TRAIN_SIZE], order[DIGITS_TRAIN_SIZE:]
    return Dataset(
        name="digits",
        version=f"scikit-learn {sklearn.__version__}",
        num_classes=10,
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
    )


def _load_npz(name: str) -> Dataset:
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"no such file: {name}")
    try:
        # NumPy leaves a file open that it cannot read, hence the first `with`.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = [key for key in NPZ_KEYS if key not in arrays]
            if missing:
                raise UserError(
                    f"{name} has no array {', '.join(missing)}: expected"
                    f" {', '.join(NPZ_KEYS)}, found {', '.join(arrays) or 'nothing'}"
                )
            x_train, y_train, x_test, y_test = (arrays[key] for key in NPZ_KEYS)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{name} cannot be read as an .npz file: {error}") from error
    train = _checked_split(name, "train", x_train, y_train)
    test = _checked_split(name, "test", x_test, y_test)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"{name}: the images of x_train have shape {train.images.shape[1:]}, those"
            f" of x_test {test.images.shape[1:]}; expected one shape"
        )
    num_classes = 1 + int(max(train.labels.max(), test.labels.max()))
    return Dataset(path.name, "file", num_classes, train, test)


def _checked_split(
    name: str, split: str, images: np.ndarray, labels: np.ndarray
) -> Split:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise UserError(
            f"{name}: expected x_{split} to be uint8[N, H, W] or uint8[N, H, W, C],"
            f" got {images.dtype}{list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{name}: expected y_{split} to be {len(images)} integers,"
            f" got {labels.dtype}{list(labels.shape)}"
        )
    if labels.min() < 0:
        raise UserError(
            f"{name}: y_{split} holds the label {labels.min()}; expected >= 0"
        )
    if images.ndim == 3:
        images = images[..., None]
    return Split(images, labels.astype(np.int32))
