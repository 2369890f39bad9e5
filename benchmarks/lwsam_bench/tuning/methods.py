"""The methods that are tuned: how each is made of the library's parts, and its ranges."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lwsam_jax as lwsam
from lwsam_bench.support.errors import UserError
from lwsam_bench.tuning.family import FAMILY, GROUP
from lwsam_bench.tuning.method import (
    ELEMENTS,
    ELEMENTS_MOMENTUM,
    GLOBAL,
    GLOBAL_MICRO,
    GLOBAL_MOMENTUM,
    Method,
    plain,
)
from lwsam_bench.tuning.space import Range


LAYERS = 4  # of the largest norm, where not all are perturbed
EXAMPLES = 10  # that a micro-batch has, whatever the batch
TAIL = 0.3  # share of the steps that a tail has
# The runner starts the count of steps so that a tail, however long, begins here.
TAIL_START = 1_000_000


def _part(
    select: Any = None,
    rule: Any = lwsam.leaves,
    **parts: Any,
) -> Callable[[], lwsam.Method]:
    """Return what makes a method of parts; of every leaf unless layers are chosen."""
    return lambda: lwsam.Method(
        select or lwsam.everything(), rho=1.0, rule=rule, **parts
    )


def _of_layers(**parts: Any) -> Callable[[], lwsam.Method]:
    return _part(lwsam.top_k(LAYERS), None, **parts)


_MICRO: Mapping[str, Any] = {"ascent": lwsam.micro_batch(size=EXAMPLES)}
_MOMENTUM: Mapping[str, Any] = {"ascent": lwsam.momentum()}
_RELATIVE: Mapping[str, Any] = {"shape": lwsam.relative(), "rule": lwsam.weights}
_RANDOM: Mapping[str, Any] = {"ascent": lwsam.random(), **_RELATIVE}

# As those of `method`: each reaches down to where it does no harm.
_SHARE = Range(0.002, 0.1)
_SHARE_MOMENTUM = Range(0.003, 0.3)
_SHARE_RANDOM = Range(0.01, 0.4)


def _adamw(name: str, label: str, make: Callable, radius: Range | None) -> Method:
    return Method(f"adamw-{name}", f"AdamW, {label}", make, radius, "adamw")


METHODS: tuple[Method, ...] = (
    Method("sgd", "SGD", plain),
    Method("nesterov", "Nesterov", plain, optimizer="nesterov"),
    Method(
        "ema",
        "SGD, mean of the weights",
        plain,
        optimizer="ema",
        own={"average": Range(0.02, 0.5)},
    ),
    Method(
        "smoothing",
        "SGD, label smoothing",
        plain,
        loss="smoothing",
        own={"smoothing": Range(0.02, 0.8)},
    ),
    Method(
        "penalty",
        "SGD, L2 on last layer and activations",
        plain,
        loss="penalty",
        own={"last_layer": Range(1e-3, 0.3), "activations": Range(1e-3, 0.3)},
    ),
    Method("sam", "SAM", lambda: lwsam.sam(1.0), GLOBAL),
    Method("sam-relative", "SAM, relative", _part(**_RELATIVE), _SHARE),
    *(
        Method(
            f"sam-every-{n}",
            f"SAM every {n} steps",
            lambda n=n: lwsam.sam(1.0, when=lwsam.every(n)),
            GLOBAL,
        )
        for n in (2, 5)
    ),
    Method(
        "sam-tail",
        f"SAM in the last {TAIL:.0%} of the steps",
        lambda: lwsam.sam(1.0, when=lwsam.between(TAIL_START, 2**31 - 1)),
        GLOBAL,
        tail=TAIL,
    ),
    Method("asam", "ASAM", lambda: lwsam.asam(1.0), ELEMENTS),
    Method("layers", f"top {LAYERS} layers", _of_layers(), GLOBAL_MICRO),
    Method("micro", f"{EXAMPLES} examples", _part(**_MICRO), GLOBAL_MICRO),
    Method(
        "micro-relative",
        f"{EXAMPLES} examples, relative",
        _part(**_MICRO, **_RELATIVE),
        _SHARE,
    ),
    Method(
        "micro-layers",
        f"{EXAMPLES} examples, top {LAYERS} layers",
        _of_layers(**_MICRO),
        GLOBAL_MICRO,
    ),
    Method("momentum", "momentum", _part(**_MOMENTUM), GLOBAL_MOMENTUM),
    Method(
        "momentum-layers",
        f"momentum, top {LAYERS} layers",
        _of_layers(**_MOMENTUM),
        GLOBAL_MOMENTUM,
    ),
    Method(
        "momentum-adaptive",
        "momentum, adaptive",
        _part(**_MOMENTUM, shape=lwsam.adaptive()),
        ELEMENTS_MOMENTUM,
    ),
    Method(
        "momentum-adaptive-layers",
        f"momentum, adaptive, top {LAYERS} layers",
        _of_layers(**_MOMENTUM, shape=lwsam.adaptive()),
        ELEMENTS_MOMENTUM,
    ),
    Method(
        "momentum-relative",
        "momentum, relative",
        _part(**_MOMENTUM, **_RELATIVE),
        _SHARE_MOMENTUM,
    ),
    Method(
        "momentum-relative-layers",
        f"momentum, relative, top {LAYERS} layers",
        _of_layers(**_MOMENTUM, shape=lwsam.relative()),
        _SHARE_MOMENTUM,
    ),
    Method("random-relative", "random, relative", _part(**_RANDOM), _SHARE_RANDOM),
    Method("adamw", "AdamW", plain, optimizer="adamw"),
    Method("nadamw", "NAdamW", plain, optimizer="nadamw"),
    _adamw("sam", "SAM", lambda: lwsam.sam(1.0), GLOBAL),
    _adamw(
        "micro-layers",
        f"{EXAMPLES} examples, top {LAYERS} layers",
        _of_layers(**_MICRO),
        GLOBAL_MICRO,
    ),
    _adamw(
        "momentum-relative",
        "momentum, relative",
        _part(**_MOMENTUM, **_RELATIVE),
        _SHARE_MOMENTUM,
    ),
    _adamw("random-relative", "random, relative", _part(**_RANDOM), _SHARE_RANDOM),
)
BY_NAME: Mapping[str, Method] = {method.name: method for method in (*METHODS, *FAMILY)}

# What is tuned where all would take too long.
FIVE = ("sgd", "sam", "micro-layers", "momentum-relative", "random-relative")
FIVE_ADAMW = (
    "adamw",
    "adamw-sam",
    "adamw-micro-layers",
    "adamw-momentum-relative",
    "adamw-random-relative",
)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "all": tuple(method.name for method in METHODS),
    "five": FIVE,
    "five-adamw": FIVE_ADAMW,
    "family": GROUP,
}


def choose(names: Sequence[str]) -> tuple[Method, ...]:
    """Return the methods of these names, and of those groups, each once.

    Raises:
      UserError: On an unknown name.
    """
    wanted = [name for some in names for name in GROUPS.get(some, (some,))]
    unknown = [name for name in wanted if name not in BY_NAME]
    if unknown:
        raise UserError(
            f"--methods has the unknown {', '.join(unknown)}: expected some of"
            f" {', '.join([*GROUPS, *BY_NAME])}"
        )
    return tuple(method for method in BY_NAME.values() if method.name in wanted)
