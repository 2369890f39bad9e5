"""Tiny Shakespeare as numbers, one for each character, and batches of it."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array

from lwsam_bench._errors import UserError
from lwsam_bench.data import default_data_dir


NAME = "tiny_shakespeare"


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as uint8[N], each character as its place in the sorted vocabulary."""

    characters: np.ndarray
    vocabulary: int
    version: str


def load(data_dir: str | None = None) -> Text:
    """Read the training text from a folder of tensorflow-datasets.

    Raises:
      UserError: If it is not there.
    """
    import tensorflow_datasets as tfds

    folder = data_dir or default_data_dir()
    try:
        builder = tfds.builder(NAME, data_dir=folder)
        prepared = builder.is_prepared()
        if prepared:
            source: Any = tfds.data_source(
                NAME, split="train", data_dir=folder, download=False
            )
            text = np.frombuffer(source[0]["text"], np.uint8)
    except Exception as error:  # every reader has its own kinds
        raise UserError(f"{NAME} in {folder} cannot be read: {error}") from error
    if not prepared:
        raise UserError(
            f"{NAME} is not in {folder}. Prepare it there with tensorflow-datasets, as"
            " the other datasets, name another folder with --data-dir, or leave gpt out"
            " of --models"
        )
    vocabulary, characters = np.unique(text, return_inverse=True)
    return Text(characters.astype(np.uint8), len(vocabulary), str(builder.version))


class TextBatches:
    """Excerpts at random places, each batch a pure function of the seed and the step.

    Args:
      text: The characters, uint8[N].
      batch_size: Excerpts in a batch.
      length: Characters that the network reads of each.
      seed: Decides the places.
    """

    def __init__(self, text: np.ndarray, *, batch_size: int, length: int, seed: int):
        self._text = text
        self._batch_size, self._length, self._seed = batch_size, length, seed

    def __call__(self, step: int) -> dict[str, Array]:
        """Return the batch of a step: `text` i32[B, T], `next` i32[B, T]."""
        rng = np.random.default_rng([self._seed, step])
        starts = rng.integers(0, len(self._text) - self._length, self._batch_size)
        rows = self._text[starts[:, None] + np.arange(self._length + 1)]
        rows = rows.astype(np.int32)
        return jax.device_put({"text": rows[:, :-1], "next": rows[:, 1:]})
