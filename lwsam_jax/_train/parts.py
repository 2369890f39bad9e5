"""The gradient of a batch that is cut into parts, each with its own perturbation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._axes.sub_batches import SubBatches
from .._loops.plan import LayerwiseGrad, Memory, Plan
from .._loops.varying import mean


class Parts(NamedTuple):
    """What the parts of a batch came to.

    Attributes:
      out: Their gradients, values and norms as those of one batch.
      moved: The mean gradient at the perturbed points alone.
    """

    out: LayerwiseGrad
    moved: Any


def evaluate_parts(
    split: SubBatches,
    plan: Plan,
    one: Callable[[Plan, Any, Any], LayerwiseGrad],
    batch: Any,
    *,
    is_stale: bool,
    device: Any = 0,
    devices: int = 1,
) -> Parts:
    """Evaluates the gradient of a method on each part, and averages.

    Args:
      split: How the batch is cut.
      plan: What the step does on each part.
      one: `(plan, part, its number in the global batch) -> gradient`, on one device; it
        averages over no axis.
      batch: What this device sees.
      is_stale: Whether the ascent takes no pass.
      device: Number of this device.
      devices: How many there are.
    """
    count = split.on_each(devices, is_stale)
    pieces = split.cut(batch, count)
    inner = plan._replace(axis_name=None)
    clean = None
    if split.clean is not None:
        clean = one(inner._replace(chosen=()), pieces.pop(0), split.count)
    first = split.first_of(device, devices)
    found = _each(lambda piece, number: one(inner, piece, number), pieces, first)
    axis = plan.axis_name
    moved = mean(found.grads, axis)
    grads = moved
    values = (found.value, found.perturbed_value, found.ascent_value)
    aux = found.aux
    if clean is not None and split.clean is not None:
        aux, values = clean.aux, (found.value, found.perturbed_value, clean.value)
        weight = jnp.asarray(1 - split.clean)
        mixed = lambda g, d: _tree.mix(g, d, weight)
        grads = jax.tree.map(mixed, mean(clean.grads, axis), moved)
    value, perturbed_value, ascent_value = mean(values, axis)
    out = LayerwiseGrad(
        value=value,
        aux=aux,
        grads=grads,
        norms=plan.layers.norms(moved),
        perturbed_value=perturbed_value,
        ascent_value=ascent_value,
        late=mean(found.late, axis),
        mask=_share(found.mask, axis) > 0,
        perturbation_norm=mean(found.perturbation_norm, axis),
        cosine=mean(found.cosine, axis),
    )
    finite = _tree.all_finite((out.value, out.perturbed_value, out.grads))
    return Parts(out._replace(finite=finite & (_share(found.finite, axis) == 1)), moved)


def _share(bits: jax.Array, axis: Any) -> jax.Array:
    """Returns on which share of the devices a bit is set."""
    return mean(bits.astype(jnp.float32), axis)


def refuse_memory(who: str, memory: Memory) -> None:
    """Raises where shape or combine keep something: every part would write into it."""
    for name, kept in memory._asdict().items():
        if jax.tree.leaves(kept):
            remedy = "Take one that keeps none, or no `split`."
            expected = "one without a state, for each part of a batch would change it"
            raise _checks.value_error(who, name, expected, "one with a state", remedy)


def _each(
    one: Callable[[Any, Any], LayerwiseGrad], pieces: list[Any], first: Any
) -> LayerwiseGrad:
    """Returns the mean over the pieces, which run one after the other."""
    if len(pieces) == 1:
        return one(pieces[0], first)
    size = max(jnp.shape(x)[0] for x in jax.tree.leaves(pieces[0]) if jnp.ndim(x))
    is_cut = lambda x: jnp.ndim(x) > 0
    leaves, treedef = jax.tree.flatten(pieces[0])
    rows = [jax.tree.leaves(piece) for piece in pieces]
    stacked = [
        jnp.stack([row[i] for row in rows]) for i, x in enumerate(leaves) if is_cut(x)
    ]

    def run(item):
        cut, number = item
        cut = iter(cut)
        whole = [next(cut) if is_cut(x) else x for x in leaves]
        return one(jax.tree.unflatten(treedef, whole), number)

    out = jax.lax.map(run, (stacked, first + jnp.arange(len(pieces))))
    averaged = jax.tree.map(lambda x: jnp.mean(x, 0), out._replace(aux=None))
    return averaged._replace(
        aux=_as_of_one(out.aux, size),
        mask=jnp.any(out.mask, 0),
        finite=jnp.all(out.finite, 0),
    )


def _as_of_one(aux: Any, size: int) -> Any:
    """Returns model state and metrics of all pieces as those of one batch.

    What has one entry for each example is put together again; else floats are averaged,
    integers summed in the metrics, and in the model state the last one's.
    """
    model_state, metrics = aux

    def merged(x, otherwise):
        if x.ndim > 1 and x.shape[1] == size:
            return jnp.reshape(x, (-1, *x.shape[2:]))
        return otherwise(x)

    average = lambda x, otherwise: (
        jnp.mean(x, 0) if jnp.issubdtype(x.dtype, jnp.inexact) else otherwise(x)
    )
    state = jax.tree.map(lambda x: average(x, lambda x: x[-1]), model_state)
    total = lambda x: jnp.sum(x, 0, dtype=x.dtype)
    found = jax.tree.map(lambda x: merged(x, lambda x: average(x, total)), metrics)
    return state, found
