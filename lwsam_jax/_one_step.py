"""One step on one device, in-graph: gradient, base optimizer, the next selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _budget, _gradient, _perturbation, _tree
from ._cost import StepCost
from ._devices import Devices
from ._layers import Layers
from ._method import LayerwiseSAM
from ._selection import Cover, LayerwiseSAMState


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
      mean_overhead: f32[], its mean over all steps of the state.
      finite: bool[], whether both values and the gradient are finite.
    """

    value: jax.Array
    perturbed_value: jax.Array
    metrics: Any
    norms: jax.Array
    mask: jax.Array
    overhead: jax.Array
    mean_overhead: jax.Array
    finite: jax.Array


class OneStep:
    """The step of a selection as a function of state and batch; holds no arrays."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        optimizer: optax.GradientTransformationExtraArgs,
        method: LayerwiseSAM,
        devices: Devices,
        layers: Layers,
        cost: StepCost,
        selection_lag: int,
    ) -> None:
        """Takes what a step needs to know beside the selection."""
        self._loss_fn, self._optimizer, self._method = loss_fn, optimizer, method
        self._devices, self._layers, self._cost = devices, layers, cost
        self._lag = selection_lag
        self.purse = _budget.Purse(method, layers, cost.prices(method.normalize))

    def ratio(self, selection: tuple[str, ...] | Cover) -> float:
        """Returns the FLOPs of a step of this method over a plain gradient."""
        return self._cost.ratio(selection, self._method.normalize)

    def init(self, params: Any, model_state: Any, key: jax.Array) -> TrainState:
        """Returns the state before the first step, with the masks known by then."""
        method_state = self._method.init(params, self._layers)
        masks, budget = [], self.purse.first()
        for ahead in range(self._lag + 1):
            mask, unspent = self.purse.choose(
                method_state.norms, jnp.int32(ahead), budget.unspent
            )
            masks.append(mask)
            budget = budget._replace(unspent=unspent)
        return TrainState(
            params=params,
            model_state=model_state,
            opt_state=self._optimizer.init(params),
            method_state=method_state._replace(
                mask=masks[0],
                pending=tuple(masks[1:]),
                budget=budget,
                direction=self._no_direction(params),
            ),
            key=key,
            step=jnp.zeros((), jnp.int32),
        )

    def run(
        self, selection: tuple[str, ...] | Cover, state: TrainState, batch: Any
    ) -> tuple[TrainState, StepInfo, jax.Array]:
        """One step on one device; returns the mask that it decided on as well."""
        method, layers, axis = self._method, self._layers, self._devices.axis_name
        if method.is_plain or not len(selection):
            selection = ()
        mask = state.method_state.mask if isinstance(selection, Cover) else None
        key = self._devices.local_key(jax.random.fold_in(state.key, state.step))
        out, passes = _gradient.value_and_passes(
            self._loss_fn,
            selection,
            rho=method.rho_at(state.step),
            alpha=method.alpha_at(state.step),
            normalize=method.normalize,
            layers=layers,
            has_aux=True,
            axis_name=axis,
        )(state.params, state.model_state, batch, key, mask=mask)
        model_state, metrics = self._devices.average(*out.aux)
        direction = state.method_state.direction
        if direction:
            grads, direction = self._reuse(out.grads, passes, direction)
            out = out._replace(grads=grads)
        updates, opt_state = self._optimizer.update(
            out.grads, state.opt_state, state.params, value=out.value
        )
        decided, unspent = self.purse.choose(
            out.norms, state.step + 1 + self._lag, state.method_state.budget.unspent
        )
        queue = (*state.method_state.pending, decided)
        overhead = jnp.float32(self.ratio(selection) - 1.0)
        mean = _budget.running_mean(
            state.method_state.budget.mean_overhead, overhead, state.step
        )
        method_state = method.advance(
            state.method_state, out.norms, out.value, layers, queue[0]
        )._replace(
            pending=queue[1:],
            budget=_budget.Budget(unspent, mean),
            direction=direction,
        )
        new_state = TrainState(
            params=optax.apply_updates(state.params, updates),
            model_state=model_state,
            opt_state=opt_state,
            method_state=method_state,
            key=state.key,
            step=jnp.asarray(optax.safe_increment(state.step)),
        )
        info = StepInfo(
            value=out.value,
            perturbed_value=out.perturbed_value,
            metrics=metrics,
            norms=method_state.norms,
            mask=self._perturbed(selection, state.method_state.mask),
            overhead=overhead,
            mean_overhead=mean,
            finite=_tree.all_finite((out.value, out.perturbed_value, out.grads)),
        )
        return new_state, info, decided

    def _no_direction(self, params: Any) -> tuple[jax.Array, ...]:
        if self._method.reuse is None or self._method.is_plain:
            return ()
        leaves = jax.tree.leaves(params)
        return tuple(jnp.zeros_like(leaves[i]) for i in self._layers.member_leaves)

    def _reuse(
        self,
        grads: Any,
        passes: _gradient.Passes,
        direction: tuple[jax.Array, ...],
    ) -> tuple[Any, tuple[jax.Array, ...]]:
        """Adds the stored direction to a plain gradient, or stores a new one."""
        members = self._layers.member_leaves
        if passes.selected:
            found = _perturbation.orthogonal_part(passes.ascent, passes.descent)
            stored = {
                **dict(zip(members, direction, strict=True)),
                **dict(zip(passes.selected, found, strict=True)),
            }
            return grads, tuple(stored[i] for i in members)
        leaves, treedef = jax.tree.flatten(grads)
        mine = [leaves[i] for i in members]
        added = _perturbation.add_stored(mine, direction, self._method.reuse)
        for i, leaf in zip(members, added, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(treedef, leaves), direction

    def _perturbed(
        self, selection: tuple[str, ...] | Cover, mask: jax.Array
    ) -> jax.Array:
        is_cover = isinstance(selection, Cover)
        names = selection.names if is_cover else selection
        compiled = jnp.asarray([name in names for name in self._layers.names])
        return compiled & mask if is_cover else compiled

    def many(self, covers: int) -> Callable[..., Any]:
        """Returns many steps on one device, each on the smallest cover that will do."""
        chosen = self.purse.covers(covers)
        contained = jnp.asarray(
            [[n in c.names for n in self._layers.names] for c in chosen]
        )

        def one(cover, state, batch):
            return self.run(cover, state, batch)[:2]

        branches = [lambda s, b, cover=cover: one(cover, s, b) for cover in chosen]

        def body(state, batch):
            fits = jnp.all(contained | ~state.method_state.mask, axis=1)
            return jax.lax.switch(jnp.argmax(fits), branches, state, batch)

        return lambda state, batches: jax.lax.scan(body, state, batches)
