"""Loss and accuracy on data held out, each image or character counted once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from lwsam_bench.data.augment import normalize
from lwsam_bench.data.splits import Split
from lwsam_bench.models.network import Network
from lwsam_bench.support.processes import ALONE, own, Processes


EVAL_BATCH_SIZE = 500
TEXT_EVAL_BATCH_SIZE = 64


def _summed(
    sums: Any, params: Any, model_state: Any, batches: Any, processes: Processes
) -> tuple[float, float]:
    """Return the sums over all batches, of which each process takes some.

    The batches, and the order of the sum, are the same for any number of processes.
    """
    params, model_state = own(params), own(model_state)
    index, count = processes.index, processes.count
    parts = {
        number: sums(params, model_state, *batch)
        for number, batch in enumerate(zip(*batches, strict=True))
        if number % count == index
    }
    found = np.zeros((len(batches[0]), 2), np.float32)
    for number, part in jax.device_get(parts).items():
        found[number] = part
    losses, hits = processes.sum(found).astype(np.float64).T
    return losses.sum(), hits.sum()


class Evaluator:
    """Mean loss and accuracy on a split, each image counted once.

    The last batch is filled up with zeros that have no weight, so that one executable
    does for all. Images that are too many for the device go there batch by batch.
    Several processes share the batches.
    """

    def __init__(
        self,
        network: Network,
        split: Split,
        *,
        mean: np.ndarray,
        std: np.ndarray,
        batch_size: int = EVAL_BATCH_SIZE,
        processes: Processes = ALONE,
    ):
        self._processes = processes
        size = len(split)
        batch_size = min(batch_size, size)
        count = -(-size // batch_size)
        padding = count * batch_size - size

        put = jnp.asarray if split.fits_on_device else np.asarray

        def batches(x: np.ndarray) -> Any:
            x = np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
            return put(x.reshape(count, batch_size, *x.shape[1:]))

        self._size = size
        self._images = batches(split.images)
        self._labels = batches(split.labels)
        self._weights = batches(np.ones(size, np.float32))

        @jax.jit
        def sums(params, model_state, images, labels, weights):
            logits, _ = network.apply(
                params, model_state, normalize(images, mean, std), train=False
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            hits = jnp.argmax(logits, -1) == labels
            return jnp.vdot(loss, weights), jnp.vdot(hits, weights)

        self._sums = sums

    def __call__(self, params: Any, model_state: Any) -> dict[str, float]:
        """Return `{"loss": ..., "accuracy": ...}` with the running statistics."""
        batches = self._images, self._labels, self._weights
        loss, hits = _summed(self._sums, params, model_state, batches, self._processes)
        return {"loss": loss / self._size, "accuracy": hits / self._size}


class TextEvaluator:
    """Mean loss and accuracy over a text, each character but the first counted once.

    The text is cut into excerpts that do not overlap, so a character is predicted from
    at most `length` others. The last excerpt is filled up with characters that have no
    weight, as is the last batch.

    Args:
      network: Reads up to `length` characters.
      characters: The text, uint8[N].
      length: Characters that the network reads of an excerpt.
      batch_size: Excerpts evaluated at a time.
      processes: Share the batches.
    """

    def __init__(
        self,
        network: Network,
        characters: np.ndarray,
        *,
        length: int,
        batch_size: int = TEXT_EVAL_BATCH_SIZE,
        processes: Processes = ALONE,
    ):
        self._processes = processes
        self._size = len(characters) - 1
        excerpts = -(-self._size // length)
        batch_size = min(batch_size, excerpts)
        count = -(-excerpts // batch_size)
        padding = count * batch_size * length - self._size

        def batches(x: np.ndarray) -> Array:
            return jnp.asarray(np.pad(x, (0, padding)).reshape(count, -1, length))

        rows = characters.astype(np.int32)
        self._text, self._next = batches(rows[:-1]), batches(rows[1:])
        self._weights = batches(np.ones(self._size, np.float32))

        @jax.jit
        def sums(params, model_state, text, following, weights):
            logits, _ = network.apply(params, model_state, text, train=False)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, following)
            hits = jnp.argmax(logits, -1) == following
            return jnp.vdot(loss, weights), jnp.vdot(hits, weights)

        self._sums = sums

    def __call__(self, params: Any, model_state: Any) -> dict[str, float]:
        """Return loss, accuracy and perplexity."""
        batches = self._text, self._next, self._weights
        loss, hits = _summed(self._sums, params, model_state, batches, self._processes)
        loss = loss / self._size
        return {
            "loss": loss,
            "accuracy": hits / self._size,
            "perplexity": float(np.exp(loss)),
        }
