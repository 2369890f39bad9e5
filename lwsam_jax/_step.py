"""A train step whose executables skip what the selection does not need."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh

from . import _checks, _cost, _selection, _step_checks
from ._devices import Devices
from ._executables import Executables
from ._layers import Layers
from ._method import LayerwiseSAM
from ._one_step import OneStep, StepInfo, TrainState
from ._selection import Cover
from ._step_checks import WHO


LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, Any]]]


class TrainStep:
    """Trains by layer-wise SAM, each step on an executable that fits its selection.

    Between steps the host reads the mask, L bytes, and runs the cheapest executable that
    contains the selected layers: covers (every layer from a depth on, at most L + 1),
    and up to `exact_sets` sets that the selections seen so far call for. Both passes see
    the same PRNG key; the model state and the metrics are those of the clean pass.

    Args:
      loss_fn: `loss_fn(params, model_state, batch, key) -> (loss, (model_state,
        metrics))`. Over devices it sees its shard of the batch and a key of its own; the
        mapped axis is named by `axis_name`.
      base_optimizer: Any Optax transformation; it gets the penalized gradient, and
        `value=` if it takes extra arguments.
      method: A `LayerwiseSAM`.
      parallel: None for one device; "pmap" over the local devices; a
        `jax.sharding.Mesh` for data parallelism over all its axes.
      exact_sets: How many executables may stand beside the covers; 0: covers alone. They
        are added after every 4th step up to 192, then after steps 256, 384, 512, 768,
        ...; one that has been idle for half of the run makes room, the least recently
        used first.
      selection_lag: 0: a step perturbs the layers that the norms of the step before
        select (Algorithm 1). n: those of the step n before that, so that the host does
        not wait for the device.

    Attributes:
      layers: The layers, once `init` or the first step has seen the parameters.
      cost: `StepCost` of the loss on one device's share of the batch, once known.
      axis_name: Name (or names) of the mapped axis inside the loss, or None.
      executables: The covers for which a step was compiled, in order of first use.
      compile_seconds: Wall time spent in first calls.
      evictions: Executables dropped for others.

    Raises:
      TypeError: For arguments of the wrong kind; for a call under `jit`.
      ValueError: For an unknown `parallel`, an optimizer with MultiSteps or with a
        layerwise_sam of its own, batches that do not divide by the devices.

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
        method: LayerwiseSAM,
        parallel: str | Mesh | None = None,
        *,
        exact_sets: int = 24,
        selection_lag: int = 0,
    ) -> None:
        """Checks the arguments; nothing is traced yet."""
        _step_checks.arguments(loss_fn, base_optimizer, method)
        remedy = "Pass how many executables may be added; 0: covers alone."
        _checks.count(WHO, "exact_sets", exact_sets, remedy)
        remedy = "Pass by how many steps the norms are late; 0 is Algorithm 1."
        _checks.count(WHO, "selection_lag", selection_lag, remedy)
        self._loss_fn = loss_fn
        self._optimizer = optax.with_extra_args_support(base_optimizer)
        self._method = method
        self._devices = Devices(WHO, parallel)
        self._exact_sets, self._lag = exact_sets, selection_lag
        self._executables: Executables | None = None
        self._one: Any = None  # the OneStep, once the layers are known
        self._scans: dict[int, Callable[..., Any]] = {}
        self._history: dict[str, Any] | None = None
        # The masks of the state returned last, as copies that earlier steps made: they
        # can be read without waiting for the last one.
        self._due: collections.deque[Any] = collections.deque()
        self._latest: Any = None
        self.axis_name = self._devices.axis_name
        self.layers: Layers | None = None
        self.cost: _cost.StepCost | None = None

    @property
    def executables(self) -> tuple[Cover, ...]:
        """The covers for which a step was compiled, in order of first use."""
        return self._executables.compiled if self._executables else ()

    @property
    def compile_seconds(self) -> float:
        """Wall time of first calls: tracing, compiling, dispatching."""
        return self._executables.compile_seconds if self._executables else 0.0

    @property
    def evictions(self) -> int:
        """How many executables were dropped for others."""
        return self._executables.evictions if self._executables else 0

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
        _selection.refuse_multi_steps(WHO, state.opt_state)
        if _selection.find_states(state.opt_state):
            remedy = "Pass the bare base optimizer; TrainStep does the rest."
            got = "a layerwise_sam in it"
            raise ValueError(
                _checks.message(WHO, "base_optimizer", "without one", got, remedy)
            )
        # Steps donate their state: the caller keeps its arrays, and a buffer that two
        # leaves share could not be donated twice.
        return self._devices.place_state(jax.tree.map(_copy, state))

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, StepInfo]:
        """Runs one step; the state that goes in is donated, use the one that comes out.

        Args:
          state: From `init`, from the step before, or restored from a checkpoint.
          batch: Global batch; every array has the batch as its first axis, scalars are
            replicated.

        Returns:
          The next state, and a `StepInfo`.

        Raises:
          TypeError: Under tracing.
          ValueError: If the batch does not divide by the devices.
        """
        self._prepare(state, batch)
        assert self._executables is not None
        batch = self._devices.place(batch)
        due = self._due
        if state.method_state is not self._latest:
            # Of another run, or from a checkpoint. Read now: the step donates them.
            queue = (state.method_state.mask, *state.method_state.pending)
            due = collections.deque(map(_selection.read_mask, queue))
        if self._method.is_plain:  # nothing to wait for
            mask = np.zeros(due[0].shape, bool)
        else:
            mask = np.asarray(due[0])  # a copy on each device, whatever hosts they have
        state, info, decided = self._executables.run(mask, state, batch)
        # Only now: a step that raises, for its batch say, leaves the queue as it was.
        due.popleft()
        due.append(decided)
        self._due, self._latest = due, state.method_state
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
          covers: How many covers are compiled beside the plain step, spread evenly over
            the price of what the budget admits. None is 4, or all of them where a
            `mean_overhead` has to be met, for it charges each selection its own cover.

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
        if covers is None:
            assert self.layers is not None
            few = self._method.mean_overhead is None
            covers = 4 if few else len(self.layers)
        if covers not in self._scans:
            self._scans[covers] = self._devices.compile(self._one.many(covers), lead=1)
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
            selection = _selection.selection(state, cover="depth")
        return self._build(selection).lower(state, self._devices.place(batch))

    def history(self) -> dict[str, Any]:
        """Returns what the choice of executables depends on, fit for JSON.

        Where executables agree bit for bit, as on CPU, no parameter, norm or mask depends
        on it, only what `info.overhead` and its mean report. Elsewhere a run that is
        resumed with `restore_history` repeats the choices of an unbroken one.
        """
        if self._executables is None:
            return self._history or {}
        return self._executables.history()

    def restore_history(self, history: dict[str, Any]) -> None:
        """Takes over what `history()` returned, before the next step.

        Args:
          history: From the `history()` of a step with the same loss and method.

        Raises:
          ValueError: If it is of other layers; raised by `init` if that comes later.
        """
        self._history = history or None
        if self._executables is not None:
            self._take_over_history(self._executables)

    def _take_over_history(self, executables: Executables) -> None:
        if not self._history:
            return
        try:
            executables.restore(self._history)
        except (KeyError, TypeError, ValueError) as error:
            remedy = "Pass what history() of a TrainStep with the same layers returned."
            expected = "a history of these layers"
            got = f"{type(error).__name__}: {error}"
            raise ValueError(
                _checks.message(WHO, "history", expected, got, remedy)
            ) from error
        finally:
            self._history = None  # a later `init` begins another run

    def _prepare(self, state: TrainState, batch: Any) -> None:
        leaves = [state.step, *jax.tree.leaves(batch)]
        if any(isinstance(x, Tracer) for x in leaves):
            remedy = "It jits itself, and chooses its executable by the state's mask."
            raise TypeError(
                _checks.message(
                    WHO, "state", "concrete", "a tracer (under jit)", remedy
                )
            )
        if self._executables is None:
            self._study(state.params, state.model_state, batch, state.key)

    def _study(self, params: Any, model_state: Any, batch: Any, key: jax.Array) -> None:
        """Finds the layers and what they cost, from the shapes of one device's share."""
        args = (model_state, jax.tree.map(self._devices.share, batch), key)
        axes = self._devices.axis_sizes()
        _step_checks.loss(self._loss_fn, (params, *args), axes)
        method = self._method
        layers = method.layers_of(params, self._loss_fn, *args, axis_env=axes)
        cost = _cost.step_cost(
            self._loss_fn, params, *args, layers=layers, axis_env=axes
        )
        one = OneStep(
            self._loss_fn,
            self._optimizer,
            method,
            self._devices,
            layers,
            cost,
            self._lag,
        )
        executables = Executables(
            layers,
            ratio=one.ratio,
            build=self._build,
            exact_sets=self._exact_sets,
            bound=method.max_overhead,
            # The mean is kept by charging covers: nothing dearer may run.
            at_most_own=method.mean_overhead is not None,
        )
        # All or nothing: what failed above is studied again by the next call.
        self.layers, self.cost, self._one = layers, cost, one
        self._executables = executables
        self._scans.clear()
        self._take_over_history(executables)
        if one.purse.affords_nothing:
            prices = cost.prices(method.normalize)
            cheapest = min(range(len(prices)), key=prices.__getitem__)
            warnings.warn(
                f"{WHO}: `max_overhead`={method.max_overhead} is below the price of any "
                f"layer, so every step is plain. The cheapest, "
                f"{layers.names[cheapest]}, costs {prices[cheapest]:.4f}.",
                stacklevel=4,
            )

    def _build(self, selection: tuple[str, ...] | Cover) -> Any:
        return self._devices.compile(
            lambda state, batch: self._one.run(selection, state, batch)
        )


def _copy(x: Any) -> jax.Array:
    """Returns an array with a buffer of its own."""
    return x.copy() if isinstance(x, jax.Array) else jnp.array(x)
