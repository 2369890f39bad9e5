"""A train step whose executables skip what the selection does not need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from .. import _checks
from .._devices.accumulate import as_cuts
from .._devices.spread import spread
from .._engine.cost import StepCost
from .._engine.cover import Cover
from .._engine.layers import Layers
from .._engine.loss_scale import DynamicLossScale
from .._loops.refresh import at_least_one
from .._method import Method
from . import executables as _executables, step_checks as _step_checks
from .compiled import Compiled
from .masks import Masks
from .one_step import OneStep
from .skipping import faults
from .state import StepInfo, TrainState
from .step_checks import WHO
from .study import study, warn_if_nothing_is_affordable


LossFn = Callable[..., tuple[jax.Array, tuple[Any, Any]]]


class TrainStep:
    """Trains by a method, each step on an executable that fits its selection.

    Between steps the host reads the mask, L bytes, and runs the cheapest executable that
    contains the selected layers. There are few: the plain step, covers (every layer from
    a depth on) spread over the price, and without a budget the two ends of the network;
    a selector whose layers are known beforehand gets exactly these. Both passes see the
    same PRNG key; the model state and the metrics are those of the clean pass, or of the
    descent where the ascent has a batch of its own.

    Args:
      loss_fn: `loss_fn(params, model_state, batch, key, *constants) -> (loss,
        (model_state, metrics))`. On a mesh it is the loss of the global batch, as on one
        device. Under pmap it sees its share of the batch and a key of its own; the
        mapped axis is named by `axis_name`.
      base_optimizer: Any Optax transformation; it gets the penalized gradient, and
        `value=` if it takes extra arguments.
      method: A `Method`: `lwsam.LayerwiseSAM(...)`, `lwsam.sam(...)`, or parts of one's
        choice.
      parallel: None for one device. A `jax.sharding.Mesh`, of Auto or Explicit axes:
        jit on its devices. Parameters, model state and constants stay sharded as they
        come to `init` (replicated, fully sharded, tensor parallel), and the optimizer's
        moments are as their parameters. "pmap": over the local devices, replicated.
      max_executables: How many executables there may be, the plain step included; sets
        that differ by less than 2 % in price are one.
      selection_lag: 0: a step perturbs the layers that the norms of the step before
        select (Algorithm 1). n: those of the step n before that, so that the host does
        not wait for the device.
      on_nonfinite: "report": a step that is not finite is taken, `info.finite` is False.
        "skip": parameters, model state and what optimizer and method remember stay, bit
        for bit, and `info.skipped` counts; if only the ascent fails, the step is plain.
      loss_scale: A `DynamicLossScale` or a number, for losses in float16; a step in
        which either pass overflows is skipped.
      accumulate: In how many cuts a batch is seen, one after the other; both passes have
        the gradient of the whole, at the memory of a cut. The model state goes from cut
        to cut; what the passes would share is computed in both.
      weight: `weight(cut)`, the weight of a cut's loss in that of the batch, such as its
        number of tokens; None: the same for all.
      donate: Whether a step donates the state that goes in, to save its memory. With
        False the state and its parts can be kept; with True copy what you keep.
      batch_axes: With a mesh: name or names of the axes over which a batch is cut; None:
        all of them. An array whose first axis is not that of the others is replicated,
        one that is sharded on the mesh already stays so.
      sync: "global": one perturbation for all devices. "device": each has its own, from
        its share of the batch, or its own noise under `random()`; nothing is reduced
        between the passes. It is `split=lwsam.sub_batches(devices)`: parameters are
        replicated, and the loss is that of a device's share, as under pmap.

    Attributes:
      layers: The layers, once `init` or the first step has seen the parameters.
      cost: `StepCost` of the loss on what it sees of the batch, once known.
      axis_name: Name of the mapped axis inside the loss under pmap, or None.
      executables: The covers for which a step was compiled, in order of first use.
      compile_seconds: Wall time spent in first calls.

    Raises:
      TypeError: For arguments of the wrong kind; for a call under `jit`.
      ValueError: For an unknown `parallel`, an optimizer with a layerwise_sam or a
        perturbed of its own, batches that do not divide by the devices, arrays that are
        sharded over another mesh; under pmap, and where an ascent or a descent cuts the
        batch, for an array whose first axis is not that of the others.

    Examples:
      >>> import jax, optax, jax.numpy as jnp, lwsam_jax as lwsam
      >>> def loss_fn(params, model_state, batch, key):
      ...     loss = jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
      ...     return loss, (model_state, {"rmse": jnp.sqrt(loss)})
      >>> method = lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8)
      >>> step = lwsam.TrainStep(loss_fn, optax.sgd(0.1), method)
      >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 2))}
      >>> state = step.init({"w": jnp.zeros((3, 2))}, {}, batch, key=jax.random.key(0))
      >>> state, info = step(state, batch)
      >>> int(state.step), bool(info.finite)
      (1, True)
    """

    def __init__(
        self,
        loss_fn: LossFn,
        base_optimizer: optax.GradientTransformation,
        method: Method,
        parallel: str | Mesh | None = None,
        *,
        max_executables: int = 12,
        selection_lag: int = 0,
        on_nonfinite: str = "report",
        loss_scale: DynamicLossScale | float | None = None,
        accumulate: int = 1,
        weight: Callable[[Any], Any] | None = None,
        donate: bool = True,
        batch_axes: str | tuple[str, ...] | None = None,
        sync: str = "global",
    ) -> None:
        """Checks the arguments; nothing is traced yet."""
        _step_checks.arguments(loss_fn, base_optimizer, method)
        _executables.check_most(WHO, max_executables)
        remedy = "Pass by how many steps the norms are late; 0 is Algorithm 1."
        _checks.count(WHO, "selection_lag", selection_lag, remedy)
        self._faults = faults(WHO, on_nonfinite, loss_scale)
        self._loss_fn = loss_fn
        self._optimizer = optax.with_extra_args_support(base_optimizer)
        is_apart = method.split is not None or sync == "device"
        self._devices = spread(WHO, parallel, batch_axes, donate, is_apart)
        self._method = _step_checks.synchronized(method, sync, self._devices)
        self._cuts = as_cuts(WHO, accumulate, weight, self._method)
        self._most, self._lag = max_executables, selection_lag
        self._compiled: Compiled | None = None
        self._masks = Masks()
        self._hyperparams: dict[str, Any] | None = None
        self._known: np.ndarray | None = None
        self.axis_name = self._devices.axis_name
        self.layers: Layers | None = None
        self.cost: StepCost | None = None

    @property
    def executables(self) -> tuple[Cover, ...]:
        """The covers for which a step was compiled, in order of first use."""
        return self._compiled.executables.compiled if self._compiled else ()

    @property
    def compile_seconds(self) -> float:
        """Wall time of first calls: tracing, compiling, dispatching."""
        return self._compiled.executables.compile_seconds if self._compiled else 0.0

    def init(
        self,
        params: Any,
        model_state: Any,
        example_batch: Any,
        *,
        key: jax.Array,
        constants: tuple[Any, ...] = (),
    ) -> TrainState:
        """Returns the state before the first step.

        Args:
          params: Parameter tree of float arrays; copied, since steps donate their state.
          model_state: What the loss carries, {} if nothing; copied.
          example_batch: A batch, or `jax.ShapeDtypeStruct`s of its global shapes.
          key: PRNG key of the run.
          constants: Trees that the loss takes beside the batch, such as class weights.

        Raises:
          TypeError: If the loss does not return (loss, (model_state, metrics)), or the
            model state with another structure, shapes or dtypes than it got.
          ValueError: As `Layers.of`; if the batch does not divide by the devices.
        """
        devices = self._devices
        given = {"params": params, "model_state": model_state, "key": key}
        with devices.together():
            params, model_state = devices.place(params), devices.place(model_state)
            constants = devices.place(constants)
            one = self._study(params, model_state, example_batch, key, constants)
        devices.refuse_others(**given)
        # The caller keeps its arrays, and no buffer of two leaves is donated twice.
        state = devices.first(one.init, params, model_state, key)
        _step_checks.optimizer_state(state.opt_state)
        return state

    def __call__(
        self, state: TrainState, batch: Any, *constants: Any
    ) -> tuple[TrainState, StepInfo]:
        """Runs one step; the state that goes in is donated, use the one that comes out.

        Args:
          state: From `init`, from the step before, or restored from a checkpoint; its
            `hyperparams` as the loop likes them. On other devices it is placed where
            that of `init` was.
          batch: Global batch; every array has the batch as its first axis, scalars are
            replicated.
          *constants: What the loss takes beside the batch, the same trees in each step:
            neither split nor donated nor averaged. Other values compile nothing anew,
            other shapes do.

        Returns:
          The next state, and a `StepInfo`.

        Raises:
          TypeError: Under tracing.
          ValueError: If the batch does not divide by the devices, or the state was
            donated to a step before.
        """
        compiled, *args = self._prepare(state, batch, constants)
        mask = self._masks.of(state, self._known, self._method.is_plain)
        state, info, decided = compiled.executables.run(mask, *args)
        self._masks.took(decided, state)
        self._hyperparams = dict(state.hyperparams)
        return state, info

    def scan(
        self,
        state: TrainState,
        batches: Any,
        covers: int | None = None,
        constants: tuple[Any, ...] = (),
    ) -> tuple[TrainState, StepInfo]:
        """Runs many steps in one executable, which chooses among a few covers.

        For devices that the host loop cannot keep busy. Selections are those of the loop
        of single steps; the FLOPs are those of the smallest of the covers that contains
        a selection. On CPU a convolution inside a scan runs on one thread: use the loop.

        Args:
          state: As for a step; donated.
          batches: A batch whose arrays have one more axis in front, of T steps.
          covers: How many executables' bodies are compiled beside the plain one, spread
            over the price; None is 4. Where a `mean_overhead` has to be met it is all
            of them, for that charges each selection what the loop would run.
          constants: As for a step, the same in all of them.

        Returns:
          The state after T steps, and a `StepInfo` whose arrays have a first axis T.

        Raises:
          TypeError: Under tracing.
          ValueError: If the batches do not divide by the devices.
        """
        if covers is not None:
            remedy = "Pass how many covers to compile beside the plain step."
            _checks.count(f"{WHO}.scan", "covers", covers, remedy)
        compiled, *args = self._prepare(state, batches, constants, lead=1)
        state, infos = compiled.scan(covers)(*args)
        return state, infos

    def lower(
        self,
        state: TrainState,
        batch: Any,
        selection: Any = None,
        constants: tuple[Any, ...] = (),
    ) -> Any:
        """Returns the `jax.stages.Lowered` of a step, for its FLOPs or its HLO.

        Args:
          state: A state; not run, not donated.
          batch: Global batch.
          selection: A tuple of names, a `Cover`, or None for the state's own cover.
          constants: As for a step.
        """
        compiled, *args = self._prepare(state, batch, constants)
        return compiled.lower(selection, *args)

    def refresh(
        self,
        state: TrainState,
        batches: Iterable[Any],
        constants: tuple[Any, ...] = (),
    ) -> TrainState:
        """Returns the state with its model state re-estimated, forward only.

        The running averages of a BatchNorm are those of the weights at which gradients
        were taken. This continues them at the parameters of the state, which are the
        unperturbed ones, batch by batch. See `lwsam.refresh`.

        Args:
          state: A state; not donated.
          batches: Global batches, as for a step.
          constants: As for a step.

        Returns:
          The state, with another `model_state`.

        Raises:
          ValueError: If there is no batch.
        """
        for i, batch in enumerate(at_least_one(f"{WHO}.refresh", batches)):
            compiled, state, *args = self._prepare(state, batch, constants)
            (model_state,) = compiled.refresh(state, (args[0], np.int32(i)), args[1])
            state = state._replace(model_state=model_state)
        return state

    def _take_hyperparams(self, state: TrainState) -> TrainState:
        """Copies hyperparameters that a loop has set; a step donates what it gets."""
        known, now = self._hyperparams, state.hyperparams
        if known and len(known) == len(now) and all(now[k] is known[k] for k in now):
            return state
        return state._replace(hyperparams=_step_checks.hyperparams(state, self._method))

    def _prepare(
        self, state: TrainState, batch: Any, constants: Any, lead: int = 0
    ) -> tuple[Compiled, TrainState, Any, Any]:
        """Returns what to run, and the arguments where it expects them."""
        devices = self._devices
        _step_checks.of_a_call(state, (batch, constants))
        one = jax.tree.map(_step_checks.one_of_many, batch) if lead else batch
        if self._compiled is None:
            state = devices.place_state(state)
            constants = devices.place(constants)
            self._study(state.params, state.model_state, one, state.key, constants)
        assert self._compiled is not None
        with devices.together():
            return (
                self._compiled,
                devices.place_state(self._take_hyperparams(state)),
                devices.place_batch(batch, lead),
                devices.place(constants),
            )

    def _study(self, *args: Any) -> OneStep:
        """Finds what steps run on, from params, model state, batch, key, constants."""
        devices, method = self._devices, self._method
        with devices.context():
            trace = (self._loss_fn, method, devices, self._most, self._cuts.count)
            found = study(*trace, *args)
        # All or nothing: what failed above is studied again by the next call.
        self.layers, self.cost = found.layers, found.cost
        self._known = found.known
        options = (self._lag, self._faults, self._cuts)
        one = OneStep(self._loss_fn, self._optimizer, method, devices, found, *options)
        charges_menu = method.mean_overhead is not None
        self._compiled = Compiled(one, found.menu, devices, charges_menu)
        warn_if_nothing_is_affordable(method, found.menu)
        return one
