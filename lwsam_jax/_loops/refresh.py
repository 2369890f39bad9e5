"""The model state at weights where no gradient was taken: BatchNorm statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from .. import _checks


def refresh(
    loss_fn: Callable[..., Any],
    params: Any,
    model_state: Any,
    batches: Iterable[Any],
    *,
    key: jax.Array | None = None,
) -> Any:
    """Returns a model state that is re-estimated at the given parameters, forward only.

    A BatchNorm gathers its statistics where gradients are taken. Where these are not the
    weights that are used, as under `perturbed`, the statistics belong to other weights:
    run a few batches through `refresh` before an evaluation, at
    `lwsam.eval_params(opt_state, params)`. The running averages are continued, so that
    their decay says how many batches it takes.

    Args:
      loss_fn: `loss_fn(params, model_state, batch, key) -> (loss, (model_state,
        metrics))`, as for `TrainStep`; jitted here.
      params: The parameters that are used.
      model_state: The model state to begin with.
      batches: Batches of training data, at least one.
      key: PRNG key for what the loss draws, folded with the number of the batch.

    Returns:
      The model state after the last batch.

    Raises:
      ValueError: If there is no batch.
    """
    remedy = "Pass loss_fn(params, model_state, batch, key)."
    _checks.is_callable("refresh", "loss_fn", loss_fn, remedy)
    key = jax.random.key(0) if key is None else key
    for number, batch in enumerate(at_least_one("refresh", batches)):
        numbered = jax.random.fold_in(key, number)
        model_state = _forward(loss_fn, params, model_state, batch, numbered)
    return model_state


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    loss_fn: Any, params: Any, model_state: Any, batch: Any, key: jax.Array
) -> Any:
    return loss_fn(params, model_state, batch, key)[1][0]


def at_least_one(who: str, batches: Iterable[Any]) -> Iterable[Any]:
    """Yields batches as they come; raises where there is none."""
    first = True
    for batch in batches:
        first = False
        yield batch
    if first:
        remedy = "Pass some batches of the training data."
        raise _checks.value_error(who, "batches", "at least one", "none", remedy)
