"""A method for those who know only what it may cost."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .. import _checks
from .._axes import ascent as _ascent, shape as _shape, when as _when, which
from .._engine.cost import StepCost
from .._engine.cover import Cover
from .._method import Method


_WHO = "for_price"
# Fewer examples than this made a poor ascent in our study; more than a quarter of the
# batch never a better one (docs: Cheap ascents).
_FEWEST = 8
_LARGEST = 0.25


class Priced(NamedTuple):
    """What `for_price` chose.

    Attributes:
      method: The `Method`.
      price: FLOPs of its mean step over a plain gradient, by the model of `step_cost`.
      why: The choice and its reason, in words.
    """

    method: Method
    price: float
    why: str


def for_price(
    price: float,
    cost: StepCost,
    *,
    rho: Any = None,
    total_steps: int | None = None,
    **parts: Any,
) -> Priced:
    """Chooses ascent, fraction, layers or tail for a price, and says why.

    In this order, the first that is affordable: a micro-batch ascent on all layers, of
    at least 8 examples and at most a quarter of the batch; the same on the layers from
    some depth on, if these hold half of all layers; the same in the last steps of a run;
    the momentum, which costs nothing.

    Args:
      price: FLOPs of the mean step over a plain gradient, >= 1; FLOPs are not time.
      cost: What `lwsam.step_cost` returned, or `TrainStep.cost`.
      rho: Radius; None takes one to start a search from, relative to the weights: 0.1
        for the momentum, 0.05 for a micro-batch.
      total_steps: Steps of the run, without which there is no tail.
      **parts: Arguments of `Method` in place of those chosen.

    Returns:
      The method, its price, and the reason.

    Raises:
      ValueError: For a price below 1, or a cost that knows no batch.

    Examples:
      >>> import jax.numpy as jnp, lwsam_jax as lwsam
      >>> loss = lambda p, x: jnp.sum(x @ p["w1"] @ p["w2"])
      >>> params = {"w1": jnp.ones((8, 8)), "w2": jnp.ones((8, 8))}
      >>> cost = lwsam.step_cost(loss, params, jnp.ones((100, 8)))
      >>> print(lwsam.for_price(1.1, cost).why)
      The ascent sees 10 of 100 examples and perturbs all layers: 1.10.
    """
    if not _checks.is_number(price) or not price >= 1:
        remedy = "1.1 allows for 1.1 plain gradients a step."
        raise _checks.value_error(_WHO, "price", "a number >= 1", repr(price), remedy)
    if cost.examples is None:
        remedy = "Pass step_cost(loss, params, batch) with the batch as an argument."
        raise _checks.value_error(_WHO, "cost", "one of a batch", "one of none", remedy)
    axes, spent, why = _choose(float(price), cost, total_steps)
    start = 0.1 if "ascent" not in axes else 0.05
    own: dict[str, Any] = dict(
        select=which.everything(),
        rho=start if rho is None else rho,
        shape=_shape.relative(),
        ascent=_ascent.momentum(),
        layers=cost.layers,
    )
    return Priced(Method(**{**own, **axes, **parts}), spent, why)


def _choose(
    price: float, cost: StepCost, total_steps: int | None
) -> tuple[dict[str, Any], float, str]:
    examples = cost.examples or 0
    names = cost.layers.names
    at = lambda count, cover: cost.ratio(cover, count / examples)
    # A share, for the examples are those of one device.
    part = lambda count: {"ascent": _ascent.micro_batch(count / examples)}
    largest = max(int(_LARGEST * examples), 1)
    per_example = at(1, names) - 1
    affordable = math.floor((price - 1) / per_example + 1e-9)
    count = max(min(affordable, largest), min(_FEWEST, largest))
    sees = f"The ascent sees {count} of {examples} examples"
    if at(count, names) <= price + 1e-9:
        spent = at(count, names)
        return part(count), spent, f"{sees} and perturbs all layers: {spent:.2f}."
    for cut in range(1, math.ceil(len(names) / 2)):
        cover = Cover(cost.layers.from_depth(cut))
        if at(count, cover) <= price:
            spent = at(count, cover)
            chosen = {**part(count), "max_overhead": spent - 1}
            which_layers = f"the {len(cover)} layers next to the output"
            return chosen, spent, f"{sees} and perturbs {which_layers}: {spent:.2f}."
    overhead = at(count, names) - 1
    tail = (price - 1) / overhead
    if total_steps and tail * total_steps >= 1:
        share = math.floor(tail * total_steps) / total_steps
        spent = 1 + overhead * share
        chosen = {**part(count), "when": _when.last(share, total_steps)}
        why = (
            f"{sees} in the last {share:.0%} of the steps, on all layers: {spent:.2f}."
        )
        return chosen, spent, why
    why = (
        "The ascent follows the momentum, which costs nothing; the price pays for no "
        f"ascent on {count} examples, which would be {1 + overhead:.2f}."
    )
    return {}, 1.0, why
