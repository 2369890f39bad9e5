"""The method as one configuration: what `layerwise_sam` and `TrainStep` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _checks, _selectors, _tree
from ._layers import Layers, Rule
from ._selection import LayerwiseSAMState, StaticLayers
from ._selectors import Selector


_WHO = "lwsam"


def every(n: int) -> Callable[[jax.Array], jax.Array]:
    """Returns the predicate that is true at steps 0, n, 2n, ...

    Args:
      n: Period in steps, >= 1. `when=every(n)` perturbs in every n-th step and runs the
        base optimizer in the others.

    Raises:
      ValueError: If n is not a positive integer.
    """
    if not _checks.is_number(n) or n != int(n) or n < 1:
        remedy = "Pass the period in steps; 1 perturbs in every step."
        raise ValueError(_checks.message("every", "n", "an integer >= 1", n, remedy))
    return lambda step_count: step_count % int(n) == 0


@dataclasses.dataclass(frozen=True, eq=False)
class LayerwiseSAM:
    r"""Hyperparameters of layer-wise SAM, one argument for each axis of the SAM family.

    Which layers are perturbed (`k` or `select`), how (`rho`, `normalize`), how both
    gradients are combined (`alpha`), and in which steps (`when`, `reuse`).

    Attributes:
      k: Number of layers of the largest gradient norm; exactly one of k and select.
      select: A selector `(norms f32[L], key) -> bool[L]`. There the norm of a layer that
        may not be chosen, for a budget or because it is not finite, is -inf: a mean of
        the others is `jnp.mean(norms, where=jnp.isfinite(norms))`.
      rho: Perturbation radius (the paper's r), >= 0; a float or a schedule of the step
        count.
      alpha: Mixing weight of Eq. 6, >= 0; a float or a schedule. 1 is SAM, above it WSAM.
      normalize: `"none"`, `"selected"` or `"full"`; see `lwsam.value_and_grad`.
      rule: What a layer is; `lwsam.weights` by default.
      layers: The layers, if known already (`Layers.of(params, rule, loss_fn, *args)`
        knows their depth).
      axis_name: Mapped axis inside pmap or shard_map; `TrainStep` sets its own.
      seed: Seed of selectors that draw at random.
      when: Predicate `step_count int32[] -> bool[]`, such as `lwsam.every(2)`; the other
        steps are plain, but for `reuse`. None perturbs in every step.
      reuse: Only for `TrainStep`, and only where every layer is perturbed: the steps in
        which `when` is false add a stored direction to their gradient g, as
        $g + a\,(\|g\| / \|g_v\|)\,g_v$. The weight $a$ is `reuse`, finite and >= 0; $g_v$
        is the part of the last perturbed gradient that is orthogonal to its ascent
        gradient. This is LookSAM (Liu et al., CVPR 2022, arXiv:2203.02714). None runs
        them plain.
      max_overhead: Only for `TrainStep`: no step costs more than 1 + max_overhead plain
        gradients in FLOPs; the layers are chosen among those that keep it so.
      mean_overhead: Only for `TrainStep`: the mean step costs no more than
        1 + mean_overhead. What a step leaves of its share is saved, up to the price of
        perturbing everything; as soon as the savings pay for the selector's free choice
        it is taken, and in the other steps its choice among what the share alone pays.

    Raises:
      ValueError: For numbers out of range, or neither or both of k and select.
      TypeError: For arguments of the wrong kind.
    """

    k: Any = None
    _: dataclasses.KW_ONLY
    select: Selector | None = None
    rho: Any
    alpha: Any
    normalize: str = "none"
    rule: Rule | None = None
    layers: Layers | None = None
    axis_name: Any = None
    seed: Any = 0
    when: Callable[[jax.Array], jax.Array] | None = None
    max_overhead: float | None = None
    mean_overhead: float | None = None
    reuse: float | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked before parameters are known."""
        if (self.k is None) == (self.select is None):
            got = "neither" if self.k is None else "both"
            remedy = (
                "Pass k=4 for the four layers of largest norm, or select=<selector>."
            )
            raise ValueError(
                _checks.message(
                    _WHO, "k", "given if and only if `select` is not", got, remedy
                )
            )
        if self.k is not None:
            _checks.count_of_layers(_WHO, "k", self.k)
        else:
            remedy = "Pass lwsam.top_k(4), or a function (norms, key) -> bool mask."
            _checks.is_callable(_WHO, "select", self.select, remedy)
        _checks.rho(_WHO, self.rho)
        _checks.alpha(_WHO, self.alpha)
        _checks.choice(_WHO, "normalize", self.normalize, _checks.NORMALIZE)
        if self.rule is not None:
            remedy = "Pass lwsam.weights, lwsam.modules, lwsam.leaves, or a function."
            _checks.is_callable(_WHO, "rule", self.rule, remedy)
        if self.layers is not None and not isinstance(self.layers, Layers):
            remedy = "Make them with lwsam.Layers.of(params, ...)."
            raise TypeError(
                _checks.message(_WHO, "layers", "Layers or None", self.layers, remedy)
            )
        if self.when is not None:
            remedy = "Pass lwsam.every(2), or a function of the step count."
            _checks.is_callable(_WHO, "when", self.when, remedy)
        for name in ("max_overhead", "mean_overhead"):
            bound = getattr(self, name)
            if bound is not None:
                _checks.budget(_WHO, name, bound)
        if self.reuse is not None:
            self._check_reuse()

    def _check_reuse(self) -> None:
        remedy = "0.7 is a common weight; None runs the steps between ascents plain."
        _checks.non_negative(_WHO, "reuse", self.reuse, remedy)
        budget = self.max_overhead is not None or self.mean_overhead is not None
        everywhere = self.select is _selectors.everything()
        number = _checks.is_number(self.reuse)
        if not number or not everywhere or self.when is None or budget:
            expected = "a number, `select` everything(), with `when` and no budget"
            remedy = (
                "LookSAM: select=lwsam.everything(), when=lwsam.every(3), reuse=0.7."
            )
            raise ValueError(
                _checks.message(_WHO, "reuse", expected, self.reuse, remedy)
            )

    @property
    def is_plain(self) -> bool:
        """Whether it is known now that no step perturbs anything."""
        no_layer = _checks.is_number(self.k) and self.k == 0
        no_radius = _checks.is_number(self.rho) and self.rho == 0
        return no_layer or no_radius or self.select is _selectors.nothing()

    def rho_at(self, step_count: jax.Array) -> Any:
        """Returns the radius of a step."""
        return self.rho(step_count) if callable(self.rho) else self.rho

    def alpha_at(self, step_count: jax.Array) -> Any:
        """Returns the mixing weight of a step."""
        return self.alpha(step_count) if callable(self.alpha) else self.alpha

    def layers_of(
        self, params: Any, loss_fn: Any = None, *args: Any, axis_env: Any = None
    ) -> Layers:
        """Returns the layers that were given, or finds them as `Layers.of` does."""
        if self.layers is None:
            return Layers.of(params, self.rule, loss_fn, *args, axis_env=axis_env)
        self.layers.flatten(_WHO, "params", params)
        return self.layers

    def init(self, params: Any, layers: Layers) -> LayerwiseSAMState:
        """Returns the state before the first step, with the first mask."""
        dtype = _tree.accumulation_dtype(*jax.tree.leaves(params))
        norms = jnp.zeros((len(layers),), dtype)
        step_count = jnp.zeros((), jnp.int32)
        return LayerwiseSAMState(
            step_count=step_count,
            norms=norms,
            mask=self.choose(norms, step_count, layers),
            value=jnp.full((), jnp.inf, dtype),
            layers=StaticLayers(layers),
        )

    def advance(
        self,
        state: LayerwiseSAMState,
        norms: jax.Array,
        value: jax.Array,
        layers: Layers,
        mask: jax.Array | None = None,
    ) -> LayerwiseSAMState:
        """Returns the state after a step, with the mask of the next (lines 9 and 4)."""
        norms = norms.astype(state.norms.dtype)
        step_count = jnp.asarray(optax.safe_increment(state.step_count))
        return state._replace(
            step_count=step_count,
            norms=norms,
            mask=self.choose(norms, step_count, layers) if mask is None else mask,
            value=value.astype(state.value.dtype),
            layers=StaticLayers(layers),
        )

    def choose(
        self,
        norms: jax.Array,
        step_count: jax.Array,
        layers: Layers,
        eligible: jax.Array | None = None,
    ) -> jax.Array:
        """Returns bool[L], the layers that a step perturbs.

        Args:
          norms: f32[L], of the last step known.
          step_count: Number of the step that the choice is for.
          layers: The layers.
          eligible: bool[L], which of them may be chosen; None: all.
        """
        selector = _selectors.top_k(self.k) if self.select is None else self.select
        selector = _selectors.bind(selector, layers)
        allowed = jnp.isfinite(norms)
        if eligible is not None:
            allowed = allowed & eligible
        # -inf, not NaN: it sorts last, and no selector takes a norm that is not finite.
        offered = jnp.where(allowed, norms, -jnp.inf)
        key = jax.random.fold_in(jax.random.key(self.seed), step_count)
        mask = jnp.asarray(selector(offered, key))
        if mask.shape != norms.shape or mask.dtype != jnp.bool_:
            remedy = "Return one bool for each layer, in pytree order."
            got = f"{mask.dtype}{list(mask.shape)}"
            expected = f"a function to bool[{len(layers)}]"
            raise ValueError(_checks.message(_WHO, "select", expected, got, remedy))
        mask = mask & allowed
        return mask if self.when is None else mask & self.when(step_count)
