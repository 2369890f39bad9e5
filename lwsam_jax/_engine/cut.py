"""The cut of a loss: a prefix that no perturbed parameter reaches, and the rest.

The prefix runs once for both passes of a step, forward and backward; the suffix, which
depends on the perturbed parameters, runs twice. XLA does not find this by itself: behind
a BatchNorm it simplifies the two forward passes differently and then shares nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from . import graph
from .graph import is_var
from .trace import inline_body, Program


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


def cut(program: Program, chosen: list[core.Var], rest: list[core.Var]) -> Cut:
    """Cuts a traced loss in two.

    Args:
      program: The loss; its first output is the scalar value.
      chosen: Variables of what is perturbed among the parameters.
      rest: Variables of the rest of these.
    """
    before, after = divide(_open_large_remats(program, chosen), chosen)
    crossing = [
        v for v in graph.free_variables(after, program.outputs) if v not in set(chosen)
    ]
    # Only through these does the value depend on parameters that are not selected. The
    # batch must not be among them (its gradient is work for nothing), nor what feeds
    # other outputs alone, such as statistics of a BatchNorm.
    from_rest = graph.dependents(before, rest, differentiably=True)
    to_value = graph.ancestors(after, program.outputs[:1])
    carries = lambda v: v in from_rest and v in to_value and graph.is_inexact(v)
    residuals = [v for v in crossing if carries(v)]
    constants = [v for v in crossing if not carries(v)]
    return Cut(before, after, chosen, rest, residuals, constants)


def divide(
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
        depends = any(is_var(atom) and atom in reached for atom in eqn.invars)
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


def large_remats(program: Program) -> Callable[[core.JaxprEqn], bool]:
    """Returns whether an equation is a remat of most of the parameters that are used."""
    used = graph.ancestors(program.eqns, program.outputs[:1])
    # Of which parameters a value is made and of nothing else: a cast of one, say.
    made_of = {v: frozenset([v]) for v in program.params if v in used}
    count = len(made_of)
    for eqn in program.eqns:
        inputs = [atom for atom in eqn.invars if is_var(atom)]
        if inputs and all(v in made_of for v in inputs):
            together = frozenset().union(*(made_of[v] for v in inputs))
            made_of.update(dict.fromkeys(eqn.outvars, together))

    def is_large(eqn):
        if eqn.primitive.name not in graph.REMAT:
            return False
        inputs = [made_of[a] for a in eqn.invars if is_var(a) and a in made_of]
        return 2 * len(frozenset().union(*inputs)) > count

    return is_large


def _open_large_remats(
    program: Program, chosen: Sequence[core.Var]
) -> list[core.JaxprEqn]:
    """Cuts in two each remat that holds most of the net and is reached by `chosen`.

    A remat of one block stays whole, since to cut it would keep what it wants to forget.
    A remat around the whole net, kept whole, would leave no prefix at all.
    """
    is_large = large_remats(program)
    reached = set(chosen)
    eqns = []
    for eqn in program.eqns:
        inputs = [atom for atom in eqn.invars if is_var(atom)]
        if not any(v in reached for v in inputs):
            eqns.append(eqn)
            continue
        pieces = _cut_remat(eqn, reached) if is_large(eqn) else [eqn]
        eqns.extend(pieces)
        reached.update(graph.dependents(pieces, reached & set(inputs)))
    return eqns


def _cut_remat(eqn: core.JaxprEqn, reached: set[core.Var]) -> list[core.JaxprEqn]:
    """Returns a remat as two, the first without the variables in `reached`."""
    body = eqn.params["jaxpr"]
    body_eqns, body_outvars = inline_body(body)
    outer: dict[core.Var, Any] = dict(zip(body.invars, eqn.invars, strict=True))
    inside = [v for v, a in outer.items() if is_var(a) and a in reached]
    before, after = divide(body_eqns, inside)
    if not before:
        return [eqn]
    defined = {v for e in before for v in e.outvars}
    crossing = [v for v in graph.free_variables(after, body_outvars) if v in defined]
    outer.update({v: core.Var(v.aval) for v in crossing})

    first_inputs = graph.free_variables(before, crossing)
    first = graph.make_jaxpr(first_inputs, crossing, before, body.debug_info)
    second_inputs = graph.free_variables(after, body_outvars)
    second = graph.make_jaxpr(second_inputs, body_outvars, after, body.debug_info)

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
