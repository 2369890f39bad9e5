"""SAF and MESA: losses that stay near earlier outputs, with their memory."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import lwsam_jax as lwsam
from lwsam_bench.data.augment import Order
from lwsam_bench.models.network import Network
from lwsam_bench.training.recipe import LossFn
from lwsam_bench.tuning.runs.course import Rows, Start


LOSSES = ("saf", "mesa")
# The authors' runs have 200 epochs, and terms after the fifth; ours have 5 to 44. Their
# average of weights looks back over a sixteenth of a run, and so does this one.
_SAF = lwsam.saf(1.0, delay=1, start=1)
_MESA = lwsam.mesa(1.0, decay=0.96, start=1)


def rows(total: int, batch_size: int, seed: int) -> Callable[[int], Rows]:
    """Return which examples the batch of a step has, as `Batches` draws them.

    Args:
      total: Training examples.
      batch_size: Of them in a batch.
      seed: Of the order.
    """
    order = Order(total, batch_size, seed)
    return lambda step: Rows(step // order.steps_per_epoch, order.rows(step), total)


def loss_fn(kind: str, network: Network) -> LossFn:
    """Return the plain loss and its term, whose weight the batch has.

    Args:
      kind: One of `LOSSES`.
      network: The network. Its state stands beside the memory: see `model_state`.
    """

    def of_saf(params: Any, model_state: Any, batch: Any, key: Array) -> Any:
        del key
        state, memory = model_state
        logits, state = network.apply(params, state, batch["image"], train=True)
        term, memory = _SAF(memory, logits, batch["index"], batch["epoch"])
        return _plain(logits, batch) + batch["weight"] * term, ((state, memory), {})

    def of_mesa(params: Any, model_state: Any, batch: Any, key: Array) -> Any:
        del key
        state, average = model_state
        average = _MESA.update(average, params)
        old, _ = network.apply(average, state, batch["image"], train=True)
        logits, state = network.apply(params, state, batch["image"], train=True)
        term = _MESA(logits, old, batch["epoch"])
        return _plain(logits, batch) + batch["weight"] * term, ((state, average), {})

    return {"saf": of_saf, "mesa": of_mesa}[kind]


def model_state(kind: str, start: Start) -> Any:
    """Return the model state before a run: for `LOSSES` with the memory beside it."""
    state = jax.tree.map(jnp.copy, start.model_state)
    if kind not in LOSSES:
        return state
    assert start.rows is not None
    if kind == "saf":
        return state, _SAF.init(start.rows(0).total, start.classes)
    return state, _MESA.init(start.params)


def numbers(kind: str, start: Start, step: int) -> Mapping[str, Array]:
    """Return what such a loss reads of a batch beside images and labels."""
    if kind not in LOSSES:
        return {}
    assert start.rows is not None
    found = start.rows(step)
    return {"index": jnp.asarray(found.index), "epoch": jnp.int32(found.epoch)}


def _plain(logits: Array, batch: Any) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.mean(losses)
