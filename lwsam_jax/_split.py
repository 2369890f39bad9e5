"""The split of a traced loss: a prefix that no perturbed parameter reaches, and the rest.

The prefix runs once for both passes of a step, forward and backward; the suffix, which
depends on the perturbed parameters, runs twice. XLA does not find this by itself: behind
a BatchNorm it simplifies the two forward passes differently and then shares nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from . import _checks, _jaxpr


@dataclasses.dataclass(frozen=True)
class Split:
    """A loss in two parts, over flat lists of leaves.

    Attributes:
      prefix: `prefix(rest) -> (residuals, constants)`; `rest` are the parameters that
        are not selected, `residuals` the values through which they reach the loss, and
        `constants` whatever else the suffix reads.
      suffix: `suffix(selected, residuals, constants) -> (value, other outputs)`.
      out_tree: Structure of the loss's whole output; its first leaf is the value.
    """

    prefix: Callable[[Sequence[Any]], tuple[list[Any], list[Any]]]
    suffix: Callable[
        [Sequence[Any], Sequence[Any], Sequence[Any]], tuple[Any, list[Any]]
    ]
    out_tree: Any


def trace_loss(loss_fn: Callable[[Any], Any], params: Any) -> _jaxpr.Traced:
    """Traces a loss of the parameters alone, everything else closed over."""
    leaves, treedef = jax.tree.flatten(params)
    traced = _jaxpr.trace(lambda *xs: loss_fn(jax.tree.unflatten(treedef, xs)), leaves)
    for eqn in traced.eqns:
        if any(_is_ref(atom.aval) for atom in (*eqn.invars, *eqn.outvars)):
            remedy = (
                "Keep state in arrays that the loss takes and returns "
                "(nnx.merge(..., copy=True) inside the loss)."
            )
            raise ValueError(
                _checks.message(
                    "value_and_grad",
                    "loss_fn",
                    "free of mutable Refs, for it runs twice",
                    f"an equation `{eqn.primitive.name}` on a Ref",
                    remedy,
                )
            )
    return traced


def _is_ref(aval: Any) -> bool:
    return "Ref" in type(aval).__name__


class Cut(NamedTuple):
    """The equations of a loss in two parts.

    Attributes:
      before: Equations of the prefix.
      after: Equations of the suffix.
      chosen: Variables of the selected parameters.
      rest: Variables of the other parameters.
      residuals: What crosses from before to after and carries a gradient back.
      constants: What else crosses.
    """

    before: list[core.JaxprEqn]
    after: list[core.JaxprEqn]
    chosen: list[core.Var]
    rest: list[core.Var]
    residuals: list[core.Var]
    constants: list[core.Var]


def cut(traced: _jaxpr.Traced, selected: Sequence[int]) -> Cut:
    """Cuts a traced loss in two.

    Args:
      traced: The loss; its first output is the scalar value.
      selected: Which of its parameter leaves are perturbed, ascending.
    """
    chosen = [traced.invars[i] for i in selected]
    rest = [v for i, v in enumerate(traced.invars) if i not in set(selected)]
    before, after = _divide(_open_large_remats(traced, chosen), chosen)
    crossing = [
        v for v in _jaxpr.free_variables(after, traced.outvars) if v not in set(chosen)
    ]
    # Only through these does the value depend on parameters that are not selected. The
    # batch must not be among them (its gradient is work for nothing), nor what feeds
    # other outputs alone, such as statistics of a BatchNorm.
    from_rest = _jaxpr.dependents(before, rest, differentiably=True)
    to_value = _jaxpr.ancestors(after, traced.outvars[:1])
    carries = lambda v: v in from_rest and v in to_value and _jaxpr.is_inexact(v)
    residuals = [v for v in crossing if carries(v)]
    constants = [v for v in crossing if not carries(v)]
    return Cut(before, after, chosen, rest, residuals, constants)


def split(traced: _jaxpr.Traced, selected: Sequence[int]) -> Split:
    """Returns the two parts of a traced loss as functions; arguments as in `cut`."""
    parts = _without_dead_residuals(traced, cut(traced, selected))
    crossing = [*parts.residuals, *parts.constants]
    inputs = [*parts.rest, *traced.consts]
    build = functools.partial(_jaxpr.make_jaxpr, debug_info=traced.debug_info)
    prefix = _jaxpr.as_function(build(inputs, crossing, parts.before))
    suffix = _jaxpr.as_function(
        build([*parts.chosen, *crossing], traced.outvars, parts.after)
    )

    def run_prefix(rest_leaves):
        outputs = prefix(*rest_leaves, *traced.consts.values())
        return outputs[: len(parts.residuals)], outputs[len(parts.residuals) :]

    def run_suffix(selected_leaves, residuals, constants):
        value, *others = suffix(*selected_leaves, *residuals, *constants)
        return value, others

    return Split(run_prefix, run_suffix, traced.out_tree)


def _divide(
    eqns: Sequence[core.JaxprEqn], chosen: Sequence[core.Var]
) -> tuple[list[core.JaxprEqn], list[core.JaxprEqn]]:
    """Divides equations into those before and those after the chosen variables.

    An effect must not overtake another: after the first effectful equation of the second
    part all later effectful ones belong to it, and with them all that reads them.
    """
    reached = set(chosen)
    before, after = [], []
    effects_follow = False
    for eqn in eqns:
        depends = any(_jaxpr.is_var(atom) and atom in reached for atom in eqn.invars)
        is_effectful = not all(map(_names_an_axis, eqn.effects))
        if depends or (effects_follow and is_effectful):
            effects_follow = effects_follow or is_effectful
            reached.update(eqn.outvars)
            after.append(eqn)
        else:
            before.append(eqn)
    return before, after


def _names_an_axis(effect: Any) -> bool:
    """Whether an effect only says which axis a collective is over, and does nothing."""
    return type(effect).__name__ == "NamedAxisEffect"


def _without_dead_residuals(traced: _jaxpr.Traced, parts: Cut) -> Cut:
    """Makes constants of residuals that came through a while loop and get no gradient.

    JAX has no reverse mode for a while loop and needs none where the gradient that comes
    back is known to be zero. Across the cut it would be an array of zeros, so the suffix
    is first traced to see which of its inputs get a gradient at all.
    """
    from_rest = _jaxpr.dependents(parts.before, parts.rest)
    loops = [
        v
        for eqn in parts.before
        if eqn.primitive.name == "while"
        for v in eqn.outvars
        if v in from_rest
    ]
    if not loops:
        return parts
    looped = _jaxpr.dependents(parts.before, loops)
    alive = _get_gradients(traced, parts)
    dead = [v for i, v in enumerate(parts.residuals) if v in looped and i not in alive]
    residuals = [v for v in parts.residuals if v not in set(dead)]
    return parts._replace(residuals=residuals, constants=[*parts.constants, *dead])


def _get_gradients(traced: _jaxpr.Traced, parts: Cut) -> set[int]:
    """Returns which residuals the value's backward pass carries a gradient to."""
    suffix = _jaxpr.as_function(
        _jaxpr.make_jaxpr(
            [*parts.chosen, *parts.residuals, *parts.constants],
            traced.outvars,
            parts.after,
            traced.debug_info,
        )
    )
    seen: set[int] = set()

    def watched(index, x):
        watch = jax.custom_vjp(lambda x: x)
        watch.defvjp(lambda x: (x, None), lambda _, ct: (seen.add(index) or ct,))
        return watch(x)

    def backward(chosen, residuals, constants):
        run = lambda rs: suffix(
            *chosen, *(watched(i, r) for i, r in enumerate(rs)), *constants
        )[0]
        value, pull = jax.vjp(run, residuals)
        return pull(jnp.ones_like(value))

    inputs = (parts.chosen, parts.residuals, parts.constants)
    jax.eval_shape(backward, *([_abstract(v) for v in vs] for vs in inputs))
    return seen


