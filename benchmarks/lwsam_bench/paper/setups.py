"""The paper's four benchmarks and a language model, each at three scales.

`paper` is Table 1 and sections 4.1 and 4.2; `small` is what two CPU cores train in
minutes; `smoke` runs the same code in seconds and says nothing about the methods. What a
scale changes is told by `notes`, which compares the two setups field by field.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lwsam_bench.paper.scales import CHANGES, PAPER, Setup
from lwsam_bench.support.errors import UserError
from lwsam_bench.training.config import DECAY_AT, METHOD_DEFAULTS, TrainConfig


SCALES = ("smoke", "small", "paper")
BENCHMARKS = ("cifar10", "cifar100", "flowers", "vit")
TITLES: Mapping[str, str] = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "flowers": "Oxford Flowers-102",
    "vit": "CIFAR-100, fine-tuning",
    "lm": "Tiny Shakespeare",
}
METHODS: Mapping[str, str] = {
    "sgd": "SGD",
    "generalized_sam": "generalised SAM",
    "looksam": "LookSAM",
    "lwsam": "layer-wise SAM",
}
# Beyond the paper, layer-wise SAM whose price is set, in FLOPs over those of a plain
# step: in every step almost the price of SGD, and the rule that docs/cost.md recommends.
BUDGET, MEAN_BUDGET = 0.1, 0.5
BUDGETED, RECOMMENDED = "budgeted", "recommended"
LABELS: Mapping[str, str] = {
    **METHODS,
    BUDGETED: f"layer-wise SAM within {1 + BUDGET:g} ×",
    RECOMMENDED: f"layer-wise SAM, mean of {1 + MEAN_BUDGET:g} ×",
}
_RULES: Mapping[str, dict[str, Any]] = {
    BUDGETED: {"max_overhead": BUDGET},
    RECOMMENDED: {
        # The paper's r, but a norm: twice the radius of SAM, for fewer layers ascend.
        "rho": 0.1,
        "alpha": 1.0,
        "normalize": "selected",
        "mean_overhead": MEAN_BUDGET,
    },
}
BEYOND = (
    f"The last two methods are not in the paper. Within {1 + BUDGET:g} ×: the k layers"
    " are those of the largest norms among the layers that keep every step so cheap."
    f" Mean of {1 + MEAN_BUDGET:g} ×: those of the largest norms of all, as soon as the"
    " steps before have saved enough; else of those that a step's own share pays; radius"
    f" {_RULES[RECOMMENDED]['rho']:g}, normalised, not tuned."
)

# What `prepared` resizes images to that come in all sizes, unless it is told otherwise.
_IMAGE_SIZE = 64

_SEEDS: Mapping[str, int] = {"smoke": 1, "small": 3, "paper": 3}


_NOT_IN_THE_PAPER = (
    "The paper does not say how it regularises: here the weight decay is"
    f" {TrainConfig.weight_decay:g}, labels are smoothed by"
    f" {TrainConfig.label_smoothing:g}, and images are padded, cropped and flipped. Nor"
    " does it say at which epochs of which run the learning rate falls; here it does at"
    " two thirds and at 87 % of every run. LookSAM has the radius"
    f" {METHOD_DEFAULTS['looksam'].rho:g} of SAM, normalised over all parameters, and"
    f" reuses its direction with weight {METHOD_DEFAULTS['looksam'].reuse:g}; the paper"
    " gives neither."
)


def setup(benchmark: str, scale: str) -> Setup:
    """Return a benchmark at a scale.

    Args:
      benchmark: One of `BENCHMARKS`, or `lm`.
      scale: One of `SCALES`.

    Raises:
      UserError: On an unknown name.
    """
    if scale not in SCALES:
        raise UserError(f"unknown scale {scale!r}: expected one of {', '.join(SCALES)}")
    if benchmark not in PAPER:
        raise UserError(
            f"unknown benchmark {benchmark!r}: expected one of {', '.join(PAPER)}"
        )
    found = PAPER[benchmark]
    changes = CHANGES[scale].get(benchmark, {})
    if "epochs" in changes:
        changes = {"steps": None, **changes}
    return dataclasses.replace(found, **changes)


def config(
    benchmark: str, method: str, scale: str, seed: int, **changes: Any
) -> TrainConfig:
    """Return the configuration of a run.

    Args:
      benchmark: As for `setup`.
      method: One of `LABELS`, or `sam`.
      scale: As for `setup`.
      seed: Of the run.
      **changes: Fields of `TrainConfig` to be replaced.

    Returns:
      A configuration in which what has no meaning for the method has one fixed value, so
      that equal runs have equal configurations and are trained once.
    """
    if method in _RULES:
        changes = {**_RULES[method], **changes}
        method = "lwsam"
    s, defaults = setup(benchmark, scale), METHOD_DEFAULTS[method]
    ours = method in ("generalized_sam", "lwsam")  # what the paper tuned
    made = TrainConfig(
        dataset=s.dataset,
        model=s.model,
        method=method,
        k=s.k if method == "lwsam" else defaults.k,
        rho=s.rho if ours else defaults.rho,
        alpha=s.alpha if ours else defaults.alpha,
        normalize=defaults.normalize,
        steps=s.steps,
        epochs=s.epochs,
        seed=seed,
        batch_size=s.batch_size,
        lr=s.lr,
        label_smoothing=s.label_smoothing,
        augment=s.augment,
        every=s.every if method == "looksam" else defaults.every,
        reuse=defaults.reuse,
        train_images=s.train_images,
        test_images=s.test_images,
        image_size=s.image_size,
        decay_at=DECAY_AT,
    )
    return dataclasses.replace(made, **changes)


def label(method: str, setup: Setup) -> str:
    """Return the name of one of `LABELS` in a table, with the numbers of Table 1."""
    numbers = {
        "looksam": setup.every,
        **dict.fromkeys(("lwsam", BUDGETED, RECOMMENDED), setup.k),
    }
    number = f" ({numbers[method]})" if method in numbers else ""
    return LABELS[method] + number


def seeds(scale: str, count: int | None = None) -> tuple[int, ...]:
    """Return the seeds of a scale, or as many as the user wants."""
    return tuple(range(_SEEDS[scale] if count is None else count))


def notes(benchmarks: tuple[str, ...], scale: str) -> tuple[str, ...]:
    """Return what a reader of numbers must know: how a scale departs from the paper.

    Args:
      benchmarks: Those that the numbers are of.
      scale: One of `SCALES`.
    """
    told = []
    if scale == "smoke":
        told.append(
            "Smoke: a few steps of tiny networks, to show that everything runs. These"
            " numbers say nothing about the methods."
        )
    elif scale == "small" and set(benchmarks) & set(BENCHMARKS):
        told.append(
            "Networks, data and epochs are reduced to what two CPU cores train in"
            " minutes: the published numbers stand here for reference, not to be compared"
            " with digit for digit."
        )
    for benchmark in benchmarks:
        changes = _differences(PAPER[benchmark], setup(benchmark, scale))
        if changes and benchmark in BENCHMARKS:
            told.append(f"{TITLES[benchmark]}, reduced: {', '.join(changes)}.")
    if set(benchmarks) & set(BENCHMARKS):
        told.append(_NOT_IN_THE_PAPER)
    return tuple(told)


def _differences(paper: Setup, here: Setup) -> list[str]:
    """Describe each field in which a setup departs from the paper's."""
    told = []
    for field in dataclasses.fields(Setup):
        old, new = getattr(paper, field.name), getattr(here, field.name)
        if old == new or field.name == "layers":
            continue
        name = field.name.replace("_", " ")
        if field.name == "image_size":
            old = old or _IMAGE_SIZE
        before = "all" if old is None else f"{old}"
        told.append(f"{name} {_readable(new)} instead of {_readable(before)}")
    return told


def _readable(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
