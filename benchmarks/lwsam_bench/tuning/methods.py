"""The methods that are tuned: how each is made of the library's parts, and its ranges."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lwsam_jax as lwsam
from lwsam_bench.support.errors import UserError
from lwsam_bench.tuning.space import Range, Space


LAYERS = 4  # of the largest norm, where not all are perturbed
EXAMPLES = 10  # that a micro-batch has, whatever the batch
TAIL = 0.3  # share of the steps that a tail has
# The runner starts the count of steps so that a tail, however long, begins here.
TAIL_START = 1_000_000

_NUMBERS: Mapping[str, Space] = {
    "sgd": {"lr": Range(0.02, 0.5), "weight_decay": Range(1e-4, 3e-2)},
    "adamw": {"lr": Range(3e-4, 1e-2), "weight_decay": Range(1e-3, 0.3)},
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
      name: Short name, for the command line and the rows.
      label: What it is called in the table.
      make: Returns the library's method; each run sets its own radius.
      radius: Range of the radius; None of a method that has none.
      optimizer: One of `optimizers.OPTIMIZERS`.
      loss: One of `course.LOSSES`.
      own: Ranges of numbers that no other method has.
      tail: Share of the steps, at the end, that are perturbed.
    """

    name: str
    label: str
    make: Callable[[], lwsam.Method]
    radius: Range | None = None
    optimizer: str = "sgd"
    loss: str = "plain"
    own: Space = dataclasses.field(default_factory=dict)
    tail: float = 1.0

    @property
    def family(self) -> str:
        """The base optimizer that it is compared with: "sgd" or "adamw"."""
        return "adamw" if self.optimizer in ("adamw", "nadamw") else "sgd"

    @property
    def is_base(self) -> bool:
        """Whether the others of its family are compared with it."""
        return self.name == self.family

    def space(self, steps: tuple[int, int]) -> Space:
        """Return all its ranges, those that all methods have first."""
        radius = {} if self.radius is None else {"rho": self.radius}
        return {
            **_NUMBERS[self.family],
            "steps": Range(*steps, whole=True, widens=False),
            **radius,
            **self.own,
        }


def _plain() -> lwsam.Method:
    return lwsam.Method(lwsam.nothing(), rho=0.0)


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

# Each reaches down to a tenth of where one would begin, which does no harm.
_GLOBAL = Range(0.03, 1.2)
_GLOBAL_MICRO = Range(0.05, 2.0)
_GLOBAL_MOMENTUM = Range(0.3, 6.0)
_ELEMENTS = Range(0.05, 5.0)
_ELEMENTS_MOMENTUM = Range(0.5, 30.0)
_SHARE = Range(0.002, 0.1)
_SHARE_MOMENTUM = Range(0.003, 0.3)
_SHARE_RANDOM = Range(0.01, 0.4)


def _adamw(name: str, label: str, make: Callable, radius: Range | None) -> Method:
    return Method(f"adamw-{name}", f"AdamW, {label}", make, radius, "adamw")


METHODS: tuple[Method, ...] = (
    Method("sgd", "SGD", _plain),
    Method("nesterov", "Nesterov", _plain, optimizer="nesterov"),
    Method(
        "ema",
        "SGD, mean of the weights",
        _plain,
        optimizer="ema",
        own={"average": Range(0.02, 0.5)},
    ),
    Method(
        "smoothing",
        "SGD, label smoothing",
        _plain,
        loss="smoothing",
        own={"smoothing": Range(0.02, 0.8)},
    ),
    Method(
        "penalty",
        "SGD, L2 on last layer and activations",
        _plain,
        loss="penalty",
        own={"last_layer": Range(1e-3, 0.3), "activations": Range(1e-3, 0.3)},
    ),
    Method("sam", "SAM", lambda: lwsam.sam(1.0), _GLOBAL),
    Method("sam-relative", "SAM, relative", _part(**_RELATIVE), _SHARE),
    *(
        Method(
            f"sam-every-{n}",
            f"SAM every {n} steps",
            lambda n=n: lwsam.sam(1.0, when=lwsam.every(n)),
            _GLOBAL,
        )
        for n in (2, 5)
    ),
    Method(
        "sam-tail",
        f"SAM in the last {TAIL:.0%} of the steps",
        lambda: lwsam.sam(1.0, when=lwsam.between(TAIL_START, 2**31 - 1)),
        _GLOBAL,
        tail=TAIL,
    ),
    Method("asam", "ASAM", lambda: lwsam.asam(1.0), _ELEMENTS),
    Method("layers", f"top {LAYERS} layers", _of_layers(), _GLOBAL_MICRO),
    Method("micro", f"{EXAMPLES} examples", _part(**_MICRO), _GLOBAL_MICRO),
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
        _GLOBAL_MICRO,
    ),
    Method("momentum", "momentum", _part(**_MOMENTUM), _GLOBAL_MOMENTUM),
    Method(
        "momentum-layers",
        f"momentum, top {LAYERS} layers",
        _of_layers(**_MOMENTUM),
        _GLOBAL_MOMENTUM,
    ),
    Method(
        "momentum-adaptive",
        "momentum, adaptive",
        _part(**_MOMENTUM, shape=lwsam.adaptive()),
        _ELEMENTS_MOMENTUM,
    ),
    Method(
        "momentum-adaptive-layers",
        f"momentum, adaptive, top {LAYERS} layers",
        _of_layers(**_MOMENTUM, shape=lwsam.adaptive()),
        _ELEMENTS_MOMENTUM,
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
    Method("adamw", "AdamW", _plain, optimizer="adamw"),
    Method("nadamw", "NAdamW", _plain, optimizer="nadamw"),
    _adamw("sam", "SAM", lambda: lwsam.sam(1.0), _GLOBAL),
    _adamw(
        "micro-layers",
        f"{EXAMPLES} examples, top {LAYERS} layers",
        _of_layers(**_MICRO),
        _GLOBAL_MICRO,
    ),
    _adamw(
        "momentum-relative",
        "momentum, relative",
        _part(**_MOMENTUM, **_RELATIVE),
        _SHARE_MOMENTUM,
    ),
    _adamw("random-relative", "random, relative", _part(**_RANDOM), _SHARE_RANDOM),
)
BY_NAME: Mapping[str, Method] = {method.name: method for method in METHODS}

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
    "all": tuple(BY_NAME),
    "five": FIVE,
    "five-adamw": FIVE_ADAMW,
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
    return tuple(method for method in METHODS if method.name in wanted)
