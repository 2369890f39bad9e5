"""A train step whose executables skip what the selection does not need."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh

from .. import _checks
from .._engine.cost import StepCost
from .._engine.cover import Cover
from .._engine.layers import Layers
from .._engine.loss_scale import DynamicLossScale
from .._loops import state as _state
from .._loops.refresh import at_least_one
from .._method import Method
from . import executables as _executables, step_checks as _step_checks
from .devices import Devices
from .executables import Executables, Menu
from .one_step import OneStep
from .skipping import faults
from .state import StepInfo, TrainState
from .step_checks import WHO
from .study import study, warn_if_nothing_is_affordable


LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, Any]]]


class TrainStep:
    """Trains by a method, each step on an executable that fits its selection.

    Between steps the host reads the mask, L bytes, and runs the cheapest executable that
    contains the selected layers. There are few: the plain step, covers (every layer from
    a depth on) spread over the price, and without a budget the two ends of the network;
    a selector whose layers are known beforehand gets exactly these. Both passes see the
    same PRNG key; the model state and the metrics are those of the clean pass, or of the
    descent where the ascent has a batch of its own.

    Args:
      loss_fn: `loss_fn(params, model_state, batch, key) -> (loss, (model_state,
        metrics))`. Over devices it sees its shard of the batch and a key of its own; the
        mapped axis is named by `axis_name`.
      base_optimizer: Any Optax transformation; it gets the penalized gradient, and
        `value=` if it takes extra arguments.
      method: A `Method`: `lwsam.LayerwiseSAM(...)`, `lwsam.sam(...)`, or parts of one's
        choice.
      parallel: None for one device; "pmap" over the local devices; a
        `jax.sharding.Mesh` for data parallelism over all its axes.
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
      donate: Whether a step donates the state that goes in, to save its memory. With
        False the state and its parts can be kept; with True copy what you keep.

    Attributes:
      layers: The layers, once `init` or the first step has seen the parameters.
      cost: `StepCost` of the loss on one device's share of the batch, once known.
      axis_name: Name (or names) of the mapped axis inside the loss, or None.
      executables: The covers for which a step was compiled, in order of first use.
      compile_seconds: Wall time spent in first calls.

    Raises:
      TypeError: For arguments of the wrong kind; for a call under `jit`.
      ValueError: For an unknown `parallel`, an optimizer with a layerwise_sam or a
        perturbed of its own, batches that do not divide by the devices.

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
        donate: bool = True,
    ) -> None:
        """Checks the arguments; nothing is traced yet."""
        _step_checks.arguments(loss_fn, base_optimizer, method)
        _executables.check_most(WHO, max_executables)
        remedy = "Pass by how many steps the norms are late; 0 is Algorithm 1."
        _checks.count(WHO, "selection_lag", selection_lag, remedy)
        self._faults = faults(WHO, on_nonfinite, loss_scale)
        self._loss_fn = loss_fn
        self._optimizer = optax.with_extra_args_support(base_optimizer)
        self._method = method
        self._devices = Devices(WHO, parallel, donate)
        self._most, self._lag = max_executables, selection_lag
        self._executables: Executables | None = None
        self._one: Any = None  # the OneStep, once the layers are known
        self._menu: Menu | None = None
        self._scans: dict[int, Callable[..., Any]] = {}
        self._refresh: Any = None
        # The masks of the state returned last, as copies that earlier steps made: they
        # can be read without waiting for the last one.
        self._due: collections.deque[Any] = collections.deque()
        self._latest: Any = None
        self._hyperparams: dict[str, Any] | None = None
        self._known: np.ndarray | None = None
        self.axis_name = self._devices.axis_name
        self.layers: Layers | None = None
        self.cost: StepCost | None = None

    @property
    def executables(self) -> tuple[Cover, ...]:
        """The covers for which a step was compiled, in order of first use."""
        return self._executables.compiled if self._executables else ()

    @property
    def compile_seconds(self) -> float:
        """Wall time of first calls: tracing, compiling, dispatching."""
        return self._executables.compile_seconds if self._executables else 0.0

    def init(
        self, params: Any, model_state: Any, example_batch: Any, *, key: jax.Array
    ) -> TrainState:
        """Returns the state before the first step.

        Args:
          params: Parameter tree of float arrays; copied, since steps donate their state.
          model_state: What the loss carries, {} if nothing; copied.
          example_batch: A batch, or `jax.ShapeDtypeStruct`s of its global shapes.
          key: PRNG key of the run.

        Raises:
          TypeError: If the loss does not return (loss, (model_state, metrics)), or the
            model state with another structure, shapes or dtypes than it got.
          ValueError: As `Layers.of`; if the batch does not divide by the devices.
        """
        self._study(params, model_state, example_batch, key)
        state = self._one.init(params, model_state, key)
        _step_checks.optimizer_state(state.opt_state)
        # The caller keeps its arrays, and no buffer of two leaves is donated twice.
        return self._devices.place_state(jax.tree.map(_copy, state))

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, StepInfo]:
        """Runs one step; the state that goes in is donated, use the one that comes out.

        Args:
          state: From `init`, from the step before, or restored from a checkpoint; its
            `hyperparams` as the loop likes them.
          batch: Global batch; every array has the batch as its first axis, scalars are
            replicated.

        Returns:
          The next state, and a `StepInfo`.

        Raises:
          TypeError: Under tracing.
          ValueError: If the batch does not divide by the devices, or the state was
            donated to a step before.
        """
        self._prepare(state, batch)
        state = self._take_hyperparams(state)
        assert self._executables is not None
        batch = self._devices.place(batch)
        due, known = self._due, self._known
        if state.method_state is not self._latest:
            # Of another run, or from a checkpoint. Read now: the step donates them.
            queue = (state.method_state.mask, *state.method_state.pending)
            due = collections.deque(map(_state.read_mask, queue))
            known = known if self._method.is_plain else None  # it may be another mask
        # A copy on each device, whatever hosts they have; where it is known, no waiting.
        mask = np.asarray(due[0]) if known is None else known
        state, info, decided = self._executables.run(mask, state, batch)
        # Only now: a step that raises, for its batch say, leaves the queue as it was.
        due.popleft()
        due.append(decided)
        self._due, self._latest = due, state.method_state
        self._hyperparams = dict(state.hyperparams)
        return state, info

    def scan(
        self, state: TrainState, batches: Any, covers: int | None = None
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

        Returns:
          The state after T steps, and a `StepInfo` whose arrays have a first axis T.

        Raises:
          TypeError: Under tracing.
          ValueError: If the batches do not divide by the devices.
        """
        if covers is not None:
            remedy = "Pass how many covers to compile beside the plain step."
            _checks.count(f"{WHO}.scan", "covers", covers, remedy)
        first = jax.tree.map(_step_checks.one_of_many, batches)
        self._prepare(state, first)
        state = self._take_hyperparams(state)
        assert self._menu is not None
        if self._method.mean_overhead is not None:
            covers = len(self._menu.covers)
        elif covers is None:
            covers = 4
        if covers not in self._scans:
            many = self._one.many(self._menu.few(covers))
            self._scans[covers] = self._devices.compile(many, lead=1)
        return self._scans[covers](state, self._devices.place(batches, lead=1))

    def lower(self, state: TrainState, batch: Any, selection: Any = None) -> Any:
        """Returns the `jax.stages.Lowered` of a step, for its FLOPs or its HLO.

        Args:
          state: A state; not run, not donated.
          batch: Global batch.
          selection: A tuple of names, a `Cover`, or None for the state's own cover.
        """
        self._prepare(state, batch)
        if selection is None:
            assert self._menu is not None
            selected: Any = _state.selection(state)
            selection = self._menu.fitting(self._menu.bits(selected))
        return self._build(selection).lower(state, self._devices.place(batch))

    def refresh(self, state: TrainState, batches: Iterable[Any]) -> TrainState:
        """Returns the state with its model state re-estimated, forward only.

        The running averages of a BatchNorm are those of the weights at which gradients
        were taken. This continues them at the parameters of the state, which are the
        unperturbed ones, batch by batch. See `lwsam.refresh`.

        Args:
          state: A state; not donated.
          batches: Global batches, as for a step.

        Returns:
          The state, with another `model_state`.

        Raises:
          ValueError: If there is no batch.
        """
        for i, batch in enumerate(at_least_one(f"{WHO}.refresh", batches)):
            self._prepare(state, batch)
            if self._refresh is None:
                self._refresh = self._devices.compile(self._one.refresh, donates=False)
            number = jnp.int32(i)
            placed = self._devices.place((batch, number))
            state = state._replace(model_state=self._refresh(state, placed))
        return state

    def _take_hyperparams(self, state: TrainState) -> TrainState:
        """Gives hyperparameters that a loop has set the dtype that a step compiles for.

        Copies, for steps donate their state and the loop may set one array twice.
        """
        known, now = self._hyperparams, state.hyperparams
        if known and len(known) == len(now) and all(now[k] is known[k] for k in now):
            return state
        return state._replace(hyperparams=_step_checks.hyperparams(state, self._method))

    def _prepare(self, state: TrainState, batch: Any) -> None:
        leaves = [state.step, *jax.tree.leaves(batch)]
        if any(isinstance(x, Tracer) for x in leaves):
            remedy = "It jits itself, and chooses its executable by the state's mask."
            raise _checks.type_error(
                WHO, "state", "concrete", "a tracer (under jit)", remedy
            )
        if getattr(state.step, "is_deleted", bool)():
            remedy = (
                "Use the state that the step returned, or pass TrainStep(donate=False)."
            )
            got = "one that was donated to a step before"
            raise _checks.value_error(WHO, "state", "a live one", got, remedy)
        if self._executables is None:
            self._study(state.params, state.model_state, batch, state.key)

    def _study(self, params: Any, model_state: Any, batch: Any, key: jax.Array) -> None:
        """Finds the layers, what they cost, and what steps may run on."""
        found = study(
            self._loss_fn,
            self._method,
            self._devices,
            self._most,
            params,
            model_state,
            batch,
            key,
        )
        # All or nothing: what failed above is studied again by the next call.
        self.layers, self.cost = found.layers, found.cost
        self._menu, self._known = found.menu, found.known
        self._one = OneStep(
            self._loss_fn,
            self._optimizer,
            self._method,
            self._devices,
            found,
            self._lag,
            self._faults,
        )
        self._executables = Executables(found.menu, self._build)
        self._scans.clear()
        self._refresh = None
        warn_if_nothing_is_affordable(self._method, found.menu)

    def _build(self, selection: tuple[str, ...] | Cover) -> Any:
        return self._devices.compile(
            lambda state, batch: self._one.run(selection, state, batch)
        )


def _copy(x: Any) -> jax.Array:
    """Returns an array with a buffer and a dtype of its own: a weak one traces again."""
    if not isinstance(x, jax.Array):
        return jnp.array(x)
    return jnp.array(x, x.dtype) if getattr(x, "weak_type", False) else x.copy()
