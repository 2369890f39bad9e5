"""What `perturbed` takes: parts one by one, or a method that one gradient can follow."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import _checks
from .._axes import ascent as _ascent, shape as _shape, which
from .._axes.combine import descend
from .._axes.probe import Probe
from .._engine.rules import leaves as every_leaf, Rule, weights
from .._method import Method


_WHO = "perturbed"


def method(
    rho: Any, ascent: Any, shape: Any, select: Any, k: Any, rule: Any, seed: Any
) -> Method:
    """Returns the method of the arguments."""
    ascent = _ascent.momentum() if ascent is None else ascent
    shape = _shape.relative() if shape is None else shape
    _check_ascent(ascent)
    if k is not None:
        _checks.count_of_layers(_WHO, "k", k)
    if k is not None and select is not None:
        remedy = "Pass k=4 for the four layers of largest norm, or select=<selector>."
        expected = "given if and only if `select` is not"
        raise _checks.value_error(_WHO, "k", expected, "both", remedy)
    if select is None:
        select = which.everything() if k is None else which.top_k(k)
    _check_select(select)
    rule = _usual_rule(shape) if rule is None else rule
    return Method(select, rho=rho, ascent=ascent, shape=shape, rule=rule, seed=seed)


def of_method(given: Method, has_more: bool) -> Method:
    """Returns a method with a rule; raises where one gradient is not enough for it."""
    if has_more:
        remedy = "Give the parts to the method: lwsam.rwp(0.01, select=...)."
        expected, got = "left out beside a Method", "given"
        raise _checks.value_error(_WHO, "ascent, shape, ...", expected, got, remedy)
    _check_ascent(given.ascent)
    _check_select(given.select)
    if given.combine is not descend():
        remedy = "Use lwsam.TrainStep, or a method with combine=lwsam.descend()."
        expected = "descend(), for the loop takes one gradient"
        raise _checks.value_error(_WHO, "method.combine", expected, "another", remedy)
    refused = (
        "split",
        "descent",
        "max_overhead",
        "mean_overhead",
        "axis_name",
        "layers",
    )
    for name in refused:
        if getattr(given, name) is not None:
            remedy = "Use lwsam.TrainStep, or leave it out."
            expected = "None, for the loop takes the gradient, of its own batch"
            got = repr(getattr(given, name))
            raise _checks.value_error(_WHO, f"method.{name}", expected, got, remedy)
    if given.rule is not None:
        return given
    return dataclasses.replace(given, rule=_usual_rule(given.shape))


def _usual_rule(shape: Any) -> Rule:
    return weights if getattr(shape, "of_layers", False) else every_leaf


def check_base(base: Any) -> None:
    if not (hasattr(base, "init") and hasattr(base, "update")):
        remedy = "Pass an Optax optimizer such as optax.sgd(0.1, momentum=0.9)."
        raise _checks.type_error(_WHO, "base", "an optimizer", repr(base), remedy)


def _check_select(select: Any) -> None:
    if isinstance(select, which.Learner):
        remedy = "Pass random_k(4), top_k(4), or use lwsam.TrainStep or lwsam.as_optax."
        expected, got = "a selector that keeps nothing", "one that learns"
        raise _checks.value_error(_WHO, "select", expected, got, remedy)


def _check_ascent(ascent: Any) -> None:
    if isinstance(_ascent.as_ascent(_WHO, ascent), (_ascent.Part, Probe)):
        remedy = (
            "Pass momentum(), previous() or random(), or use lwsam.TrainStep or "
            "lwsam.as_optax, which take a second gradient."
        )
        expected, got = "one without a gradient of its own", "one with a pass"
        raise _checks.value_error(_WHO, "ascent", expected, got, remedy)
