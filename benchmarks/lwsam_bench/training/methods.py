"""The methods that are compared: presets of the library, and values for its axes."""

from collections.abc import Callable, Mapping
from typing import Any

import lwsam_jax as lwsam
from lwsam_bench.training import family
from lwsam_bench.training.config import NORMALIZE, TrainConfig
from lwsam_bench.training.family import Facts, FAMILY


_SHAPES: Mapping[str, Callable[[], Any]] = {
    "raw": lwsam.raw,
    "normalized": lwsam.normalized,
    "normalized_all": lambda: lwsam.normalized("all"),
    "adaptive": lwsam.adaptive,
    "relative": lwsam.relative,
    "relative_filter": lambda: lwsam.relative("filter"),
}


def configure(
    config: TrainConfig, total_steps: int, facts: Facts | None = None
) -> lwsam.Method:
    """Return the method of a run of so many steps.

    Args:
      config: Of the run.
      total_steps: Its length.
      facts: What else is known of it, for the methods of `family.FAMILY`.
    """
    budgets = {}
    if config.method == "lwsam":
        budgets["max_overhead"] = config.max_overhead
        budgets["mean_overhead"] = config.mean_overhead
    return make_method(
        config.method,
        rho=config.rho,
        alpha=config.alpha,
        k=config.k,
        criterion=config.criterion,
        reuse=config.reuse,
        shape=config.shape or NORMALIZE[config.normalize],
        ascent=_ascent(config),
        when=_when(config, total_steps),
        seed=config.seed,
        facts=facts or Facts(total_steps, learning_rate=config.lr),
        **budgets,
    )


def make_method(
    name: str,
    *,
    rho: Any,
    alpha: Any = 1.0,
    k: int = 0,
    criterion: str = "high",
    reuse: float = 0.0,
    shape: str = "normalized",
    facts: Facts | None = None,
    **parts: Any,
) -> lwsam.Method:
    """Return a method of the library.

    Args:
      name: One of `config.METHODS`.
      rho: Radius, a float or a schedule.
      alpha: Weight of the perturbed gradient, a float or a schedule.
      k: Layers of `lwsam` and `sl_sam`; of `perturbed` and `momentum_sam` too, unless it
        is 0.
      criterion: One of `config.CRITERIA`, for `lwsam`.
      reuse: Weight of the direction that `looksam` keeps for the steps between ascents.
      shape: One of `config.SHAPES`; not read where the shape is the method's own.
      facts: What is known of the run, for the methods of `family.FAMILY`.
      **parts: Other arguments of `lwsam.Method`.

    Raises:
      ValueError: On an unknown name, or parts that cannot be right together.
    """
    if name in FAMILY:
        return family.make(name, rho, k, facts, parts)
    shaped = {"shape": _SHAPES[shape](), **parts}
    match name:
        case "sgd":
            return lwsam.Method(lwsam.nothing(), rho=0.0)
        case "sam" | "generalized_sam":
            return lwsam.sam(rho, combine=lwsam.mix(alpha), **shaped)
        case "lwsam":
            select = _select(criterion, k)
            return lwsam.Method(select, rho=rho, combine=lwsam.mix(alpha), **shaped)
        case "looksam":
            return lwsam.looksam(rho, weight=reuse, **shaped)
        case "asam":
            return lwsam.asam(rho, **parts)
        case "sam_on":
            return lwsam.sam_on(rho, **shaped)
        case "gsam":
            return lwsam.gsam(rho, alpha, **shaped)
        case "friendly_sam":
            return lwsam.friendly_sam(rho, **parts)
        case "esam":
            return lwsam.esam(rho, **parts)
        case "perturbed" | "momentum_sam":
            select = lwsam.top_k(k) if k else lwsam.everything()
            # As the optimizers of these names: a relative radius is one of layers.
            rule = lwsam.weights if shape.startswith("relative") else lwsam.leaves
            return lwsam.Method(select, rho=rho, rule=rule, **shaped)
    raise ValueError(f"`make_method`: unknown method {name!r}")


def _select(criterion: str, k: int) -> Any:
    match criterion:
        case "high":
            return lwsam.top_k(k)
        case "low":
            return lwsam.bottom_k(k)
        case "random":
            return lwsam.random_k(k)
        case "all":
            return lwsam.everything()
    raise ValueError(f"`make_method`: unknown criterion {criterion!r}")


def _ascent(config: TrainConfig) -> Any:
    match config.ascent:
        case "whole_batch":
            return lwsam.whole_batch()
        case "micro_batch":
            return lwsam.micro_batch(config.fraction)
        case "momentum":
            return lwsam.momentum()
        case "previous":
            return lwsam.previous()
        case "random":
            return lwsam.random()
    raise ValueError(f"`configure`: unknown ascent {config.ascent!r}")


def _when(config: TrainConfig, total_steps: int) -> Any:
    if config.last is None:
        return lwsam.every(config.every)
    return lwsam.last(config.last, total_steps)
