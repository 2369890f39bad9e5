"""The library's presets as methods that are tuned, each with ranges of its own.

Their other numbers are the published ones, but for those that a batch of 100 images or a
run of a few hundred steps leaves no meaning.
"""

from typing import Any

import lwsam_jax as lwsam
from lwsam_bench.training.recipe import make_schedule
from lwsam_bench.tuning.method import (
    GLOBAL,
    GLOBAL_MICRO,
    GLOBAL_MOMENTUM,
    Method,
    plain,
)
from lwsam_bench.tuning.space import Range


CLASSES = 10
LAYERS = 4  # of layer-wise SAM and SL-SAM
PARTS = 5  # that a batch is cut into
PERIOD = 9  # steps: an epoch of 900 images
RARE = 5  # classes that ImbSAM takes for rare, for none is

# Of one number for each element or filter: it grows with the root of how many there are.
_BY_ELEMENT = Range(1e-4, 1e-2)
_BY_LEAF = Range(1e-3, 0.1)
_BY_FILTER = Range(1e-3, 0.1)
_OF_WEIGHTS = Range(0.02, 1.0)
_DRAWN = Range(0.1, 8.0)  # a drawn direction raises the loss far less than a gradient
_MIXED = {"alpha": Range(0.1, 1.5)}


def _labels(batch: Any) -> Any:
    return batch["label"]


FAMILY: tuple[Method, ...] = (
    Method(
        "lwsam",
        "layer-wise SAM",
        lambda: lwsam.LayerwiseSAM(k=LAYERS, rho=1.0, alpha=0.5),
        Range(0.03, 3.0),
        own=_MIXED,
    ),
    Method("sam_on", "SAM-ON", lambda: lwsam.sam_on(1.0), Range(0.05, 5.0)),
    Method(
        "sparse_sam",
        "Sparse SAM",
        lambda steps: lwsam.sparse_sam(1.0, period=PERIOD, total_steps=steps),
        GLOBAL,
        fixed=("steps",),
    ),
    Method("sl_sam", "SL-SAM", lambda: lwsam.sl_sam(1.0, LAYERS), GLOBAL_MICRO),
    Method("friendly_sam", "Friendly-SAM", lambda: lwsam.friendly_sam(1.0), GLOBAL),
    Method("gcsam", "GCSAM", lambda: lwsam.gcsam(1.0), GLOBAL),
    Method("lightsam", "LightSAM", lambda: lwsam.lightsam(1.0), _BY_ELEMENT),
    Method(
        "mup_perturbation",
        "muP perturbation",
        lambda: lwsam.mup_perturbation(1.0, per="layer"),
        _BY_LEAF,
    ),
    Method(
        "generalized_sam",
        "gradient norm penalty",
        lambda: lwsam.generalized_sam(1.0, 0.5),
        GLOBAL,
        own=_MIXED,
    ),
    Method(
        "gsam",
        "GSAM",
        lambda: lwsam.gsam(1.0, 0.5),
        GLOBAL,
        own={"alpha": Range(0.03, 1.0)},
    ),
    Method("stable_sam", "Stable SAM", lambda: lwsam.stable_sam(1.0), GLOBAL),
    Method(
        "wsam",
        "WSAM",
        lambda lr, steps, gamma: lwsam.wsam(
            1.0, gamma, learning_rate=make_schedule(lr, steps)
        ),
        GLOBAL,
        own={"gamma": Range(0.2, 0.95, widens=False)},
        fixed=("lr", "steps", "gamma"),
    ),
    Method("gam", "GAM", lambda: lwsam.gam(1.0), GLOBAL),
    Method("looksam", "LookSAM", lambda: lwsam.looksam(1.0), GLOBAL),
    Method(
        "ae_sam",
        "AE-SAM",
        lambda steps: lwsam.ae_sam(1.0, steps),
        GLOBAL,
        fixed=("steps",),
    ),
    Method("esam", "ESAM", lambda: lwsam.esam(1.0), GLOBAL, loss="losses"),
    Method("m_sam", "m-sharpness", lambda: lwsam.m_sam(1.0, PARTS), GLOBAL_MICRO),
    Method("csam", "CSAM", lambda: lwsam.csam(1.0), GLOBAL, loss="losses"),
    Method(
        "focal_sam",
        "Focal-SAM",
        lambda: lwsam.focal_sam(1.0, [1] * CLASSES, _labels),
        GLOBAL,
        loss="losses",
    ),
    Method(
        "imbsam",
        "ImbSAM",
        lambda: lwsam.imbsam(1.0, [1] * RARE + [99] * (CLASSES - RARE), _labels),
        GLOBAL,
        loss="losses",
    ),
    Method(
        "momentum_sam",
        "MSAM",
        lambda: lwsam.sam(1.0, ascent=lwsam.momentum()),
        GLOBAL_MOMENTUM,
    ),
    Method("adazo_sam", "AdaZo-SAM", lambda: lwsam.adazo_sam(1.0), _DRAWN),
    Method("lorenza", "LORENZA", lambda: lwsam.lorenza(1.0), _DRAWN),
    Method("async_sam", "asynchronous SAM", lambda: lwsam.async_sam(1.0), GLOBAL_MICRO),
    Method("random_sam", "RandSAM", lambda: lwsam.random_sam(1.0), _DRAWN),
    Method("rwp", "RWP", lambda: lwsam.rwp(1.0), _BY_FILTER),
    Method("m_rwp", "m-RWP", lambda: lwsam.m_rwp(1.0), _BY_FILTER),
    Method("arwp", "ARWP", lambda: lwsam.arwp(1.0), _BY_FILTER),
    Method("m_arwp", "m-ARWP", lambda: lwsam.m_arwp(1.0), _BY_FILTER),
    Method("damp", "DAMP", lambda: lwsam.damp(1.0, PARTS), _OF_WEIGHTS),
    Method("saf", "SAF", plain, loss="saf", own={"weight": Range(0.01, 3.0)}),
    Method("mesa", "MESA", plain, loss="mesa", own={"weight": Range(0.01, 3.0)}),
    Method("adasam", "AdaSAM", lambda: lwsam.sam(1.0), GLOBAL, optimizer="amsgrad"),
)
NAMES = frozenset(method.name for method in FAMILY)
# What they are compared with, and the two that stand among the other methods.
GROUP = ("sgd", "sam", "asam", *(method.name for method in FAMILY), "adamw")
