"""The state of a method, and what a loop reads from it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from .. import _checks, _tree
from .._axes.which import Learner
from .._engine.cover import Cover, depth_cover
from .._engine.layers import Layers
from .._method import Method
from .plan import Memory, remember
from .static import register_with_flax, Static


class MethodState(NamedTuple):
    """State of a method: arrays, and one static node with the layers.

    Attributes:
      step_count: int32[], steps done.
      norms: f32[L], gradient norms of the last step (Algorithm 1, line 9), 0 at first.
      mask: bool[L], layers that the next step perturbs.
      value: f32[], loss of the last step that computed it, 0 at first: the clean one, or
        where no pass sees the whole batch so the perturbed one.
      layers: Static node that holds the `Layers`.
      memory: What shape and combine remember.
      ascent: What a stale ascent keeps.
      select: What a selector that learns keeps.
      hyperparams: `rho` and `alpha`, which a loop may set, as `optax.inject_hyperparams`
        has it; in a `TrainState` they stand beside this state.
      pending: Only in a `TrainState`: `selection_lag` masks bool[L] of the steps after
        the next.
      budget: Only in a `TrainState`: what was spent and saved.
    """

    step_count: jax.Array
    norms: jax.Array
    mask: jax.Array
    value: jax.Array
    layers: Static
    memory: Memory = Memory()
    ascent: Any = ()
    select: Any = ()
    hyperparams: Any = ()
    pending: tuple[jax.Array, ...] = ()
    budget: Any = ()


def first(method: Method, params: Any, layers: Layers, opt_state: Any) -> MethodState:
    """Returns the state before the first step, with the first mask.

    Args:
      method: The method.
      params: Parameter tree.
      layers: Its layers.
      opt_state: State of the base optimizer, None if it cannot be seen.
    """
    register_with_flax()
    dtype = _tree.accumulation_dtype(*jax.tree.leaves(params))
    norms = jnp.zeros((len(layers),), dtype)
    step_count = jnp.zeros((), jnp.int32)
    plain = method.is_plain
    kept, seen = (), norms
    if isinstance(method.select, Learner):
        kept = method.select.init(len(layers), dtype)
        seen = method.select.scores(kept)
    return MethodState(
        step_count=step_count,
        norms=norms,
        mask=method.choose(seen, step_count, layers),
        select=kept,
        value=jnp.zeros((), dtype),
        layers=Static(layers),
        memory=Memory() if plain else remember(method, layers, params),
        ascent=method.ascent.init(params, opt_state)
        if method.is_stale and not plain
        else (),
    )


def chosen_by(method: Method, state: MethodState) -> jax.Array:
    """Returns f32[L], what the selector of a method sees in place of the next norms."""
    if isinstance(method.select, Learner):
        return method.select.scores(state.select)
    return state.norms


def advance(state: MethodState, norms: jax.Array, mask: jax.Array) -> MethodState:
    """Returns the state after a step: its norms, and the mask of the next (line 9, 4)."""
    return state._replace(
        step_count=jnp.asarray(optax.safe_increment(state.step_count)),
        norms=norms.astype(state.norms.dtype),
        mask=mask,
    )


def find(kind: type, state: Any) -> list[Any]:
    """Returns every state of a kind inside any pytree, or an optimizer of NNX."""
    if not isinstance(state, tuple) and hasattr(state, "opt_state"):
        state = state.opt_state
    is_ours = lambda node: isinstance(node, kind)
    return [s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s)]


def only(kind: type, who: str, state: Any, what: str) -> Any:
    """Returns the one state of a kind; raises on none or several."""
    found = find(kind, state)
    if len(found) != 1:
        remedy = (
            f"Pass the state of one optax.chain with one {what}, a TrainState, or an "
            "nnx.Optimizer itself (its nnx.state lacks what says which layers)."
        )
        expected, got = f"a state of one {what}", f"{len(found)} of them"
        raise _checks.value_error(who, "state", expected, got, remedy)
    return found[0]


def _only_state(who: str, state: Any) -> MethodState:
    accumulates = lambda node: type(node).__name__ == "MultiStepsState"
    nodes = jax.tree.leaves(state, is_leaf=accumulates)
    if any(accumulates(node) and find(MethodState, node) for node in nodes):
        remedy = (
            "Inside MultiSteps the loss sees only the last micro-batch: put MultiSteps "
            "behind layerwise_sam in the chain, or accumulate in the loss."
        )
        expected, got = "outside of optax.MultiSteps", "inside one"
        raise _checks.value_error(who, "state", expected, got, remedy)
    return only(MethodState, who, state, "layerwise_sam")


def _array(node: Any) -> Any:
    """Returns the array of a leaf; NNX wraps those of its optimizers in Variables."""
    (leaf,) = jax.tree.leaves(node)
    return leaf


def value(state: Any) -> jax.Array:
    """Returns the clean loss of the last `update(value_fn=...)`.

    Args:
      state: Any pytree that holds exactly one `MethodState`.

    Returns:
      f32[] (float64 for float64 parameters); 0 before the first such update. Under
      `pmap` it has the device axis of the state.

    Raises:
      ValueError: If there is none or several of our states, or one inside MultiSteps.
    """
    return _array(_only_state("lwsam.value", state).value)


def selection(state: Any, cover: str | None = None) -> tuple[str, ...] | Cover:
    """Returns the layers that the next step perturbs, as a static value.

    Reads one mask of L bytes from the device, and so waits for the step that wrote it.

    Args:
      state: Any pytree that holds exactly one `MethodState`: an optimizer state, a
        `TrainState`. A leading device axis (pmap) is accepted.
      cover: None for exactly the selected layers, as a tuple of names; "depth" for the
        `Cover` of every layer from the input-most selected one on.

    Returns:
      A hashable value: pass it to a jitted step as a static argument.

    Raises:
      ValueError: If there is none or several of our states, one inside MultiSteps, an
        unknown `cover`, or a leading axis over which the masks differ (an ensemble).
      TypeError: Under tracing, where the mask has no value yet.

    Examples:
      >>> import optax, jax.numpy as jnp, lwsam_jax as lwsam
      >>> tx = optax.chain(lwsam.layerwise_sam(k=1, rho=0.1, alpha=0.8), optax.sgd(0.1))
      >>> state = tx.init({"w1": jnp.ones((2, 2)), "w2": jnp.ones((2, 2))})
      >>> lwsam.selection(state)
      ('w2',)
    """
    who = "lwsam.selection"
    if cover is not None:
        _checks.choice(who, "cover", cover, ("depth",))
    found = _only_state(who, state)
    layers = found.layers.value
    mask = _array(found.mask)
    if isinstance(mask, Tracer):
        remedy = (
            "Call it between the steps, outside jit, and pass the result as static."
        )
        raise _checks.type_error(who, "state", "concrete", "a traced one", remedy)
    if layers is None:
        remedy = "Take the state of tx.init(params) or tx.update(...)."
        raise _checks.value_error(
            who, "state", "one with layers", "one of placeholders", remedy
        )
    mask = read_mask(mask)
    if mask.ndim > 1:
        mask = _one_of_equals(who, mask.reshape(-1, len(layers)))
    return depth_cover(layers, mask) if cover else layers.selected(mask)


def _one_of_equals(who: str, masks: np.ndarray) -> np.ndarray:
    """Returns the mask that all devices share; members of an ensemble have their own."""
    if (masks != masks[0]).any():
        remedy = (
            "A static selection holds for one model: take the state of one member, or "
            "leave the selection to the traced mask (selection=None)."
        )
        got = f"{len(masks)} different ones (a vmapped ensemble?)"
        raise _checks.value_error(who, "state", "one mask for all devices", got, remedy)
    return masks[0]


def read_mask(mask: Any) -> np.ndarray:
    """Copies a mask to the host; of one that spans hosts the part that is here."""
    if getattr(mask, "is_fully_addressable", True) or mask.is_fully_replicated:
        return np.asarray(mask)
    return np.asarray(mask.addressable_data(0))  # of a state with a device axis
