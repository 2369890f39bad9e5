"""What a run carries from step to step, and what a step reports."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from .._loops.state import MethodState


class TrainState(NamedTuple):
    """All that a run needs to go on; no leaf has a device axis.

    Attributes:
      params: Parameter tree, always the unperturbed ones.
      model_state: What the loss carries from step to step, such as BatchNorm statistics.
      opt_state: State of the base optimizer.
      method_state: `MethodState`: norms, the mask of the next step, what parts remember.
      hyperparams: `rho` and `alpha` where they are no static 0 and 1, f32[] each (f64
        for float64 parameters): a loop sets them between steps. Of a schedule, what the
        last step had.
      key: PRNG key of the run; constant, each step folds its number in.
      step: int32[], steps done, those that were skipped among them.
      skipped: int32[], how many were: 0 unless `on_nonfinite="skip"`.
      loss_scale: `LossScaleState`, that of the next step; () without one.
    """

    params: Any
    model_state: Any
    opt_state: Any
    method_state: MethodState
    hyperparams: Any
    key: jax.Array
    step: jax.Array
    skipped: jax.Array
    loss_scale: Any = ()


class StepInfo(NamedTuple):
    """What a step reports; arrays, so that reading them is when the host waits.

    Attributes:
      value: Clean loss on the whole batch, f32[]; where no pass sees both,
        `perturbed_value`.
      perturbed_value: Loss at the perturbed point; `value` in a plain step.
      ascent_value: Clean loss on what the ascent sees; None where it takes no pass.
      metrics: The loss's metrics, of the clean pass on the whole batch, or where there
        is none of the descent. Under pmap floats are averaged, integers summed.
      norms: f32[L], gradient norms at the perturbed point.
      mask: bool[L], layers that this step perturbed.
      rho: f32[], the radius that was applied, 0 in a plain step.
      perturbation_norm: f32[], norm of the perturbation over all parameters.
      gap: f32[], `perturbed_value - value`, the sharpness that the step has seen; None
        where these are not of one batch.
      cosine: f32[], of the angle between ascent and descent gradient on the layers that
        were perturbed, 1 in a plain step; None where the ascent takes no pass.
      overhead: f32[], FLOPs of the executable that ran over a plain gradient, minus 1,
        by the cost model of `lwsam.step_cost`.
      mean_overhead: f32[], its mean over all steps of the state.
      finite: bool[], whether both values and the gradient are finite.
      skipped: int32[], how many steps of the run were skipped, this one included.
      loss_scale: f32[], that of this step; None without one.
    """

    value: jax.Array
    perturbed_value: jax.Array
    ascent_value: Any
    metrics: Any
    norms: jax.Array
    mask: jax.Array
    rho: jax.Array
    perturbation_norm: jax.Array
    gap: Any
    cosine: Any
    overhead: jax.Array
    mean_overhead: jax.Array
    finite: jax.Array
    skipped: jax.Array
    loss_scale: Any
