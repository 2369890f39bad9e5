"""Datasets that tensorflow-datasets prepared, read without TensorFlow."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lwsam_bench.data import images
from lwsam_bench.data.splits import chosen, Dataset, Split
from lwsam_bench.support.errors import UserError


# Sides of images that differ in size, unless the user says otherwise. The paper does not
# say how large its flowers are.
DEFAULT_IMAGE_SIZE = 64

_JPEG = b"\xff\xd8\xff"  # the first bytes of such a file


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the splits of a dataset are used.

    Attributes:
      train: Splits to learn from.
      test: Splits held out.
      note: What a reader has to know.
    """

    train: tuple[str, ...] = ("train",)
    test: tuple[str, ...] = ("test",)
    note: str = ""


# Seven in ten of the flowers are in the split test.
_FLOWERS = Layout(
    train=("test",),
    test=("train", "validation"),
    note="Trained on the split test, evaluated on train and validation, as in the paper.",
)
LAYOUTS: Mapping[str, Layout] = {
    "oxford_flowers102": _FLOWERS,
    "oxford_flowers102_subset": dataclasses.replace(
        _FLOWERS,
        note=f"{_FLOWERS.note} This is a subset of Oxford Flowers-102, of 96 of the 102"
        " classes, made small and encoded again: the results cannot be compared with"
        " published ones.",
    ),
}

OnRecord = Callable[[int, int], None]


def load(
    name: str,
    data_dir: str,
    on_record: OnRecord | None = None,
    *,
    image_size: int | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
) -> Dataset:
    """Read a dataset of images with labels, as `sources.load` does.

    Only the images that are wanted are decoded.
    """
    layout = LAYOUTS.get(name, Layout())
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            raise UserError(_not_there(name, data_dir))
        train = _records(builder, layout.train, data_dir)
        test = _records(builder, layout.test, data_dir)
        train = _some(train, train_images, "train", name)
        test = _some(test, test_images, "test", name)
        height, width, _ = builder.info.features["image"].shape
        if image_size is None and None in (height, width):
            image_size = DEFAULT_IMAGE_SIZE
        total = len(train) + len(test)
        splits = [
            _decode(train, image_size, 0, total, on_record),
            _decode(test, image_size, len(train), total, on_record),
        ]
    except UserError:
        raise
    except NotImplementedError as error:  # prepared as TFRecord
        raise UserError(_not_there(name, data_dir, "in a random-access format")) from (
            error
        )
    except Exception as error:  # every reader and decoder has its own kinds
        raise UserError(f"{name} in {data_dir} cannot be read: {error}") from error
    return Dataset(
        name=name,
        version=str(builder.version),
        num_classes=builder.info.features["label"].num_classes,
        train=splits[0],
        test=splits[1],
        note=layout.note or _encoding_note(name, data_dir),
    )


Record = tuple[Any, int]  # a source, and the number of a record in it


def _records(builder: Any, splits: Sequence[str], data_dir: str) -> list[Record]:
    """Return where the records of some splits are, one split after the other."""
    records: list[Record] = []
    for split in splits:
        # Without download=False it would start a download of its own accord; and it
        # finds Parquet only if the folder is passed, not in the environment.
        source: Any = tfds.data_source(
            builder.name, split=split, data_dir=data_dir, download=False
        )
        expected = builder.info.splits[split].num_examples
        if len(source) != expected:
            raise UserError(
                f"{builder.name} in {data_dir} is damaged: the split {split} has"
                f" {len(source)} records, its description says {expected}"
            )
        records += [(source, i) for i in range(len(source))]
    return records


def _some(
    records: list[Record], count: int | None, split: str, name: str
) -> list[Record]:
    return [records[i] for i in chosen(len(records), count, split, name)]


def _decode(
    records: Sequence[Record],
    image_size: int | None,
    done: int,
    total: int,
    on_record: OnRecord | None,
) -> Split:
    pixels, labels = np.empty(0, np.uint8), np.empty(len(records), np.int32)
    for number, (source, place) in enumerate(records):
        record = source[place]
        image = record["image"]
        if image_size is not None:
            image = images.fit(image, image_size)
        if number == 0:
            pixels = np.empty((len(records), *image.shape), np.uint8)
        pixels[number], labels[number] = image, record["label"]
        if on_record is not None and number % 1_000 == 0:
            on_record(done + number, total)
    return Split(pixels, labels)


def _encoding_note(name: str, data_dir: str) -> str:
    """Say so if the pixels are not the original ones."""
    if not _is_jpeg(name, data_dir):
        return ""
    return (
        "The images of this copy are JPEG, a lossy encoding: the results cannot be"
        " compared digit for digit with published ones."
    )


def _is_jpeg(name: str, data_dir: str) -> bool:
    source: Any = tfds.data_source(
        name,
        split="test",
        data_dir=data_dir,
        download=False,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    return bytes(source[0]["image"]).startswith(_JPEG)


def _not_there(name: str, data_dir: str, form: str = "") -> str:
    prepare = (
        f'import tensorflow_datasets as tfds; tfds.builder("{name}",'
        f' data_dir={json.dumps(str(data_dir))}, file_format="array_record")'
        ".download_and_prepare()"
    )
    return (
        f"{name} is not in {data_dir}{form and ' '}{form}. Fetch it once, in any Python"
        " environment that has TensorFlow (only preparing needs it):\n"
        "  pip install tensorflow tensorflow-datasets importlib_resources\n"
        f"  python -c {shlex.quote(prepare)}\n"
        "or name another folder with --data-dir, or a local .npz file with --dataset"
    )
