"""What a step costs: FLOPs by layer, of a selection, and Eq. 8 and Eq. 9 of the paper."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from . import _checks, _flops, _jaxpr, _split
from ._layers import Layers, Rule
from ._selection import Cover, static_selection


_WHO = "lwsam.step_cost"


@dataclasses.dataclass(frozen=True, eq=False)
class StepCost:
    """FLOPs of a loss and its gradients, from one trace; made by `step_cost`.

    Attributes:
      layers: The layers, with their depth in this loss.
      plain: FLOPs of one plain value and gradient.
      forward: FLOPs of the forward pass, per layer; what stands before the first layer
        is counted to it, what has no weights to the layer whose output it takes.
      input_grad: FLOPs of the backward pass through each layer, per layer.
      weight_grad: FLOPs of each layer's own weight gradient, per layer.
    """

    layers: Layers
    plain: float
    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    _traced: _jaxpr.Traced = dataclasses.field(repr=False)
    _cache: dict[Any, float] = dataclasses.field(default_factory=dict, repr=False)

    def ratio(self, selection: tuple[str, ...] | Cover, normalize: str = "none") -> float:
        r"""Returns the FLOPs of a step over those of a plain gradient.

        $$1 + \frac{F_{suffix} + B_{suffix \to w'}}{F + B}$$

        the paper's Eq. 8 without the forward of the prefix, which both passes share. The
        base optimizer and the perturbation itself are not counted.

        Args:
          selection: A tuple of names or a `Cover` (all of whose layers have their weight
            gradients computed, whatever the mask).
          normalize: As in `value_and_grad`; `"full"` costs a whole ascent backward pass.

        Raises:
          ValueError: On unknown names.
        """
        _checks.choice(_WHO, "normalize", normalize, _checks.NORMALIZE)
        chosen, _ = static_selection(_WHO, selection, self.layers)
        if not chosen:
            return 1.0
        key = (chosen, normalize == "full")
        if key not in self._cache:
            self._cache[key] = self._step(*key) / self.plain
        return self._cache[key]

    def _step(self, chosen: tuple[int, ...], full: bool) -> float:
        traced = self._traced
        selected = [i for i, at in enumerate(self.layers.leaf_layer) if at in set(chosen)]
        parts = _split.cut(traced, selected)
        value = traced.outvars[:1]
        weights = set(parts.chosen)
        onward = weights | set(parts.residuals)
        needed = _jaxpr.ancestors(parts.after, value)
        value_only = [e for e in parts.after if any(v in needed for v in e.outvars)]
        prefix = sum(map(_flops.forward, parts.before))
        prefix_back = _flops.backward(parts.before, set(parts.rest), parts.residuals)
        ascent_to = onward if full else weights
        return (
            prefix
            + sum(map(_flops.forward, parts.after))
            + _flops.backward(parts.after, ascent_to, value)
            + (prefix_back if full else 0.0)
            + sum(map(_flops.forward, value_only))
            + _flops.backward(parts.after, onward, value)
            + prefix_back
        )

    def eq8(self, selection: tuple[str, ...] | Cover) -> float:
        r"""Returns the cost of the paper's Eq. 8 over a plain gradient, plus 1.

        $\mathcal B_{\min(w')} + \sum_{i \in w'} |\nabla L(w_i)| + C$ with the whole
        forward pass as the constant: two gradients without a shared prefix.

        Args:
          selection: A tuple of names or a `Cover`.
        """
        chosen, _ = static_selection(_WHO, selection, self.layers)
        if not chosen:
            return 1.0
        leaves = zip(self._traced.invars, self.layers.leaf_layer, strict=True)
        wrt = {v for v, at in leaves if at in set(chosen)}
        back = _flops.backward(self._traced.eqns, wrt, self._traced.outvars[:1])
        return 1.0 + (sum(self.forward) + back) / self.plain

    def eq9(self, period: int) -> float:
        r"""Returns the cost of LookSAM (Eq. 9) over a plain gradient, plus 1.

        $\frac1k (\mathcal B_1 + \sum_i |\nabla L(w_i)|) + C$; the forward pass of the
        ascent is needed only where the ascent is, so it is divided by k as well.

        Args:
          period: LookSAM's k, the steps between two ascents.
        """
        _checks.count_of_layers(_WHO, "period", period)
        return 1.0 + 1.0 / max(int(period), 1)

    def table(self) -> str:
        """Returns a readable table: one line per layer, from the input on."""
        width = max(len("layer"), *(len(name) for name in self.layers.names))
        lines = [
            f"{'layer':<{width}}  {'forward':>10}  {'input':>10}  {'weight':>10}"
            f"  {'alone':>6}  {'cover':>6}  {'Eq. 8':>6}"
        ]
        order = sorted(range(len(self.layers)), key=self.layers.depth.__getitem__)
        for i in order:
            name = self.layers.names[i]
            cover = Cover(self.layers.from_depth(self.layers.depth[i]))
            lines.append(
                f"{name:<{width}}  {self.forward[i]:>10.3g}  {self.input_grad[i]:>10.3g}"
                f"  {self.weight_grad[i]:>10.3g}  {self.ratio((name,)):>6.3f}"
                f"  {self.ratio(cover):>6.3f}  {self.eq8((name,)):>6.3f}"
            )
        return "\n".join(lines)

    def within(self, max_overhead: float) -> tuple[bool, ...]:
        """Returns for each layer whether the cover that starts at it costs no more.

        Args:
          max_overhead: Bound on `ratio(cover) - 1`.
        """
        covers = (Cover(self.layers.from_depth(d)) for d in self.layers.depth)
        return tuple(self.ratio(c) - 1.0 <= max_overhead for c in covers)


def step_cost(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    rule: Rule | None = None,
    layers: Layers | None = None,
    axis_env: _jaxpr.AxisEnv = None,
) -> StepCost:
    """Counts the FLOPs of a loss, its gradient, and its steps of layer-wise SAM.

    One trace, no compilation, nothing runs. The trip count of a while loop is unknown
    and counts as one; a scan counts by its length.

    Args:
      loss_fn: `loss_fn(params, *args)`, a scalar, or a tuple whose first leaf is one.
      params: Parameter tree of arrays or `jax.ShapeDtypeStruct`s.
      *args: Arguments of the loss; arrays may be `jax.ShapeDtypeStruct`s.
      rule: What a layer is; `lwsam.weights` by default.
      layers: The layers, if known already; then `rule` is not read.
      axis_env: Names and sizes of mapped axes that the loss uses, as `jax.make_jaxpr`
        takes them.

    Returns:
      A `StepCost`.

    Raises:
      ValueError: As `Layers.of`.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = lambda p, x: jnp.sum(x @ p["a"] @ p["b"])
      >>> params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
      >>> cost = step_cost(loss, params, jnp.ones((4, 8)))
      >>> cost.ratio(()), cost.ratio(("b",)) < cost.ratio(("a",))
      (1.0, True)
    """
    if layers is None:
        known = Layers.of(params, rule, loss_fn, *args, axis_env=axis_env)
    else:
        known = layers
    traced, inputs = _jaxpr.trace_call(loss_fn, params, args, axis_env=axis_env)
    weights = set(traced.invars)
    forward = [_flops.forward(e) for e in traced.eqns]
    back = _flops.backward_by_equation(traced.eqns, weights, traced.outvars[:1])
    data = [*inputs, *traced.consts]
    per_layer = _by_layer(known, traced, forward, back, data)
    return StepCost(known, sum(forward) + sum(back), *per_layer, traced)


def _by_layer(
    layers: Layers,
    traced: _jaxpr.Traced,
    forward: list[float],
    back: list[float],
    data: list[Any],
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Attributes each equation to the deepest layer that it depends on."""
    places = zip(traced.invars, layers.leaf_layer, strict=True)
    owner: dict[Any, int] = {v: layer for v, layer in places if layer >= 0}
    on_data = _jaxpr.dependents(traced.eqns, data)
    totals = [[0.0] * len(layers) for _ in range(3)]
    deepest = functools.partial(max, key=lambda i: layers.depth[i])
    first = min(range(len(layers)), key=layers.depth.__getitem__)
    for eqn, f, b in zip(traced.eqns, forward, back, strict=True):
        read = [a for a in eqn.invars if _jaxpr.is_var(a)]
        met = [owner[a] for a in read if a in owner]
        at = deepest(met) if met else first
        own = [
            _jaxpr.is_var(a) and owner.get(a) == at and a not in on_data
            for a in eqn.invars
        ]
        weight_part = min(b, _flops.transposed(eqn, own))
        for total, part in zip(totals, (f, b - weight_part, weight_part), strict=True):
            total[at] += part
        if met:
            owner.update(dict.fromkeys(eqn.outvars, at))
    forward_l, input_l, weight_l = (tuple(total) for total in totals)
    return forward_l, input_l, weight_l
