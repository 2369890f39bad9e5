"""Perturbed training for JAX: layer-wise SAM (Lee, KDD 2024) and its whole family."""

from ._axes.ascent import (
    micro_batch as micro_batch,
    momentum as momentum,
    previous as previous,
    random as random,
    Stale as Stale,
    whole_batch as whole_batch,
)
from ._axes.combine import (
    Combine as Combine,
    descend as descend,
    mix as mix,
    reuse as reuse,
    surrogate_gap as surrogate_gap,
)
from ._axes.descent import sharpest as sharpest
from ._axes.shape import (
    adaptive as adaptive,
    normalized as normalized,
    raw as raw,
    relative as relative,
)
from ._axes.when import (
    always as always,
    between as between,
    every as every,
    last as last,
)
from ._axes.which import (
    bottom_k as bottom_k,
    everything as everything,
    named as named,
    nothing as nothing,
    random_k as random_k,
    top_k as top_k,
)
from ._engine.cost import step_cost as step_cost, StepCost as StepCost
from ._engine.cover import Cover as Cover
from ._engine.layers import Layers as Layers
from ._engine.rules import (
    blocks as blocks,
    leaves as leaves,
    modules as modules,
    weights as weights,
)
from ._loops.functional import value_and_grad as value_and_grad
from ._loops.held import PerturbedState as PerturbedState
from ._loops.perturbed import (
    eval_params as eval_params,
    perturbed as perturbed,
    train_params as train_params,
)
from ._loops.plan import LayerwiseGrad as LayerwiseGrad
from ._loops.refresh import refresh as refresh
from ._loops.state import (
    MethodState as MethodState,
    selection as selection,
    value as value,
)
from ._loops.transform import as_optax as as_optax
from ._method import Method as Method
from ._presets.asam import asam as asam
from ._presets.esam import esam as esam
from ._presets.for_price import for_price as for_price, Priced as Priced
from ._presets.friendly_sam import friendly_sam as friendly_sam
from ._presets.generalized_sam import generalized_sam as generalized_sam
from ._presets.gsam import gsam as gsam
from ._presets.layerwise import (
    layerwise_sam as layerwise_sam,
    LayerwiseSAM as LayerwiseSAM,
)
from ._presets.looksam import looksam as looksam
from ._presets.momentum_sam import momentum_sam as momentum_sam
from ._presets.sam import sam as sam
from ._presets.sam_on import sam_on as sam_on
from ._train.one_step import StepInfo as StepInfo, TrainState as TrainState
from ._train.step import TrainStep as TrainStep
from ._version import __version__ as __version__


__all__ = [
    "Combine",
    "Cover",
    "Layers",
    "LayerwiseGrad",
    "LayerwiseSAM",
    "Method",
    "MethodState",
    "PerturbedState",
    "Stale",
    "Priced",
    "StepCost",
    "StepInfo",
    "TrainState",
    "TrainStep",
    "__version__",
    "adaptive",
    "always",
    "as_optax",
    "asam",
    "between",
    "blocks",
    "bottom_k",
    "descend",
    "esam",
    "eval_params",
    "every",
    "everything",
    "for_price",
    "friendly_sam",
    "generalized_sam",
    "gsam",
    "last",
    "layerwise_sam",
    "leaves",
    "looksam",
    "micro_batch",
    "mix",
    "modules",
    "momentum",
    "momentum_sam",
    "named",
    "normalized",
    "nothing",
    "perturbed",
    "previous",
    "random",
    "random_k",
    "raw",
    "refresh",
    "relative",
    "reuse",
    "sam",
    "sam_on",
    "selection",
    "sharpest",
    "step_cost",
    "surrogate_gap",
    "top_k",
    "train_params",
    "value",
    "value_and_grad",
    "weights",
    "whole_batch",
]
