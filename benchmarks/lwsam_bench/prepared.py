"""Datasets that tensorflow-datasets prepared, read without TensorFlow."""

import json
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lwsam_bench._errors import UserError
from lwsam_bench.data import Dataset, Split


_SPLITS = ("train", "test")
_JPEG = b"\xff\xd8\xff"  # the first bytes of such a file


def load(
    name: str, data_dir: str, on_record: Callable[[int, int], None] | None = None
) -> Dataset:
    """Read a dataset of images with labels, as `data.load` does."""
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            raise UserError(_not_there(name, data_dir))
        total = sum(builder.info.splits[split].num_examples for split in _SPLITS)
        done = 0
        # Without download=False it would start a download of its own accord; and it
        # finds Parquet only if the folder is passed, not in the environment.
        sources: list[Any] = [
            tfds.data_source(name, split=split, data_dir=data_dir, download=False)
            for split in _SPLITS
        ]
        for split, source in zip(_SPLITS, sources, strict=True):
            expected = builder.info.splits[split].num_examples
            if len(source) != expected:
                raise UserError(
                    f"{name} in {data_dir} is damaged: the split {split} has"
                    f" {len(source)} records, its description says {expected}"
                )
        splits = []
        for source in sources:
            splits.append(_decode(source, done, total, on_record))
            done += len(source)
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
        note=_encoding_note(name, data_dir),
    )


def _decode(
    source: Any, done: int, total: int, on_record: Callable[[int, int], None] | None
) -> Split:
    first = source[0]["image"]
    images = np.empty((len(source), *first.shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for i in range(len(source)):
        record = source[i]
        images[i], labels[i] = record["image"], record["label"]
        if on_record is not None and i % 1_000 == 0:
            on_record(done + i, total)
    return Split(images, labels)


def _encoding_note(name: str, data_dir: str) -> str:
    """Say so if the pixels are not the original ones."""
    source: Any = tfds.data_source(
        name,
        split="test",
        data_dir=data_dir,
        download=False,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    if not bytes(source[0]["image"]).startswith(_JPEG):
        return ""
    return (
        "The images of this copy are JPEG, a lossy encoding: the results cannot be"
        " compared digit for digit with published ones."
    )


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
