"""What is tuned: a method of the library, what it trains with, and its ranges."""

import dataclasses
from collections.abc import Callable, Mapping

import lwsam_jax as lwsam
from lwsam_bench.tuning.space import Range, Space


# Each reaches down to a tenth of where one would begin, which does no harm.
GLOBAL = Range(0.03, 1.2)
GLOBAL_MICRO = Range(0.05, 2.0)
GLOBAL_MOMENTUM = Range(0.3, 6.0)
ELEMENTS = Range(0.05, 5.0)
ELEMENTS_MOMENTUM = Range(0.5, 30.0)

ADAM = ("adamw", "nadamw", "amsgrad")  # optimizers that are compared with AdamW

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
      make: Returns the library's method, given the numbers `fixed`; each run sets its own
        radius, and its alpha.
      radius: Range of the radius; None of a method that has none.
      optimizer: One of `optimizers.OPTIMIZERS`.
      loss: One of `course.LOSSES`.
      own: Ranges of numbers that no other method has.
      tail: Share of the steps, at the end, that are perturbed.
      fixed: Names of the numbers of a configuration that its executable has inside, so
        that each configuration is compiled anew.
    """

    name: str
    label: str
    make: Callable[..., lwsam.Method]
    radius: Range | None = None
    optimizer: str = "sgd"
    loss: str = "plain"
    own: Space = dataclasses.field(default_factory=dict)
    tail: float = 1.0
    fixed: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """The base optimizer that it is compared with: "sgd" or "adamw"."""
        return "adamw" if self.optimizer in ADAM else "sgd"

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


def plain() -> lwsam.Method:
    """Return the method that perturbs nothing."""
    return lwsam.Method(lwsam.nothing(), rho=0.0)
