"""The options of `train` that say which method: what they are, and what they mean."""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from lwsam_bench.commands.options import arguments as parse
from lwsam_bench.support.errors import UserError
from lwsam_bench.training.config import (
    ASCENTS,
    CRITERIA,
    FAMILY,
    METHOD_DEFAULTS,
    METHODS,
    NORMALIZE,
    OWN_DIRECTION,
    SHAPES,
    STALE,
    TrainConfig,
)


FRACTION = 0.1  # of the batch, that `micro_batch` sees unless the user says otherwise

_BUDGETS = ("max_overhead", "mean_overhead")
_LAYERS = ("k", "criterion", *_BUDGETS)
_ASCENT = ("ascent", "fraction")
_SHAPE = ("shape", "normalize")
# Options that say nothing about a method.
_WITHOUT_MEANING: Mapping[str, tuple[str, ...]] = {
    "sgd": (*_LAYERS, "rho", "alpha", "reuse", "every", "last", *_ASCENT, *_SHAPE),
    "sam": (*_LAYERS, "reuse"),
    "lwsam": ("reuse",),
    "generalized_sam": (*_LAYERS, "reuse"),
    "looksam": (*_LAYERS, "alpha", "normalize", "last"),
    "asam": (*_LAYERS, "alpha", "reuse", *_SHAPE),
    "sam_on": (*_LAYERS, "alpha", "reuse", "normalize"),
    "gsam": (*_LAYERS, "reuse", "normalize"),
    "friendly_sam": (*_LAYERS, "alpha", "reuse", *_SHAPE),
    "esam": (*_LAYERS, "alpha", "reuse", *_ASCENT, *_SHAPE),
    **dict.fromkeys(FAMILY, (*_LAYERS, "alpha", "reuse", *_SHAPE)),
    "sl_sam": ("criterion", *_BUDGETS, "alpha", "reuse", *_SHAPE),
    "ae_sam": (*_LAYERS, "alpha", "reuse", *_SHAPE, "every", "last"),
    **dict.fromkeys(OWN_DIRECTION, (*_LAYERS, "alpha", "reuse", *_SHAPE, *_ASCENT)),
    "perturbed": ("criterion", *_BUDGETS, "alpha", "reuse", "normalize", "fraction"),
    "momentum_sam": ("criterion", *_BUDGETS, "alpha", "reuse", "normalize", *_ASCENT),
}
# Those whose gradient has a part of the ascent's, and the one that never takes any.
_ASCENTS_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("generalized_sam", "gsam", "looksam", *FAMILY), ("whole_batch", "micro_batch")
    ),
    "perturbed": STALE,
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--method", choices=METHODS, default="lwsam")
    add(
        "--k",
        type=parse.count,
        help="layers that are perturbed (default: 4 of lwsam, else all)",
    )
    add("--criterion", choices=CRITERIA, help="norms of the layers that lwsam takes")
    add(
        "--rho", type=parse.non_negative, help="radius (default: of the method's paper)"
    )
    add(
        "--alpha",
        type=parse.non_negative,
        help="weight of the perturbed gradient; for gsam of the surrogate gap",
    )
    add("--ascent", choices=ASCENTS, help="what the perturbation goes along")
    add(
        "--fraction",
        type=parse.share,
        help=f"of the batch, that micro_batch sees (default {FRACTION})",
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--shape", choices=SHAPES, help="of the perturbation")
    shape.add_argument(
        "--normalize", choices=NORMALIZE, help="norm that the perturbation is over"
    )
    when = parser.add_mutually_exclusive_group()
    when.add_argument(
        "--every", type=parse.count, help="steps from one ascent to the next"
    )
    when.add_argument(
        "--last", type=parse.share, help="perturb in the last steps: 0.3 for 30 %%"
    )
    add("--reuse", type=parse.non_negative, help="weight of what looksam keeps")
    add(
        "--max-overhead",
        type=parse.non_negative,
        help="most that a step of lwsam may cost over a plain one: 0.1 for 1.1 times",
    )
    add(
        "--mean-overhead",
        type=parse.non_negative,
        help="the same for the mean step: what one step leaves, a later one may spend",
    )


def fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `TrainConfig` that say which method it is.

    Raises:
      UserError: If an option has no meaning beside the others.
    """
    method = arguments.method
    default = METHOD_DEFAULTS[method]
    refuse(arguments, _WITHOUT_MEANING[method], "method", method)
    all_layers = arguments.criterion == "all"
    if all_layers:
        refuse(arguments, ("k",), "criterion", "all")
    ascent = filled(arguments.ascent, default.ascent)
    if ascent not in _ASCENTS_OF.get(method, ASCENTS):
        raise UserError(f"--ascent {ascent} has no meaning for --method {method}")
    if ascent != "micro_batch":
        refuse(arguments, ("fraction",), "ascent", ascent)
    alpha = default.alpha
    if ascent in STALE:  # there is no gradient to be mixed with
        refuse(arguments, ("alpha",), "ascent", ascent)
        alpha = 1.0
    shape, normalize = _shape(arguments)
    if arguments.rho is None:
        _refuse_default_radius(arguments)
    return {
        "method": method,
        "k": 0 if all_layers else filled(arguments.k, default.k),
        "rho": filled(arguments.rho, default.rho),
        "alpha": filled(arguments.alpha, alpha),
        "normalize": normalize,
        "criterion": filled(arguments.criterion, TrainConfig.criterion),
        "every": filled(arguments.every, default.every),
        "reuse": filled(arguments.reuse, default.reuse),
        "max_overhead": arguments.max_overhead,
        "mean_overhead": arguments.mean_overhead,
        "ascent": ascent,
        "fraction": (
            filled(arguments.fraction, FRACTION) if ascent == "micro_batch" else None
        ),
        "shape": shape,
        "last": arguments.last,
    }


def _shape(arguments: argparse.Namespace) -> tuple[str | None, str]:
    """Return the fields `shape` and `normalize`: one name for one shape."""
    default = METHOD_DEFAULTS[arguments.method]
    if arguments.shape is None:
        return default.shape, filled(arguments.normalize, default.normalize)
    names = {shape: name for name, shape in NORMALIZE.items()}
    if arguments.shape in names:
        return None, names[arguments.shape]
    return arguments.shape, default.normalize


def _refuse_default_radius(arguments: argparse.Namespace) -> None:
    """Raise if the radius of the method's paper would be one of another unit."""
    default = METHOD_DEFAULTS[arguments.method]
    own = (default.shape or NORMALIZE[default.normalize], default.ascent)
    for option, value in (("shape", arguments.shape), ("ascent", arguments.ascent)):
        if value not in (None, "micro_batch", *own):
            raise UserError(
                f"--{option} {value} gives the radius another unit than that of"
                f" --method {arguments.method}: say --rho"
            )


def refuse(
    arguments: argparse.Namespace, options: Iterable[str], kind: str, value: str
) -> None:
    """Raise if one of some options was given, which has no meaning beside another."""
    for option in options:
        if getattr(arguments, option) is not None:
            flag = option.replace("_", "-")
            raise UserError(f"--{flag} has no meaning for --{kind} {value}")


def filled(value: Any, default: Any) -> Any:
    """Return what the user said, or the default."""
    return default if value is None else value