def _abstract(v: core.Var) -> jax.ShapeDtypeStruct:
    aval: Any = v.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def large_remats(traced: _jaxpr.Traced) -> Callable[[core.JaxprEqn], bool]:
    """Returns whether an equation is a remat of most of the parameters that are used."""
    used = _jaxpr.ancestors(traced.eqns, traced.outvars[:1])
    # Of which parameters a value is made and of nothing else: a cast of one, say.
    made_of = {v: frozenset([v]) for v in traced.invars if v in used}
    count = len(made_of)
    for eqn in traced.eqns:
        inputs = [atom for atom in eqn.invars if _jaxpr.is_var(atom)]
        if inputs and all(v in made_of for v in inputs):
            together = frozenset().union(*(made_of[v] for v in inputs))
            made_of.update(dict.fromkeys(eqn.outvars, together))

    def is_large(eqn):
        if eqn.primitive.name not in _jaxpr.REMAT:
            return False
        inputs = [made_of[a] for a in eqn.invars if _jaxpr.is_var(a) and a in made_of]
        return 2 * len(frozenset().union(*inputs)) > count

    return is_large


def _open_large_remats(
    traced: _jaxpr.Traced, chosen: Sequence[core.Var]
) -> list[core.JaxprEqn]:
    """Cuts in two each remat that holds most of the net and is reached by `chosen`.

    A remat of one block stays whole, since to cut it would keep what it wants to forget.
    A remat around the whole net, kept whole, would leave no prefix at all.
    """
    is_large = large_remats(traced)
    reached = set(chosen)
    eqns = []
    for eqn in traced.eqns:
        inputs = [atom for atom in eqn.invars if _jaxpr.is_var(atom)]
        if not any(v in reached for v in inputs):
            eqns.append(eqn)
            continue
        pieces = _cut_remat(eqn, reached) if is_large(eqn) else [eqn]
        eqns.extend(pieces)
        reached.update(_jaxpr.dependents(pieces, reached & set(inputs)))
    return eqns


