"""A train step whose executables skip what the selection does not need."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import _checks, _cost, _gradient, _selection, _tree
from ._layers import Layers
from ._method import LayerwiseSAM
from ._selection import Cover, LayerwiseSAMState


_WHO = "TrainStep"
_PMAP_AXIS = "data"

LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, Any]]]


class TrainState(NamedTuple):
    """All that a run needs to go on; no leaf has a device axis.

    Attributes:
      params: Parameter tree.
      model_state: What the loss carries from step to step, such as BatchNorm statistics.
      opt_state: State of the base optimizer.
      method_state: `LayerwiseSAMState`: norms, and the mask of the next step.
      key: PRNG key of the run; constant, each step folds its number in.
      step: int32[], steps done.
    """

    params: Any
    model_state: Any
    opt_state: Any
    method_state: LayerwiseSAMState
    key: jax.Array
    step: jax.Array


class StepInfo(NamedTuple):
    """What a step reports; arrays, so that reading them is when the host waits.

    Attributes:
      value: Clean loss, f32[].
      perturbed_value: Loss at the perturbed point; `value` in a plain step.
      metrics: The loss's metrics, of the clean pass. Over devices floats are averaged,
        integers summed.
      norms: f32[L], gradient norms at the perturbed point.
      mask: bool[L], layers that this step perturbed.
      overhead: f32[], FLOPs of the executable that ran over a plain gradient, minus 1,
        by the cost model of `lwsam.step_cost`.
      finite: bool[], whether both values and the gradient are finite.
    """

    value: jax.Array
    perturbed_value: jax.Array
    metrics: Any
    norms: jax.Array
    mask: jax.Array
    overhead: jax.Array
    finite: jax.Array


class TrainStep:
    """Trains by layer-wise SAM: one compiled step for each cover, at most L + 1.

    Between steps the host reads the mask, L bytes, and runs the executable of the
    cover from the input-most selected layer on. Both passes see the same PRNG key; the
    model state and the metrics are those of the clean pass.

    Args:
      loss_fn: `loss_fn(params, model_state, batch, key) -> (loss, (model_state,
        metrics))`. Over devices it sees its shard of the batch and a key of its own; the
        mapped axis is named by `axis_name`.
      base_optimizer: Any Optax transformation; it gets the penalized gradient, and
        `value=` if it takes extra arguments.
      method: A `LayerwiseSAM`.
      parallel: None for one device; "pmap" over the local devices; a
        `jax.sharding.Mesh` for data parallelism over all its axes.

    Attributes:
      layers: The layers, once `init` or the first step has seen the parameters.
      cost: `StepCost` of the loss on one device's share of the batch, once known.
      axis_name: Name (or names) of the mapped axis inside the loss, or None.
      executables: The covers for which a step exists.

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
    ) -> None:
        """Checks the arguments; nothing is traced yet."""
        remedy = "Pass loss_fn(params, model_state, batch, key)."
        _checks.is_callable(_WHO, "loss_fn", loss_fn, remedy)
        if not (hasattr(base_optimizer, "init") and hasattr(base_optimizer, "update")):
            remedy = "Pass an Optax transformation such as optax.sgd(0.1)."
            raise TypeError(
                _checks.message(
                    _WHO, "base_optimizer", "a transformation", base_optimizer, remedy
                )
            )
        if not isinstance(method, LayerwiseSAM):
            remedy = "Pass lwsam.LayerwiseSAM(k=4, rho=..., alpha=...); k=0 is plain."
            raise TypeError(
                _checks.message(_WHO, "method", "a LayerwiseSAM", method, remedy)
            )
        if method.axis_name is not None:
            remedy = "Leave it out: TrainStep names the axis after `parallel`."
            raise ValueError(
                _checks.message(
                    _WHO, "method.axis_name", "None", method.axis_name, remedy
                )
            )
        if not (parallel is None or parallel == "pmap" or isinstance(parallel, Mesh)):
            remedy = "Pass None, 'pmap', or a jax.sharding.Mesh."
            raise ValueError(
                _checks.message(_WHO, "parallel", "one of these", parallel, remedy)
            )
        self._loss_fn = loss_fn
        self._optimizer = optax.with_extra_args_support(base_optimizer)
        self._method = method
        self._parallel = parallel
        self._steps: dict[tuple[str, ...] | Cover, Callable[..., Any]] = {}
        self._eligible: tuple[bool, ...] | None = None
        self.layers: Layers | None = None
        self.cost: _cost.StepCost | None = None
        if isinstance(parallel, Mesh):
            self.axis_name, self._devices = parallel.axis_names, parallel.devices.size
        elif parallel == "pmap":
            self.axis_name, self._devices = _PMAP_AXIS, jax.local_device_count()
        else:
            self.axis_name, self._devices = None, 1

    @property
    def executables(self) -> tuple[Any, ...]:
        """The covers for which a step has been built, in order of first use."""
        return tuple(self._steps)

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
        params, model_state, key = jax.tree.map(_copy, (params, model_state, key))
        self._study(params, model_state, example_batch, key)
        assert self.layers is not None
        opt_state = self._optimizer.init(params)
        _selection.refuse_multi_steps(_WHO, opt_state)
        if _selection.find_states(opt_state):
            remedy = "Pass the bare base optimizer; TrainStep does the rest."
            got = "a layerwise_sam in it"
            raise ValueError(
                _checks.message(_WHO, "base_optimizer", "without one", got, remedy)
            )
        state = TrainState(
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            method_state=self._method.init(params, self.layers, self._eligible),
            key=key,
            step=jnp.zeros((), jnp.int32),
        )
        # A buffer that two leaves share cannot be donated twice.
        state = jax.tree.map(_copy, state)
        if isinstance(self._parallel, Mesh):
            state = jax.device_put(state, NamedSharding(self._parallel, PartitionSpec()))
        return state

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, StepInfo]:
        """Runs one step; the state that goes in is donated, use the one that comes out.

        Args:
          state: From `init`, from the step before, or restored from a checkpoint.
          batch: Global batch; every array has the batch as its first axis, scalars are
            replicated.

        Returns:
          The next state, and a `StepInfo`.
        """
        self._refuse_tracers(state, batch)
        if self.layers is None:
            self._study(state.params, state.model_state, batch, state.key)
        step = self._step_for(_selection.selection(state, cover="depth"))
        return step(state, self._place(batch))

    def lower(self, state: TrainState, batch: Any, selection: Any = None) -> Any:
        """Returns the `jax.stages.Lowered` of a step, for its FLOPs or its HLO.

        Args:
          state: A state; not run, not donated.
          batch: Global batch.
          selection: A tuple of names, a `Cover`, or None for the state's own cover.
        """
        if self.layers is None:
            self._study(state.params, state.model_state, batch, state.key)
        if selection is None:
            selection = _selection.selection(state, cover="depth")
        return self._build(selection).lower(state, self._place(batch))

    def _study(self, params: Any, model_state: Any, batch: Any, key: jax.Array) -> None:
        """Finds the layers and what they cost, from the shapes of one device's share."""
        batch = jax.tree.map(self._share, batch)
        args = (model_state, batch, key)
        self._check_loss(params, *args)
        axes = self._axis_sizes()
        self.layers = self._method.layers_of(params, self._loss_fn, *args, axis_env=axes)
        self.cost = _cost.step_cost(
            self._loss_fn, params, *args, layers=self.layers, axis_env=axes
        )
        bound = self._method.max_overhead
        if bound is not None:
            self._eligible = self.cost.within(bound)
            if not any(self._eligible):
                cheapest = max(range(len(self.layers)), key=self.layers.depth.__getitem__)
                name = self.layers.names[cheapest]
                price = self.cost.ratio((name,)) - 1
                warnings.warn(
                    f"{_WHO}: `max_overhead`={bound} is below the price of any layer, "
                    f"every step is plain. The cheapest, {name}, costs {price:.3f}.",
                    stacklevel=3,
                )

    def _axis_sizes(self) -> list[tuple[Any, int]]:
        if isinstance(self._parallel, Mesh):
            return list(self._parallel.shape.items())
        return [] if self.axis_name is None else [(self.axis_name, self._devices)]

    def _check_loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> None:
        trace = jax.make_jaxpr(
            self._loss_fn, axis_env=self._axis_sizes(), return_shape=True
        )
        _, output = trace(params, model_state, batch, key)
        try:
            _, (new_state, _) = output
        except (TypeError, ValueError):
            remedy = "Return loss, (model_state, metrics); {} where there is nothing."
            expected = "a function to (loss, (model_state, metrics))"
            got = str(jax.tree.structure(output))
            raise TypeError(
                _checks.message(_WHO, "loss_fn", expected, got, remedy)
            ) from None
        kind = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), x.dtype), tree)
        if kind(new_state) != kind(model_state):
            remedy = "Return the model state with the structure, shapes and dtypes it has."
            expected = f"to return a model state like {kind(model_state)}"
            got = str(kind(new_state))
            raise TypeError(_checks.message(_WHO, "loss_fn", expected, got, remedy))

    def _share(self, x: Any) -> jax.ShapeDtypeStruct:
        """Returns the shape that one device sees of a leaf of the batch."""
        x = x if hasattr(x, "dtype") else np.asarray(x)
        if not x.shape:
            return jax.ShapeDtypeStruct((), x.dtype)
        if x.shape[0] % self._devices:
            remedy = "Pad the batch, drop its remainder, or use fewer devices."
            expected = f"divisible by the {self._devices} devices in its first axis"
            raise ValueError(_checks.message(_WHO, "batch", expected, str(x.shape), remedy))
        return jax.ShapeDtypeStruct((x.shape[0] // self._devices, *x.shape[1:]), x.dtype)

    def _refuse_tracers(self, *trees: Any) -> None:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees)):
            remedy = "It jits itself, and chooses its executable by the state's mask."
            raise TypeError(
                _checks.message(_WHO, "state", "concrete", "a tracer (under jit)", remedy)
            )

    def _place(self, batch: Any) -> Any:
        """Puts a global batch where the step wants it."""
        if self._parallel is None:
            return batch
        jax.tree.map(self._share, batch)  # raises where it does not divide
        if isinstance(self._parallel, Mesh):
            return jax.tree.map(
                lambda x, spec: jax.device_put(x, NamedSharding(self._parallel, spec)),
                batch,
                self._batch_specs(batch),
            )
        split = lambda x: x.reshape(self._devices, -1, *x.shape[1:])
        return jax.tree.map(lambda x: split(x) if np.ndim(x) else x, batch)

    def _batch_specs(self, batch: Any) -> Any:
        axes = PartitionSpec(self.axis_name)
        return jax.tree.map(lambda x: axes if np.ndim(x) else PartitionSpec(), batch)

    def _step_for(self, selection: tuple[str, ...] | Cover) -> Callable[..., Any]:
        if selection not in self._steps:
            self._steps[selection] = self._build(selection)
        return self._steps[selection]

    def _build(self, selection: tuple[str, ...] | Cover) -> Any:
        def local(state, batch):
            return self._local_step(selection, state, batch)

        if self._parallel is None:
            return jax.jit(local, donate_argnums=0)
        if isinstance(self._parallel, Mesh):
            mesh = self._parallel

            def sharded(state, batch):
                return jax.shard_map(
                    local,
                    mesh=mesh,
                    in_specs=(PartitionSpec(), self._batch_specs(batch)),
                    out_specs=PartitionSpec(),
                    # The check cannot type a scan whose carry starts as a constant, so
                    # it would refuse many models; our casts are exact without it.
                    check_vma=False,
                )(state, batch)

            return jax.jit(sharded, donate_argnums=0)
        return _PmapStep(local)

    def _local_step(
        self, selection: tuple[str, ...] | Cover, state: TrainState, batch: Any
    ) -> tuple[TrainState, StepInfo]:
        assert self.layers is not None
        assert self.cost is not None
        method, axis = self._method, self.axis_name
        key = jax.random.fold_in(state.key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        plain = method.is_plain or not len(selection)
        selection = () if plain else selection
        mask = state.method_state.mask if isinstance(selection, Cover) else None
        out = _gradient.value_and_grad(
            self._loss_fn,
            selection,
            rho=method.rho_at(state.step),
            alpha=method.alpha_at(state.step),
            normalize=method.normalize,
            layers=self.layers,
            has_aux=True,
            axis_name=axis,
        )(state.params, state.model_state, batch, key, mask=mask)
        model_state, metrics = out.aux
        if axis is not None:
            model_state = _average(model_state, axis, integers=lambda x: x)
            metrics = _average(metrics, axis, lambda x: jax.lax.psum(x, axis))
        updates, opt_state = self._optimizer.update(
            out.grads, state.opt_state, state.params, value=out.value
        )
        method_state = method.advance(
            state.method_state, out.norms, out.value, self.layers, self._eligible
        )
        new_state = TrainState(
            params=optax.apply_updates(state.params, updates),
            model_state=model_state,
            opt_state=opt_state,
            method_state=method_state,
            key=state.key,
            step=optax.safe_increment(state.step),
        )
        perturbed = self._perturbed_mask(selection, state)
        ratio = self.cost.ratio(selection, method.normalize)
        info = StepInfo(
            value=out.value,
            perturbed_value=out.perturbed_value,
            metrics=metrics,
            norms=method_state.norms,
            mask=perturbed,
            overhead=jnp.float32(ratio - 1.0),
            finite=_tree.all_finite((out.value, out.perturbed_value, out.grads)),
        )
        return new_state, info

    def _perturbed_mask(
        self, selection: tuple[str, ...] | Cover, state: TrainState
    ) -> jax.Array:
        assert self.layers is not None
        is_cover = isinstance(selection, Cover)
        names = selection.names if is_cover else selection
        compiled = jnp.asarray([name in names for name in self.layers.names])
        return compiled & state.method_state.mask if is_cover else compiled


class _PmapStep:
    """A pmapped step whose state has no device axis, made when the batch is known."""

    def __init__(self, local: Callable[..., Any]) -> None:
        self._local = local
        self._mapped: dict[Any, Any] = {}

    def _for(self, batch: Any) -> Any:
        axes = jax.tree.map(lambda x: 0 if np.ndim(x) else None, batch)
        key = (jax.tree.structure(batch), tuple(map(np.ndim, jax.tree.leaves(batch))))
        if key not in self._mapped:
            self._mapped[key] = jax.pmap(
                self._local,
                axis_name=_PMAP_AXIS,
                in_axes=(None, axes),
                out_axes=None,
                donate_argnums=0,
            )
        return self._mapped[key]

    def __call__(self, state: TrainState, batch: Any) -> Any:
        return self._for(batch)(state, batch)

    def lower(self, state: TrainState, batch: Any) -> Any:
        return self._for(batch).lower(state, batch)


def _copy(x: Any) -> Any:
    """Returns an array with a buffer of its own."""
    if isinstance(x, jax.Array):
        return x.copy()
    return jnp.array(x)


def _average(tree: Any, axis: Any, integers: Callable[[Any], Any]) -> Any:
    """Averages the float leaves over the devices; hands the others to `integers`."""

    def over_devices(x):
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jax.lax.pmean(x, axis)
        return integers(x)

    return jax.tree.map(over_devices, tree)
