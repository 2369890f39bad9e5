"""Layer-wise sharpness-aware minimization for JAX (Lee, KDD 2024)."""

from ._cost import step_cost as step_cost, StepCost as StepCost
from ._gradient import LayerwiseGrad as LayerwiseGrad, value_and_grad as value_and_grad
from ._layers import (
    Layers as Layers,
    leaves as leaves,
    modules as modules,
    weights as weights,
)
from ._method import every as every, LayerwiseSAM as LayerwiseSAM
from ._one_step import StepInfo as StepInfo, TrainState as TrainState
from ._selection import (
    Cover as Cover,
    LayerwiseSAMState as LayerwiseSAMState,
    selection as selection,
    value as value,
)
from ._selectors import (
    bottom_k as bottom_k,
    everything as everything,
    named as named,
    nothing as nothing,
    random_k as random_k,
    top_k as top_k,
)
from ._step import TrainStep as TrainStep
from ._transform import layerwise_sam as layerwise_sam
from ._version import __version__ as __version__


__all__ = [
    "Cover",
    "Layers",
    "LayerwiseGrad",
    "LayerwiseSAM",
    "LayerwiseSAMState",
    "StepCost",
    "StepInfo",
    "TrainState",
    "TrainStep",
    "__version__",
    "bottom_k",
    "every",
    "everything",
    "layerwise_sam",
    "leaves",
    "modules",
    "named",
    "nothing",
    "random_k",
    "selection",
    "step_cost",
    "top_k",
    "value",
    "value_and_grad",
    "weights",
]
