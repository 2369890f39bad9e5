"""What `TrainStep` refuses, and how it says so."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .. import _checks, _tree
from .._axes.ascent import random
from .._axes.sub_batches import sub_batches
from .._devices.local import OneDevice
from .._engine.layers import refuse_unsorted
from .._loops import state as _state
from .._loops.functional import refuse_integers
from .._loops.held import PerturbedState
from .._method import Method


WHO = "TrainStep"
SYNC = ("global", "device")


def one_of_many(x: Any) -> jax.ShapeDtypeStruct:
    """Returns what a step sees of an array that has an axis of steps in front."""
    if not getattr(x, "ndim", 0):
        remedy = "Stack the batches: every array, scalars too, has the steps first."
        raise _checks.value_error(
            f"{WHO}.scan", "batches", "arrays with an axis of steps", x, remedy
        )
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def arguments(loss_fn: Any, base_optimizer: Any, method: Any) -> None:
    """Raises unless loss, optimizer and method are what they should be."""
    remedy = "Pass loss_fn(params, model_state, batch, key)."
    _checks.is_callable(WHO, "loss_fn", loss_fn, remedy)
    if not (hasattr(base_optimizer, "init") and hasattr(base_optimizer, "update")):
        remedy = "Pass an Optax transformation such as optax.sgd(0.1)."
        raise _checks.type_error(
            WHO, "base_optimizer", "a transformation", base_optimizer, remedy
        )
    if not isinstance(method, Method):
        remedy = "Pass a lwsam.Method: lwsam.LayerwiseSAM(k=4, ...), lwsam.sam(0.05)."
        raise _checks.type_error(WHO, "method", "a Method", method, remedy)
    if method.axis_name is not None:
        remedy = "Leave it out: TrainStep names the axis after `parallel`."
        raise _checks.value_error(
            WHO, "method.axis_name", "None", method.axis_name, remedy
        )


def loss(loss_fn: Any, args: tuple[Any, ...], axes: Any) -> None:
    """Raises unless the loss returns (loss, (model state as it came, metrics))."""
    refuse_integers(WHO, args[0])
    _model_state(args[1])
    _, output = jax.make_jaxpr(loss_fn, axis_env=axes, return_shape=True)(*args)
    is_pair = lambda x: isinstance(x, tuple) and len(x) == 2
    if not (is_pair(output) and is_pair(output[1])):
        remedy = "Return loss, (model_state, metrics); {} where there is nothing."
        expected = "a function to (loss, (model_state, metrics))"
        got = str(jax.tree.structure(output))
        raise _checks.type_error(WHO, "loss_fn", expected, got, remedy)
    value, (model_state, _) = output
    if getattr(value, "shape", None) != ():
        remedy = "Reduce the loss, for instance with jnp.mean."
        expected, got = "a function to a scalar loss", f"one to {value}"
        raise _checks.type_error(WHO, "loss_fn", expected, got, remedy)
    given, returned = _kinds(args[1]), _kinds(model_state)
    structures = jax.tree.structure(args[1]), jax.tree.structure(model_state)
    if given != returned or structures[0] != structures[1]:
        remedy = "Return the model state with the structure, shapes and dtypes it has."
        if given == returned:  # containers of other types
            given, returned = map(str, structures)
        expected = f"a function that returns a model state of {given}"
        got = f"one of {returned}"
        raise _checks.type_error(WHO, "loss_fn", expected, got, remedy)


def _model_state(tree: Any) -> None:
    """Raises on what no step can carry."""
    refuse_unsorted(WHO, "model_state", tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        kind = getattr(dtype, "kind", None)  # PRNG keys have none
        is_array = hasattr(leaf, "shape") and kind not in tuple("OUSMm")
        if dtype is None or not is_array:
            is_array = isinstance(leaf, numbers.Number)
        if not is_array:
            got = f"{leaf!r} at {jax.tree_util.keystr(path)}"
            remedy = "Take it out, to give it back inside the loss."
            raise _checks.type_error(
                WHO, "model_state", "a tree of arrays", got, remedy
            )


def synchronized(method: Method, sync: str, devices: OneDevice) -> Method:
    """Returns the method with a perturbation for each device, if that is asked for."""
    _checks.choice(WHO, "sync", sync, SYNC)
    if sync == "global":
        return method
    refuse = lambda got, remedy: _checks.value_error(
        WHO, "sync", "'global'", f"'device' {got}", remedy
    )
    if not devices.axis_sizes():
        raise refuse("on one device", "Pass parallel=mesh, or leave it out.")
    if method.split is not None:
        raise refuse("beside a method with a `split`", "Leave one of them out.")
    if method.is_stale and method.ascent is not random():
        remedy = "Pass random(), or an ascent with a pass of its own."
        raise refuse("with an ascent that is the same on every device", remedy)
    return dataclasses.replace(method, split=sub_batches(devices.count))


def of_a_call(state: Any, others: Any) -> None:
    """Raises under tracing, and on a state that a step has donated."""
    if any(isinstance(x, Tracer) for x in [state.step, *jax.tree.leaves(others)]):
        remedy = "It jits itself, and chooses its executable by the state's mask."
        raise _checks.type_error(
            WHO, "state", "concrete", "a tracer (under jit)", remedy
        )
    if getattr(state.step, "is_deleted", bool)():
        remedy = (
            "Use the state that the step returned, or pass TrainStep(donate=False)."
        )
        got = "one that was donated to a step before"
        raise _checks.value_error(WHO, "state", "a live one", got, remedy)


def _kinds(tree: Any) -> str:
    """Returns path, dtype and shape of every leaf, as text."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return ", ".join(
        f"{jax.tree_util.keystr(path)}: {jnp.result_type(x)}{list(jnp.shape(x))}"
        for path, x in leaves
    )


def optimizer_state(opt_state: Any) -> None:
    """Raises on a base optimizer that perturbs by itself."""
    for kind, name in (
        (_state.MethodState, "layerwise_sam"),
        (PerturbedState, "perturbed"),
    ):
        if _state.find(kind, opt_state):
            remedy = "Pass the bare base optimizer; TrainStep does the rest."
            got = f"one with a {name} in it"
            raise _checks.value_error(WHO, "base_optimizer", "without one", got, remedy)


def hyperparams(state: Any, method: Method) -> dict[str, jax.Array]:
    """Returns copies of the hyperparameters of a state, of the dtypes that steps have."""
    own = method.hyperparams(_tree.accumulation_dtype(*jax.tree.leaves(state.params)))
    given = state.hyperparams
    if set(given) != set(own):
        remedy = (
            "Set those that are there; a Python rho of 0 or alpha of 1 is static: pass "
            "another number to the method to set it later."
        )
        expected, got = f"a dict of {sorted(own)}", f"{sorted(given)}"
        raise _checks.value_error(WHO, "state.hyperparams", expected, got, remedy)
    for name, x in given.items():
        if jnp.shape(x) != ():
            remedy = "Set a number or a scalar array."
            where = f"state.hyperparams[{name!r}]"
            raise _checks.value_error(WHO, where, "a scalar", str(jnp.shape(x)), remedy)
    return {name: jnp.array(given[name], x.dtype) for name, x in own.items()}
