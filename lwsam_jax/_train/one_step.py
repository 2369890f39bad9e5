"""One step on one device, in-graph: gradient, base optimizer, the next selection."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _tree
from .._axes.descent import is_one_batch, losses_of, weigh_loss, Weighed
from .._devices.accumulate import Cuts, in_cuts
from .._devices.local import OneDevice
from .._engine.cover import Cover
from .._loops import passes as _passes, state as _state
from .._loops.functional import scalar_loss
from .._loops.plan import direction_of, LayerwiseGrad, Memory, Plan, remember
from .._loops.varying import local, varying
from .._method import Method
from . import budget as _budget, parts as _parts
from .skipping import Faults, held_back
from .state import StepInfo, TrainState
from .study import Study
from .update import base_step


# Folded into the step's key for what only the ascent draws; the loss sees the key itself.
_OF_THE_ASCENT = 0x5A4D


class _Seen(NamedTuple):
    """What a pass of the loss sees beside the parameters.

    Attributes:
      batch: The batch, or a device's share or part of it.
      constants: What is no batch.
      own: PRNG key of the ascent.
      key: PRNG key of the loss.
      devices: How many devices share the global batch with this one.
    """

    batch: Any
    constants: tuple[Any, ...]
    own: jax.Array
    key: jax.Array
    devices: int


class OneStep:
    """The step of a selection as a function of state and batch; holds no arrays."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        optimizer: optax.GradientTransformationExtraArgs,
        method: Method,
        devices: OneDevice,
        study: Study,
        selection_lag: int,
        faults: Faults,
        cuts: Cuts,
    ) -> None:
        """Takes what a step needs to know beside the selection."""
        self._loss_fn = scalar_loss("TrainStep", "loss_fn", loss_fn, has_aux=True)
        self._optimizer, self._method = optimizer, method
        self._devices, self._layers = devices, study.layers
        self._ratio, self._study, self._lag = study.ratio, study, selection_lag
        self._skips, self._scaler = faults
        self._cuts = cuts
        self._sees_both = not method.is_stale and method.ascent.cut is None
        self.purse = _budget.Purse(method, study.layers, study.menu)

    def init(self, params: Any, model_state: Any, key: jax.Array) -> TrainState:
        """Returns the state before the first step, with the masks known by then."""
        opt_state = self._optimizer.init(params)
        if self._method.split is not None and not self._method.is_plain:
            _parts.refuse_memory(
                "TrainStep", remember(self._method, self._layers, params)
            )
        method_state = _state.first(self._method, params, self._layers, opt_state)
        masks, budget = [], self.purse.first()
        for ahead in range(self._lag + 1):
            mask, unspent = self.purse.choose(
                _state.chosen_by(self._method, method_state),
                jnp.int32(ahead),
                budget.unspent,
            )
            masks.append(mask)
            budget = budget._replace(unspent=unspent)
        dtype = _tree.accumulation_dtype(*jax.tree.leaves(params))
        return TrainState(
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            method_state=method_state._replace(
                mask=masks[0], pending=tuple(masks[1:]), budget=budget
            ),
            hyperparams=self._method.hyperparams(dtype),
            key=key,
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            loss_scale=() if self._scaler is None else self._scaler.init(),
        )

    def run(
        self,
        selection: tuple[str, ...] | Cover,
        state: TrainState,
        batch: Any,
        constants: tuple[Any, ...],
    ) -> tuple[TrainState, StepInfo, jax.Array]:
        """One step of a device; returns the mask that it decided on as well."""
        method, before = self._method, state.method_state
        hyperparams = method.scheduled(state.hyperparams, state.step)
        plan = self._plan(selection, state, hyperparams)
        out, memory, seen = self._gradient(plan, state, batch, constants)
        model_state, metrics = self._devices.average(*out.aux)
        kept = before.ascent
        if method.is_stale and not method.is_plain:
            kept = method.ascent.update(kept, seen)
        params, opt_state, updates = base_step(
            self._optimizer,
            method.combine,
            plan,
            out,
            state.params,
            state.opt_state,
            state.step,
        )
        norms = out.norms.astype(before.norms.dtype)
        taken = out.finite & _tree.all_finite(updates) if self._skips else None
        known = norms if taken is None else jnp.where(taken, norms, before.norms)
        if method.combine.freezes and plan.chosen:  # what stood still has none
            still = jnp.any(out.mask) & ~out.mask
            known = jnp.where(still, before.norms, known)
        told = out.mask if taken is None else out.mask & taken
        learned, chosen_by = method.look(before.select, known, told)
        decided, unspent = self.purse.choose(
            chosen_by, state.step + 1 + len(before.pending), before.budget.unspent
        )
        queue = (*before.pending, decided)
        overhead = jnp.float32(self._ratio(selection if plan.chosen else ()) - 1.0)
        rho = jnp.where(jnp.any(out.mask), plan.rho_applied, 0).astype(norms.dtype)
        if out.ascended is not None:
            overhead = jnp.where(out.ascended, overhead, self._study.closed)
        spent = _budget.running_mean(before.budget.mean_overhead, overhead, state.step)
        new_state = TrainState(
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            method_state=_state.advance(before, known, queue[0])._replace(
                value=out.value.astype(before.value.dtype),
                memory=memory,
                ascent=kept,
                select=learned,
                pending=queue[1:],
                budget=_budget.Budget(unspent, spent),
            ),
            hyperparams=hyperparams,
            key=state.key,
            step=jnp.asarray(optax.safe_increment(state.step)),
            skipped=state.skipped,
            loss_scale=()
            if self._scaler is None
            else self._scaler.update(state.loss_scale, out.finite),
        )
        if taken is not None:
            new_state = held_back(taken, new_state, state)
        info = StepInfo(
            value=out.value,
            perturbed_value=out.perturbed_value,
            ascent_value=out.ascent_value if method.has_clean_pass else None,
            metrics=metrics,
            norms=norms,
            mask=out.mask,
            rho=rho,
            perturbation_norm=out.perturbation_norm,
            gap=out.perturbed_value - out.value if self._sees_both else None,
            cosine=None if method.is_stale else out.cosine,
            overhead=overhead,
            mean_overhead=spent,
            finite=out.finite,
            skipped=new_state.skipped,
            loss_scale=plan.scale,
        )
        return new_state, info, decided

    def _plan(
        self,
        selection: tuple[str, ...] | Cover,
        state: TrainState,
        hyperparams: dict[str, Any],
    ) -> Plan:
        method, layers = self._method, self._layers
        is_cover = isinstance(selection, Cover)
        names = selection.names if is_cover else selection
        chosen = () if method.is_plain else layers.indices("TrainStep", names)
        return Plan(
            layers=layers,
            chosen=chosen,
            mask=state.method_state.mask if is_cover else None,
            rho=hyperparams.get("rho", method.rho),
            alpha=hyperparams.get("alpha", method.combine.alpha),
            shape=method.shape,
            combine=method.combine,
            axis_name=self._devices.axis_name,
            gate=None if method.is_plain else method.gate,
            step=state.step,
            guards=self._skips and self._scaler is None,
            scale=None if self._scaler is None else state.loss_scale.scale,
        )

    def _gradient(
        self, plan: Plan, state: TrainState, batch: Any, constants: tuple[Any, ...]
    ) -> tuple[LayerwiseGrad, Memory, Any]:
        """Returns the gradient, the memory, and what gradient a stale ascent sees."""
        method, devices = self._method, self._devices
        step_key = jax.random.fold_in(state.key, state.step)
        own = jax.random.fold_in(step_key, _OF_THE_ASCENT)
        key = devices.local_key(step_key)
        if method.split is None or not plan.chosen:
            seen = _Seen(batch, constants, own, key, devices.count)
            out, memory = self._evaluate(plan, state, seen)
            return out, memory, out.grads
        state = state._replace(params=varying(state.params, devices.axis_name))

        def one(plan, part, number):
            keys = jax.random.fold_in(own, number), jax.random.fold_in(key, number)
            seen = _Seen(part, constants, *keys, devices=1)
            return self._evaluate(plan, state, seen)[0]

        found = _parts.evaluate_parts(
            method.split,
            plan,
            one,
            batch,
            is_stale=method.is_stale,
            device=devices.index(),
            devices=devices.count,
        )
        return found.out, state.method_state.memory, found.moved

    def _evaluate(
        self, plan: Plan, state: TrainState, seen: _Seen
    ) -> tuple[LayerwiseGrad, Memory]:
        """The gradient of a method on what a pass sees."""
        method, devices, batch = self._method, self._devices, seen.batch

        key = seen.key
        if self._cuts.count > 1:  # what an ascent sees has the key of the first cut
            key = jax.random.fold_in(key, 0)

        def loss_on(part):
            rest = (state.model_state, part, key, *seen.constants)
            loss = lambda p: self._loss_fn(p, *rest)
            return local(loss, state.params, devices.axis_name)

        sources: dict[str, Any] = {}
        if plan.chosen:
            part = batch
            if method.is_stale:
                sources["direction"] = direction_of(
                    method,
                    state.method_state.ascent,
                    state.opt_state,
                    state.params,
                    seen.own,
                )
            elif method.ascent.cut is not None:
                cut = lambda share, own: method.ascent.of(
                    share, own, seen.devices, self._cuts.count
                )
                part = devices.on_shares(cut, batch, seen.own)
                sources["ascent_loss"] = loss_on(part)
            if isinstance(method.descent, Weighed):
                sources["losses"] = self._weigh(loss_on, part, batch)
            elif method.descent is not None:
                losses = lambda aux: {"losses": losses_of("sharpest", aux[1], batch)}
                sources["descent_loss"] = lambda clean, perturbed: loss_on(
                    devices.on_shares(
                        lambda share, _: method.descent.of(*share),
                        (batch, losses(clean), losses(perturbed)),
                        (),
                    )
                )
        memory, loss = state.method_state.memory, self._on_all(state, loss_on, seen)
        return _passes.evaluate(plan, memory, loss, state.params, **sources)

    def _on_all(
        self, state: TrainState, loss_on: Callable[[Any], Any], seen: _Seen
    ) -> Any:
        """Returns the loss on the batch, a cut at a time where it is accumulated."""
        if self._cuts.count == 1:
            return loss_on(seen.batch)
        rest = (state.model_state, seen.batch, seen.constants, seen.key)
        return in_cuts(self._loss_fn, *rest, self._cuts, self._devices.on_shares)

    def _weigh(
        self, loss_on: Callable[[Any], Any], part: Any, batch: Any
    ) -> _passes.Losses:
        """Returns the losses of passes that weigh the examples."""
        how, one_batch = self._method.descent, is_one_batch(self._method.ascent)
        third = how.rest is not None
        loss = lambda seen, *by: weigh_loss(loss_on(seen), seen, *by)
        return _passes.Losses(
            ascent=loss(part, how.ascent),
            descent=weigh_loss(loss_on(batch), batch, how.descent, keeps_terms=True),
            rest=loss(batch, how.rest) if third else None,
            both=loss(batch, how.ascent, how.rest) if third and one_batch else None,
            one_batch=one_batch,
        )

    def refresh(
        self,
        state: TrainState,
        numbered: tuple[Any, jax.Array],
        constants: tuple[Any, ...],
    ) -> tuple[Any]:
        """Returns the model state after a forward pass on a (batch, its number)."""
        batch, number = numbered
        key = self._devices.local_key(jax.random.fold_in(state.key, number))
        rest = (state.model_state, batch, key, *constants)
        loss_on = lambda _: lambda p: self._loss_fn(p, *rest)
        seen = _Seen(batch, constants, key, key, self._devices.count)
        _, aux = self._on_all(state, loss_on, seen)(state.params)
        return (self._devices.average(*aux)[0],)

    def many(self, covers: list[Cover]) -> Callable[..., Any]:
        """Returns many steps of a device, each on the smallest cover that will do."""
        contained = jnp.asarray(
            [[n in c.names for n in self._layers.names] for c in covers]
        )

        def one(cover, state, batch, constants):
            return self.run(cover, state, batch, constants)[:2]

        branches = [functools.partial(one, cover) for cover in covers]

        def body(constants, state, batch):
            fits = jnp.all(contained | ~state.method_state.mask, axis=1)
            # A mask of another method may fit in none: then as much of it as there is.
            place = jnp.where(jnp.any(fits), jnp.argmax(fits), len(covers) - 1)
            return jax.lax.switch(place, branches, state, batch, constants)

        return lambda state, batches, constants: jax.lax.scan(
            functools.partial(body, constants), state, batches
        )