def _cut_remat(eqn: core.JaxprEqn, reached: set[core.Var]) -> list[core.JaxprEqn]:
    """Returns a remat as two, the first without the variables in `reached`."""
    body = eqn.params["jaxpr"]
    body_eqns, body_outvars = _jaxpr.inline_body(body)
    outer: dict[core.Var, Any] = dict(zip(body.invars, eqn.invars, strict=True))
    inside = [v for v, a in outer.items() if _jaxpr.is_var(a) and a in reached]
    before, after = _divide(body_eqns, inside)
    if not before:
        return [eqn]
    defined = {v for e in before for v in e.outvars}
    crossing = [v for v in _jaxpr.free_variables(after, body_outvars) if v in defined]
    outer.update({v: core.Var(v.aval) for v in crossing})

    first_inputs = _jaxpr.free_variables(before, crossing)
    first = _jaxpr.make_jaxpr(first_inputs, crossing, before, body.debug_info)
    second_inputs = _jaxpr.free_variables(after, body_outvars)
    second = _jaxpr.make_jaxpr(second_inputs, body_outvars, after, body.debug_info)

    def params(jaxpr, inputs):
        found = {**eqn.params, "jaxpr": jaxpr}
        flags = found.get("prevent_cse")
        # One for each input; older JAX takes a tuple of any length as one true flag.
        if isinstance(flags, tuple) and len(flags) == len(body.invars):
            of = dict(zip(body.invars, flags, strict=True))
            found["prevent_cse"] = tuple(of.get(v, True) for v in inputs)
        return found

    return [
        eqn.replace(
            invars=[outer[v] for v in inputs],
            outvars=outvars,
            params=params(jaxpr, inputs),
            effects=jaxpr.effects,
        )
        for jaxpr, inputs, outvars in (
            (first, first_inputs, [outer[v] for v in crossing]),
            (second, second_inputs, list(eqn.outvars)),
        )
    ]
