"""What `pareto` compares: methods with their budgets, and radii to try.

The fewer parameters are perturbed, and the fewer steps, the larger the best radius. All
methods climb the same ladder of radii, each from a step of its own.
"""

import dataclasses

import lwsam_jax as lwsam


LADDER = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.6, 2.4, 3.2)


@dataclasses.dataclass(frozen=True)
class Method:
    """A point on the price list.

    Attributes:
      name: Short name, for the command line and the rows.
      label: What it is called in the table.
      family: What it has in common with others: one colour in the plot.
      start: Radius from which to look for the best; None for SGD.
      k: Layers of the largest norm; None takes all that the budget admits.
      every: Period of the steps that perturb.
      leaves: Whether every parameter counts, as in SAM, not only the weights.
      max_overhead: As of `lwsam.Method`.
      mean_overhead: As of `lwsam.Method`.
    """

    name: str
    label: str
    family: str
    start: float | None = None
    k: int | None = None
    every: int = 1
    leaves: bool = False
    max_overhead: float | None = None
    mean_overhead: float | None = None


SAM = "SAM every n steps"
TOP = "layer-wise SAM, no budget"
MAX_ALL = "layer-wise SAM, max_overhead, all"
MAX_TOP = "layer-wise SAM, max_overhead, top 3"
MEAN_TOP = "layer-wise SAM, mean_overhead, top 4"
MEAN_ALL = "layer-wise SAM, mean_overhead, all"


def _sam(every: int, start: float) -> Method:
    name, label = "sam", "SAM"
    if every > 1:
        name, label = f"sam-{every}", f"SAM every {every} steps"
    return Method(name, label, SAM, start, every=every, leaves=True)


def _top(k: int, start: float) -> Method:
    return Method(f"top-{k}", f"layer-wise SAM, top {k}", TOP, start, k=k)


def _max(k: int | None, budget: float, start: float) -> Method:
    which, family = ("all", MAX_ALL) if k is None else (f"top {k}", MAX_TOP)
    return Method(
        f"max-{budget:.2f}-{which.replace(' ', '-')}",
        f"layer-wise SAM, {which}, max_overhead {budget:.2f}",
        family,
        start,
        k=k,
        max_overhead=budget,
    )


def _mean(k: int | None, budget: float, start: float) -> Method:
    which, family = ("all", MEAN_ALL) if k is None else (f"top {k}", MEAN_TOP)
    return Method(
        f"mean-{budget:.2f}-{which.replace(' ', '-')}",
        f"layer-wise SAM, {which}, mean_overhead {budget:.2f}",
        family,
        start,
        k=k,
        mean_overhead=budget,
    )


METHODS: tuple[Method, ...] = (
    Method("sgd", "SGD", "SGD"),
    _sam(1, 0.3),
    _sam(2, 0.6),
    _sam(5, 0.8),
    _sam(10, 0.8),
    _top(4, 0.6),
    _top(2, 0.6),
    # On the small CNN 0.05 pays for the last layer alone, which costs next to nothing;
    _max(None, 0.05, 0.8),
    _max(None, 0.10, 0.8),
    # and three layers cost 0.2, so that the top 3 of them are all.
    _max(None, 0.25, 0.8),
    _max(None, 0.50, 0.8),
    _max(3, 0.50, 0.8),
    _mean(4, 0.10, 0.8),
    _mean(4, 0.25, 0.8),
    _mean(4, 0.50, 0.8),
    _mean(None, 0.25, 0.8),
    _mean(None, 0.50, 0.8),
)


def configure(method: Method, rho: float) -> lwsam.Method:
    """Return the library's configuration of a method."""
    if method.name == "sgd":
        return lwsam.Method(lwsam.nothing(), rho=0.0)
    return lwsam.Method(
        lwsam.everything() if method.k is None else lwsam.top_k(method.k),
        rho=rho,
        rule=lwsam.leaves if method.leaves else None,
        when=lwsam.every(method.every),
        max_overhead=method.max_overhead,
        mean_overhead=method.mean_overhead,
    )
