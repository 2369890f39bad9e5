"""Perturbed training for JAX: layer-wise SAM (Lee, KDD 2024) and its whole family."""

from ._axes.ascent import micro_batch, momentum, previous, random, Stale, whole_batch
from ._axes.bandit import bandit
from ._axes.combine import (
    Combine,
    decoupled,
    descend,
    descend_on_selected,
    flatness,
    match_norm,
    mix,
    reuse,
    surrogate_gap,
)
from ._axes.descent import sharpest, weighed
from ._axes.probe import differences, Probe, subspace_differences
from ._axes.proportional import proportional
from ._axes.shape import adaptive, normalized, raw, relative
from ._axes.sparse import ElementMask, fisher_mask, set_mask, sparse
from ._axes.sub_batches import sub_batches
from ._axes.when import always, between, every, Gate, last, unusual
from ._axes.which import bottom_k, everything, Learner, named, nothing, random_k, top_k
from ._engine.cost import step_cost, StepCost
from ._engine.cover import Cover
from ._engine.layers import Layers
from ._engine.loss_scale import DynamicLossScale, LossScaleState
from ._engine.rules import blocks, leaves, modules, stacked, weights
from ._loops.functional import value_and_grad
from ._loops.held import PerturbedState
from ._loops.perturbed import eval_params, perturbed, train_params
from ._loops.plan import LayerwiseGrad
from ._loops.refresh import refresh
from ._loops.state import MethodState, selection, value
from ._loops.transform import as_optax
from ._measure.sharpness import Measures, Sharpness, sharpness
from ._method import Method
from ._presets.ascent.adazo_sam import adazo_sam
from ._presets.ascent.async_sam import async_sam
from ._presets.ascent.lorenza import lorenza
from ._presets.ascent.momentum_sam import momentum_sam
from ._presets.combine.gam import gam
from ._presets.combine.generalized_sam import generalized_sam
from ._presets.combine.gsam import gsam
from ._presets.combine.stable_sam import stable_sam
from ._presets.combine.wsam import wsam
from ._presets.for_price import for_price, Priced
from ._presets.noise.arwp import arwp, m_arwp
from ._presets.noise.damp import damp
from ._presets.noise.flat_lora import flat_lora
from ._presets.noise.random_sam import random_sam
from ._presets.noise.rwp import m_rwp, rwp
from ._presets.sam import sam
from ._presets.samples.csam import csam
from ._presets.samples.esam import esam
from ._presets.samples.focal_sam import focal_sam
from ._presets.samples.imbsam import imbsam
from ._presets.samples.m_sam import m_sam
from ._presets.shape.asam import asam
from ._presets.shape.friendly_sam import friendly_sam
from ._presets.shape.gcsam import gcsam
from ._presets.shape.lightsam import light_scale, lightsam
from ._presets.shape.mup_perturbation import mup_perturbation
from ._presets.unperturbed.das import das, DASState
from ._presets.unperturbed.trajectory import MESA, mesa, SAF, saf
from ._presets.when.ae_sam import ae_sam
from ._presets.when.looksam import looksam
from ._presets.which.layerwise import layerwise_sam, LayerwiseSAM
from ._presets.which.sam_on import sam_on
from ._presets.which.sl_sam import sl_sam
from ._presets.which.sparse_sam import sparse_sam
from ._train.find_rho import find_rho, FoundRho, Trial
from ._train.state import StepInfo, TrainState
from ._train.step import TrainStep
from ._version import __version__


__all__ = [
    "Combine",
    "Cover",
    "DASState",
    "DynamicLossScale",
    "ElementMask",
    "FoundRho",
    "Gate",
    "Layers",
    "LayerwiseGrad",
    "LayerwiseSAM",
    "Learner",
    "LossScaleState",
    "MESA",
    "Measures",
    "Method",
    "MethodState",
    "PerturbedState",
    "Priced",
    "Probe",
    "SAF",
    "Sharpness",
    "Stale",
    "StepCost",
    "StepInfo",
    "TrainState",
    "TrainStep",
    "Trial",
    "__version__",
    "adaptive",
    "adazo_sam",
    "ae_sam",
    "always",
    "arwp",
    "as_optax",
    "asam",
    "async_sam",
    "bandit",
    "between",
    "blocks",
    "bottom_k",
    "csam",
    "damp",
    "das",
    "decoupled",
    "descend",
    "descend_on_selected",
    "differences",
    "esam",
    "eval_params",
    "every",
    "everything",
    "find_rho",
    "fisher_mask",
    "flat_lora",
    "flatness",
    "focal_sam",
    "for_price",
    "friendly_sam",
    "gam",
    "gcsam",
    "generalized_sam",
    "gsam",
    "imbsam",
    "last",
    "layerwise_sam",
    "leaves",
    "light_scale",
    "lightsam",
    "looksam",
    "lorenza",
    "m_arwp",
    "m_rwp",
    "m_sam",
    "match_norm",
    "mesa",
    "micro_batch",
    "mix",
    "modules",
    "momentum",
    "momentum_sam",
    "mup_perturbation",
    "named",
    "normalized",
    "nothing",
    "perturbed",
    "previous",
    "proportional",
    "random",
    "random_k",
    "random_sam",
    "raw",
    "refresh",
    "relative",
    "reuse",
    "rwp",
    "saf",
    "sam",
    "sam_on",
    "selection",
    "set_mask",
    "sharpest",
    "sharpness",
    "sl_sam",
    "sparse",
    "sparse_sam",
    "stable_sam",
    "stacked",
    "step_cost",
    "sub_batches",
    "subspace_differences",
    "surrogate_gap",
    "top_k",
    "train_params",
    "unusual",
    "value",
    "value_and_grad",
    "weighed",
    "weights",
    "whole_batch",
    "wsam",
]
