"""Tiny Shakespeare as numbers, one for each character, and its batches."""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
from jax import Array

from lwsam_bench.data.splits import default_data_dir
from lwsam_bench.support.errors import UserError


NAME = "tiny_shakespeare"
_SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as uint8[N], each character as its place in the sorted vocabulary.

    Attributes:
      characters: Of the split train.
      vocabulary: Number of different characters in the whole of it.
      version: Of the dataset.
      validation: Characters of the split validation.
    """

    characters: np.ndarray
    vocabulary: int
    version: str
    validation: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.uint8)
    )

    def fingerprint(self) -> str:
        """Return a digest of the training text, as 16 hex digits."""
        return hashlib.sha256(self.characters.tobytes()).hexdigest()[:16]


def load(data_dir: str | None = None) -> Text:
    """Read training and validation text from a folder of tensorflow-datasets.

    Raises:
      UserError: If it is not there.
    """
    import tensorflow_datasets as tfds

    folder = data_dir or default_data_dir()

    def read(split: str) -> np.ndarray:
        source: Any = tfds.data_source(
            NAME, split=split, data_dir=folder, download=False
        )
        return np.frombuffer(source[0]["text"], np.uint8)

    try:
        builder = tfds.builder(NAME, data_dir=folder)
        prepared = builder.is_prepared()
        train, validation = map(read, _SPLITS) if prepared else (None, None)
    except Exception as error:  # every reader has its own kinds
        raise UserError(f"{NAME} in {folder} cannot be read: {error}") from error
    if train is None or validation is None:
        raise UserError(
            f"{NAME} is not in {folder}. Prepare it there with tensorflow-datasets, as"
            " the other datasets, or name another folder with --data-dir"
        )
    vocabulary, characters = np.unique(train, return_inverse=True)
    unknown = np.setdiff1d(validation, vocabulary)
    if unknown.size:
        raise UserError(
            f"{NAME} in {folder} is damaged: the split validation has the characters"
            f" {bytes(unknown)!r}, which the split train has not"
        )
    return Text(
        characters.astype(np.uint8),
        len(vocabulary),
        str(builder.version),
        np.searchsorted(vocabulary, validation).astype(np.uint8),
    )


class TextBatches:
    """Excerpts at random places, each batch a pure function of the seed and the step.

    Args:
      text: The characters, uint8[N].
      batch_size: Excerpts in a batch.
      length: Characters that the network reads of each.
      seed: Decides the places.
      own: As of `Batches`.
    """

    def __init__(
        self,
        text: np.ndarray,
        *,
        batch_size: int,
        length: int,
        seed: int,
        own: np.ndarray | None = None,
    ):
        self._text, self._own = text, own
        self._batch_size, self._length, self._seed = batch_size, length, seed

    def __call__(self, step: int) -> dict[str, Array]:
        """Return the batch of a step: `text` i32[B, T], `next` i32[B, T]."""
        rng = np.random.default_rng([self._seed, step])
        starts = rng.integers(0, len(self._text) - self._length, self._batch_size)
        if self._own is not None:
            starts = starts[self._own]
        rows = self._text[starts[:, None] + np.arange(self._length + 1)]
        rows = rows.astype(np.int32)
        return jax.device_put({"text": rows[:, :-1], "next": rows[:, 1:]})
