"""The method as one configuration: a value for each axis, and what all of them share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _checks
from ._axes import (
    ascent as _ascent,
    combine as _combine,
    descent as _descent,
    shape as _shape,
    sub_batches as _sub_batches,
    when as _when,
    which,
)
from ._engine.layers import Layers, Rule


_WHO = "lwsam.Method"


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    r"""One method of perturbed training, as a value for each of five axes.

    With the ascent direction $a$, the perturbation of the selected layers is
    $\epsilon = \rho\,s(a)$, and the base optimizer gets $d = c(g, \hat g)$ from the
    gradients $g$ at $w$ and $\hat g$ at $w + \epsilon$.

    Attributes:
      select: WHICH layers, a selector `(norms f32[L], key) -> bool[L]`: `top_k(4)`,
        `named(regex)`, `everything()`, `random_k(2)`, `bandit(4)`, or a function.
      rho: Radius, >= 0; a number, which a loop may set (`state.hyperparams["rho"]`), or
        a schedule of the step count, a function of that alone. rho(t) is the radius of
        gradient t; below 0 it counts as 0. A Python 0 is the base optimizer, bit for
        bit.
      ascent: FROM WHAT: `whole_batch()`, `micro_batch(fraction)`, `momentum()`,
        `previous()`, `random()`, `differences(count)`, or a function
        `(batch, key) -> part of the batch`.
      shape: HOW, $s$: `normalized()`, `raw()`, `adaptive()`, `relative()`, or any Optax
        transformation of the ascent direction.
      combine: WHAT, $c$: `descend()`, `mix(alpha)`, `surrogate_gap(alpha)`,
        `match_norm()`, `decoupled(alpha, learning_rate)`, `descend_on_selected()`,
        `flatness(...)`, `reuse(weight)`, or a function `(ascent, descent) -> gradient`.
      when: WHEN, a predicate of the step count: `always()`, `every(n)`,
        `last(fraction, total_steps)`, `between(a, b)`, or a function; the other steps
        are plain, but for what `reuse` does in them. Or a `Gate`, such as `unusual`,
        which decides within the step.
      descent: What the descent makes of the examples: None, their mean loss;
        `sharpest(fraction)`, that of some; `weighed(...)`, another mean, of the ascent's
        as well. `TrainStep` only.
      split: None, one perturbation of a step, or `sub_batches(count)`: one for each part
        of the batch. `TrainStep` only.
      rule: What a layer is; `lwsam.weights` by default.
      layers: The layers, if known already; then `rule` is not read.
      axis_name: Mapped axis inside pmap or shard_map; `TrainStep` sets its own.
      seed: Seed of selectors that draw at random.
      max_overhead: `TrainStep` only: no step costs more than 1 + max_overhead plain
        gradients in FLOPs; the layers are chosen among those that keep it so.
      mean_overhead: `TrainStep` only: the mean step costs no more than
        1 + mean_overhead. What a step leaves of its share is saved, up to the price of
        perturbing everything; as soon as the savings pay for the selector's free choice
        it is taken, and in the other steps its choice among what the share alone pays.

    Raises:
      ValueError: For numbers out of range, or parts that cannot be right together.
      TypeError: For arguments of the wrong kind.

    Examples:
      >>> import lwsam_jax as lwsam
      >>> method = lwsam.Method(
      ...     lwsam.top_k(4), rho=0.05, ascent=lwsam.micro_batch(0.1),
      ...     shape=lwsam.relative(),
      ... )
    """

    select: which.Selector
    _: dataclasses.KW_ONLY
    rho: Any
    ascent: Any = dataclasses.field(default_factory=_ascent.whole_batch)
    shape: Any = dataclasses.field(default_factory=_shape.normalized)
    combine: Any = dataclasses.field(default_factory=_combine.descend)
    when: Any = dataclasses.field(default_factory=_when.always)
    descent: Any = None
    split: Any = None
    rule: Rule | None = None
    layers: Layers | None = None
    axis_name: Any = None
    seed: Any = 0
    max_overhead: float | None = None
    mean_overhead: float | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked before parameters are known."""
        remedy = "Pass lwsam.top_k(4), or a function (norms, key) -> bool mask."
        _checks.is_callable(_WHO, "select", self.select, remedy)
        _checks.rho(_WHO, self.rho)
        _shape.check(_WHO, self.shape)
        object.__setattr__(self, "shape", optax.with_extra_args_support(self.shape))
        if self.gate is None:
            remedy = "Pass lwsam.every(2), or a function of the step count."
            _checks.is_callable(_WHO, "when", self.when, remedy)
        if self.rule is not None:
            remedy = "Pass lwsam.weights, lwsam.modules, lwsam.leaves, or a function."
            _checks.is_callable(_WHO, "rule", self.rule, remedy)
        if self.layers is not None and not isinstance(self.layers, Layers):
            remedy = "Make them with lwsam.Layers.of(params, ...)."
            raise _checks.type_error(
                _WHO, "layers", "Layers or None", self.layers, remedy
            )
        for name in ("max_overhead", "mean_overhead"):
            bound = getattr(self, name)
            if bound is not None:
                _checks.budget(_WHO, name, bound)
        if self.descent is not None:
            _descent.check(_WHO, self.descent)
        if self.split is not None:
            _sub_batches.check(_WHO, self.split)
        set_to = object.__setattr__
        set_to(self, "ascent", _ascent.as_ascent(_WHO, self.ascent))
        set_to(self, "combine", _combine.as_combine(_WHO, self.combine))
        self.combine.refuse(_WHO, self)
        if self.descent is not None:
            self.descent.refuse(_WHO, self)
        if self.gate is not None:
            self.gate.refuse(_WHO, self)
        if self.split is not None:
            self.split.refuse(_WHO, self)

    @property
    def is_plain(self) -> bool:
        """Whether it is known now that no step perturbs anything."""
        no_radius = _checks.is_number(self.rho) and self.rho == 0
        return no_radius or which.selects_nothing(self.select)

    @property
    def is_stale(self) -> bool:
        """Whether the direction is known before a step, which then takes no ascent."""
        return not isinstance(self.ascent, _ascent.Part)

    @property
    def gate(self) -> _when.Gate | None:
        """What decides within a step whether it perturbs, or None."""
        return self.when if isinstance(self.when, _when.Gate) else None

    @property
    def has_clean_pass(self) -> bool:
        """Whether a step takes a loss at the parameters themselves."""
        beside = self.split is not None and self.split.clean is not None
        return beside or not self.is_stale

    def hyperparams(self, dtype: Any) -> dict[str, jax.Array]:
        """Returns what a loop may set, as arrays of a dtype: numbers, schedules at 0.

        An array or tracer, as `optax.inject_hyperparams` passes it, is set elsewhere.
        """
        if self.is_plain:
            return {}
        at_first = lambda x: jnp.asarray(x(jnp.int32(0)) if callable(x) else x, dtype)
        found = {"rho": self.rho, "alpha": self.combine.alpha}
        is_ours = lambda x: callable(x) or _checks.is_number(x)
        return {name: at_first(x) for name, x in found.items() if is_ours(x)}

    def scheduled(self, hyperparams: dict[str, Any], step: Any) -> dict[str, Any]:
        """Returns the hyperparameters of a step: as set, but for what has a schedule."""
        of = {"rho": self.rho, "alpha": self.combine.alpha}
        return {
            name: jnp.asarray(of[name](step), jnp.asarray(x).dtype)
            if callable(of[name])
            else x
            for name, x in hyperparams.items()
        }

    def layers_of(
        self, params: Any, loss_fn: Any = None, *args: Any, **options: Any
    ) -> Layers:
        """Returns the layers that were given, or finds them as `Layers.of` does."""
        if self.layers is None:
            return Layers.of(params, self.rule, loss_fn, *args, **options)
        self.layers.flatten(_WHO, "params", params)
        return self.layers

    def look(
        self, kept: Any, norms: jax.Array, mask: jax.Array
    ) -> tuple[Any, jax.Array]:
        """Returns what a selector keeps after a step, and what it chooses by.

        Args:
          kept: What it kept before.
          norms: f32[L], of the step.
          mask: bool[L], layers that it perturbed.
        """
        if not isinstance(self.select, which.Learner):
            return kept, norms
        kept = self.select.observe(kept, norms, mask)
        return kept, self.select.scores(kept)

    def choose(
        self,
        norms: jax.Array,
        step: jax.Array,
        layers: Layers,
        eligible: jax.Array | None = None,
    ) -> jax.Array:
        """Returns bool[L], the layers that a step perturbs: WHICH and WHEN.

        Args:
          norms: f32[L], of the last step known.
          step: Number of the step that the choice is for.
          layers: The layers.
          eligible: bool[L], which of them may be chosen; None: all.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        mask = which.choose(self.select, norms, key, layers, eligible)
        if self.gate is not None:
            return mask
        now = jnp.asarray(self.when(step))
        if now.shape != ():
            remedy = "Return one bool, such as step % 2 == 0."
            expected, got = "a function to bool[]", f"one to {now.dtype}{now.shape}"
            raise _checks.value_error(_WHO, "when", expected, got, remedy)
        return mask & now.astype(bool)
