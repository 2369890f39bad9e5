"""A method as an Optax transformation, first in its chain."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _tree
from .._engine.cover import Cover, static_selection
from .._method import Method
from . import moves as _moves, passes as _passes, state as _state
from .functional import check_mask, refuse_integers, scalar_loss
from .plan import direction_of, Memory, Plan
from .state import MethodState
from .static import Static
from .varying import mean


_WHO = "layerwise_sam"


class _Sources(NamedTuple):
    """What a call of `update` offers to take gradients from."""

    grad_fn: Callable[..., Any] | None
    value_fn: Callable[..., Any] | None
    ascent_value_fn: Callable[..., Any] | None


def as_optax(method: Method) -> optax.GradientTransformationExtraArgs:
    r"""Returns a method as a transformation that stands first in its `optax.chain`.

    Its `update(grads, state, params, ...)` takes `grad_fn` or `value_fn`, and
    `selection`, as `lwsam.layerwise_sam` says; `ascent_value_fn` beside `value_fn` is
    the loss on what a micro-batch ascent sees. Other keywords (`loss`, `grams`,
    `value`) are ignored. With a stale ascent the incoming gradients are not read where
    something is perturbed, and `grad_fn` is called at the perturbed point alone; the
    base optimizer's moment cannot be seen from here, so `momentum()` keeps its own.

    The state is a NamedTuple of arrays and one static node. `state.hyperparams` holds
    `rho` and `alpha`: a loop sets them with
    `state._replace(hyperparams={**state.hyperparams, "rho": jnp.float32(0.05)})`.
    A budget is `TrainStep`'s alone.

    Args:
      method: A `Method`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If it is no `Method`.
      ValueError: For one with a budget, or with a `descent` of its own.

    Examples:
      >>> import optax, lwsam_jax as lwsam
      >>> tx = optax.chain(lwsam.as_optax(lwsam.asam(0.5)), optax.sgd(0.1))
    """
    _check(method)

    def init_fn(params: optax.Params) -> MethodState:
        if type(params).__name__ == "_ParamsPlaceholder":  # of optax.tree.map_params
            return _placeholder_state(method, params)
        params = _fast(params)
        state = _state.first(method, params, method.layers_of(params), None)
        dtype = _tree.accumulation_dtype(*jax.tree.leaves(params))
        return state._replace(hyperparams=method.hyperparams(dtype))

    def update_fn(
        updates: optax.Updates,
        state: MethodState,
        params: optax.Params | None = None,
        *,
        grad_fn: Callable[..., Any] | None = None,
        value_fn: Callable[..., Any] | None = None,
        obj_fn: Callable[..., Any] | None = None,
        ascent_value_fn: Callable[..., Any] | None = None,
        selection: tuple[str, ...] | Cover | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MethodState]:
        del extra_args
        if params is None:
            remedy = "Call tx.update(grads, opt_state, params, grad_fn=jax.grad(loss))."
            raise _checks.value_error(_WHO, "params", "given", None, remedy)
        params = _fast(params)
        known = method.layers_of(params)
        known.flatten(_WHO, "updates", updates)
        _check_shapes("updates", updates, params)
        refuse_integers(_WHO, params)
        value_fn = obj_fn if value_fn is None and grad_fn is None else value_fn
        sources = _sources(grad_fn, value_fn, ascent_value_fn, params)
        if method.is_plain:
            selection = ()
        elif selection is None:
            selection = Cover(known.names)
        chosen, is_cover = static_selection(_WHO, selection, known)
        mask = state.mask if is_cover else None
        check_mask(_WHO, mask, known)
        hyperparams = method.scheduled(state.hyperparams, state.step_count)
        plan = Plan(
            layers=known,
            chosen=chosen,
            mask=mask,
            rho=hyperparams.get("rho", method.rho),
            alpha=hyperparams.get("alpha", method.combine.alpha),
            shape=method.shape,
            combine=method.combine,
            axis_name=method.axis_name,
            gate=None if method.is_plain else method.gate,
            step=state.step_count,
        )
        updates, norms, value, memory = _gradient(
            method, plan, state, sources, updates, params
        )
        kept = state.ascent
        if method.is_stale and not method.is_plain:
            kept = method.ascent.update(kept, updates)
        count = jnp.asarray(optax.safe_increment(state.step_count))
        learned, seen = method.look(
            state.select, norms.astype(state.norms.dtype), plan.bits
        )
        decided = method.choose(seen, count, known)
        return updates, _state.advance(state, norms, decided)._replace(
            value=value.astype(state.value.dtype),
            layers=Static(known),
            memory=memory,
            ascent=kept,
            select=learned,
            hyperparams=hyperparams,
        )

    # Optax's alias of a state does not admit NamedTuples, its own states included.
    return optax.GradientTransformationExtraArgs(
        init_fn,  # pyright: ignore[reportArgumentType]
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def _fast(params: Any) -> Any:
    """Returns those at which gradients are taken, of the two of optax.lookahead."""
    return params.fast if type(params).__name__ == "LookaheadParams" else params


def _check(method: Any) -> None:
    who = "as_optax"
    if not isinstance(method, Method):
        remedy = "Pass a lwsam.Method, such as lwsam.sam(0.05)."
        raise _checks.type_error(who, "method", "a Method", repr(method), remedy)
    for name in ("max_overhead", "mean_overhead", "descent", "split"):
        if getattr(method, name) is not None:
            remedy = "Use lwsam.TrainStep, which has the batch and chooses what runs."
            expected, got = (
                "None, for no batch is seen here",
                repr(getattr(method, name)),
            )
            raise _checks.value_error(who, f"method.{name}", expected, got, remedy)
    if method.combine.freezes:
        remedy = "Use lwsam.TrainStep, or combine=lwsam.descend()."
        expected = "one that freezes nothing, for the base optimizer is not seen here"
        raise _checks.value_error(who, "method.combine", expected, "another", remedy)
    if method.combine.late is not None:
        remedy = "Use lwsam.TrainStep, or a form that goes through the base optimizer."
        expected = (
            "one without a step after the base optimizer's, which is not seen here"
        )
        raise _checks.value_error(who, "method.combine", expected, "one with", remedy)


def _placeholder_state(method: Method, params: Any) -> MethodState:
    kept = method.is_stale and not method.is_plain
    return MethodState(
        step_count=jnp.zeros((), jnp.int32),
        norms=jnp.zeros((0,)),
        mask=jnp.zeros((0,), bool),
        value=jnp.zeros(()),
        layers=Static(None, is_placeholder=True),
        memory=Memory()
        if method.is_plain
        else Memory(method.shape.init(params), method.combine.init(())),
        ascent=method.ascent.init(params, None) if kept else (),
        hyperparams=method.hyperparams(jnp.float32),
    )


def _check_shapes(argument: str, grads: Any, params: Any) -> None:
    """Raises unless each gradient has the shape of its parameter."""
    named = jax.tree_util.tree_leaves_with_path(params)
    for (path, w), g in zip(named, jax.tree.leaves(grads), strict=True):
        if jnp.shape(w) != jnp.shape(g):
            where = jax.tree_util.keystr(path)
            expected = f"of shape {jnp.shape(w)} at {where}, as `params`"
            remedy = "Pass the gradients of these parameters."
            raise _checks.value_error(
                _WHO, argument, expected, str(jnp.shape(g)), remedy
            )


def _sources(
    grad_fn: Any, value_fn: Any, ascent_value_fn: Any, params: Any
) -> _Sources:
    given = {
        "grad_fn": grad_fn,
        "value_fn": value_fn,
        "ascent_value_fn": ascent_value_fn,
    }
    remedy = "Pass a function of the parameters alone, such as jax.grad(loss)."
    for name, function in given.items():
        if function is not None:
            _checks.is_callable(_WHO, name, function, remedy)
    if grad_fn is not None and value_fn is not None:
        raise _checks.value_error(
            _WHO, "grad_fn", "given, or else `value_fn`", "both", _ONE
        )
    if ascent_value_fn is not None and value_fn is None:
        remedy = "Pass value_fn= beside it: the loss on the whole batch."
        expected = "left out, or given with `value_fn`"
        got = "given without it"
        raise _checks.value_error(_WHO, "ascent_value_fn", expected, got, remedy)
    losses = [
        f and scalar_loss(_WHO, name, _of_params(name, f), has_aux=False)
        for name, f in (("value_fn", value_fn), ("ascent_value_fn", ascent_value_fn))
    ]
    return _Sources(grad_fn, *losses)


_ONE = (
    "Call tx.update(grads, opt_state, params, grad_fn=jax.grad(loss)), or "
    "tx.update(grads, opt_state, params, value_fn=loss)."
)


def _of_params(name: str, loss: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the loss without its aux; says what to pass where it wants a model."""

    def value(params):
        try:
            output = loss(params)
        except (TypeError, AttributeError) as error:
            if type(params).__name__ != "State":  # what nnx.Optimizer hands over
                raise
            remedy = (
                "Pass lambda p: loss(nnx.merge(graphdef, p, rest, copy=True)), with "
                "graphdef, _, rest = nnx.split(model, nnx.Param, ...)."
            )
            expected = "a function of the parameters, an nnx.State"
            got = f"one that fails on it ({type(error).__name__}: {error})"
            raise _checks.type_error(_WHO, name, expected, got, remedy) from error
        return output[0] if isinstance(output, tuple) and len(output) == 2 else output

    return value


