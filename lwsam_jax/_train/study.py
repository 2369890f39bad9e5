"""What a `TrainStep` finds out about a loss before its first step."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from .._axes import shape, when, which
from .._axes.descent import is_one_batch, Weighed
from .._axes.probe import Probe
from .._devices.accumulate import cut_shapes
from .._devices.local import OneDevice
from .._engine.cost import step_cost, StepCost
from .._engine.cover import Cover
from .._engine.layers import Layers
from .._method import Method
from . import step_checks as _step_checks
from .executables import Menu


class Study(NamedTuple):
    """The layers of a loss, what they cost, and what steps may run on.

    Attributes:
      layers: The layers, with their depth.
      cost: The cost of the loss on what it sees of the batch.
      ratio: FLOPs of the method's step of a selection over a plain gradient.
      menu: What steps may run on.
      known: bool[L], the layers that every step is compiled for; None if these change.
      closed: Overhead of a step whose `Gate` stays closed.
    """

    layers: Layers
    cost: StepCost
    ratio: Callable[[Any], float]
    menu: Menu
    known: np.ndarray | None
    closed: float = 0.0


def study(
    loss_fn: Callable[..., Any],
    method: Method,
    devices: OneDevice,
    most: int,
    cuts: int,
    params: Any,
    model_state: Any,
    batch: Any,
    key: jax.Array,
    constants: tuple[Any, ...],
) -> Study:
    """Traces a loss on the shapes that it will see; raises on a wrong one."""
    axes = devices.axis_sizes()
    # The batch last, for its examples are counted.
    seen = cut_shapes(_step_checks.WHO, devices.seen(batch), cuts)
    if cuts > 1:
        cut_shapes(_step_checks.WHO, devices.share(batch), cuts)
    args = (model_state, constants, key, seen)
    loss = lambda params, model_state, constants, key, batch: loss_fn(
        params, model_state, batch, key, *constants
    )
    method.layers_of(params)  # refuses what is no parameter before it is traced
    _step_checks.loss(loss, (params, *args), axes)
    layers = method.layers_of(
        params, loss_fn, model_state, seen, key, constants=constants, axis_env=axes
    )
    cost = step_cost(loss, params, *args, layers=layers, axis_env=axes)
    is_cut = method.split is not None or getattr(method.ascent, "cut", None) is not None
    share = devices.share(batch) if is_cut else devices.seen(batch)
    ratio = _ratio(method, cost, params, share, devices.count, cuts)
    chosen = which.always_chosen(method.select, layers)
    menu = Menu(
        layers,
        ratio,
        most,
        chosen=chosen,
        bound=method.max_overhead,
        share=method.mean_overhead,
    )
    known, closed = _known(method, layers, menu, chosen), 0.0
    if method.gate is not None and method.ascent.cut is not None:
        closed = method.ascent.measured(share, devices.count)
    return Study(layers, cost, ratio, menu, known, closed)


def _known(
    method: Method, layers: Layers, menu: Menu, chosen: Any
) -> np.ndarray | None:
    if method.is_plain:
        return np.zeros(len(layers), bool)
    is_periodic = method.when is not when.always() and method.gate is None
    changes = is_periodic or method.mean_overhead is not None
    if chosen is None or changes:
        return None
    names = layers.selected(chosen)
    is_all = [cover.names for cover in menu.covers[1:]] == [names]
    return np.asarray(chosen) if is_all else None  # else a budget leaves some out


def _ratio(
    method: Method, cost: StepCost, params: Any, batch: Any, devices: int, cuts: int
) -> Callable[[Any], float]:
    whole = method.combine.needs == "all" or method.gate is not None
    whole = whole or shape.wants_whole_ascent(method.shape, params)
    part = 0.0 if method.is_stale else method.ascent.measured(batch, devices)
    # What the passes share is kept for one cut at a time, so it is computed twice.
    shared = not method.is_stale and method.ascent.cut is None and cuts == 1
    share = 1.0 if method.descent is None else method.descent.fraction
    more = 0.0
    if isinstance(method.descent, Weighed):
        shared = False
        if method.descent.rest is not None:  # a backward pass, or both
            more = 1.0 - forward_share(cost) if is_one_batch(method.ascent) else 1.0
    if method.combine.pair is not None:  # each pass once more
        more, shared = part + 1.0, False
    if isinstance(method.ascent, Probe):
        more += method.ascent.forwards * forward_share(cost)
    ratio = functools.partial(
        cost.ratio,
        ascent=part,
        whole_ascent=whole,
        descent=share,
        shared=shared,
        freezes=method.combine.freezes,
    )
    total = lambda selection: ratio(selection) + (more if _perturbs(selection) else 0)
    if method.split is None:
        return total
    on_each = method.split.on_each(devices, method.is_stale)
    method.split.size(batch, on_each)  # refuses what cannot be cut, before a step
    return lambda selection: method.split.price(total(selection), on_each)


def forward_share(cost: StepCost) -> float:
    """Returns the FLOPs of a forward pass over those of a plain gradient."""
    return sum(cost.forward) / max(cost.plain, 1.0)


def _perturbs(selection: Any) -> bool:
    return bool(selection.names if isinstance(selection, Cover) else selection)


def warn_if_nothing_is_affordable(method: Method, menu: Menu) -> None:
    """Warns where `max_overhead` is below the price of every layer."""
    if method.max_overhead is None or len(menu.covers) > 1 or method.is_plain:
        return
    warnings.warn(
        f"{_step_checks.WHO}: `max_overhead`={method.max_overhead} is below the price "
        f"of any layer, so every step is plain. The cheapest set, "
        f"{', '.join(menu.cheapest)}, costs {menu.cheapest_price:.4f}.",
        stacklevel=5,
    )