def _gradient(
    method: Method,
    plan: Plan,
    state: MethodState,
    sources: _Sources,
    updates: Any,
    params: Any,
) -> tuple[Any, jax.Array, jax.Array, Memory]:
    """Returns the gradient of a step, its norms, the clean value and the memory."""
    # With `value_fn` nobody else needs the incoming gradients to be averaged.
    recomputed = None not in (sources.value_fn, plan.axis_name)
    if not plan.chosen and not recomputed:
        value = state.value
        if sources.value_fn is not None:
            value = mean(sources.value_fn(params)[0], plan.axis_name)
        norms = plan.layers.norms(updates)
        grads = _moves.without_ascent(
            plan.combine, plan.layers, updates, state.memory.combine
        )
        return grads, norms, value, state.memory
    if sources.value_fn is None and sources.grad_fn is None:
        expected, got = "given, or else `value_fn`", "neither"
        raise _checks.value_error(_WHO, "grad_fn", expected, got, _ONE)
    direction = None
    if method.is_stale and plan.chosen:
        key = jax.random.fold_in(jax.random.key(method.seed), state.step_count)
        direction = direction_of(method, state.ascent, None, params, key)
    elif (
        plan.chosen
        and not method.is_stale
        and method.ascent.cut is not None
        and sources.ascent_value_fn is None
    ):
        remedy = "Pass value_fn=loss on the batch and ascent_value_fn=loss on a part."
        expected = "given, for the ascent sees a part of the batch"
        raise _checks.value_error(_WHO, "ascent_value_fn", expected, "None", remedy)
    if sources.grad_fn is not None:
        if callable(direction) or plan.combine.pair is not None:
            remedy = "Pass value_fn=loss on the batch, in place of grad_fn."
            expected = "None, for the method looks at the loss more than twice"
            raise _checks.value_error(_WHO, "grad_fn", expected, "given", remedy)
        return _from_grad_fn(plan, state, sources.grad_fn, updates, params, direction)
    ascent, loss = sources.ascent_value_fn, sources.value_fn
    assert loss is not None
    out, memory = _passes.evaluate(
        plan,
        state.memory,
        loss,
        params,
        ascent_loss=ascent if direction is None else None,
        direction=direction,
    )
    return out.grads, out.norms, out.value, memory


def _from_grad_fn(
    plan: Plan,
    state: MethodState,
    grad_fn: Callable[..., Any],
    grads: Any,
    params: Any,
    direction: Any,
) -> tuple[Any, jax.Array, jax.Array, Memory]:
    """The incoming gradients are the ascent; `grad_fn` is called once."""

    def descent_of(moved):
        perturbed = _call(grad_fn, moved)
        plan.layers.flatten(_WHO, "grad_fn", perturbed)
        _check_shapes("grad_fn", perturbed, params)
        return perturbed

    final, norms, memory = _passes.from_gradients(
        plan, state.memory, grads, params, descent_of, direction
    )
    cast = lambda x, g: x.astype(_tree.own(g))
    return jax.tree.map(cast, final, grads), norms, state.value, memory


def _call(grad_fn: Callable[..., Any], params: Any) -> Any:
    """Calls with one argument if the function takes one, else as optax.contrib.sam."""
    try:
        inspect.signature(grad_fn).bind(params)
    except TypeError:
        return grad_fn(params, 0)
    except ValueError:  # no signature to read
        return grad_fn(params)
    return grad_fn(params)
