"""What a step costs: FLOPs by layer, of a selection, and Eq. 8 and Eq. 9 of the paper."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from .. import _checks
from .cover import Cover, static_selection
from .cut import large_remats
from .flops import union, Unrolled, Work, works
from .layers import Layers
from .rules import Rule
from .stacks import Sliced
from .trace import AxisEnv, inline, trace


_WHO = "lwsam.step_cost"


@dataclasses.dataclass(frozen=True, eq=False)
class StepCost:
    """FLOPs of a loss and its gradients, from its trace; made by `step_cost`.

    Attributes:
      layers: The layers, with their depth in this loss.
      plain: FLOPs of one plain value and gradient.
      forward: FLOPs of the forward pass, per layer; what stands before the first layer
        is counted to it, what has no weights to the layer whose output it takes.
      input_grad: FLOPs of the backward pass through each layer, per layer.
      weight_grad: FLOPs of each layer's own weight gradient, per layer.
      examples: Examples in the batch: the leading axis that most arrays share in the
        last argument of the loss that has one; None if none has.
    """

    layers: Layers
    plain: float
    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    examples: int | None
    _reach: _Reach = dataclasses.field(repr=False)

    def ratio(
        self,
        selection: tuple[str, ...] | Cover,
        ascent: Any = None,
        *,
        whole_ascent: bool = False,
        descent: float = 1.0,
        shared: bool = True,
        freezes: bool = False,
    ) -> float:
        r"""Returns the FLOPs of a step over those of a plain gradient, $F + B$.

        With both passes on the whole batch

        $$1 + \frac{F_{suffix} + B_{suffix \to w'}}{F + B},$$

        the paper's Eq. 8 without the forward of the prefix, which both passes share. An
        ascent on a fraction $f < 1$ of the examples has a forward pass of its own; one
        that takes no pass, along a direction at hand, is $f = 0$:

        $$1 + f\,\frac{F + B_{\to w'}}{F + B}.$$

        A descent on a share $d < 1$ first runs all examples at the perturbed point:

        $$d + \frac{f\,(F + B_{\to w'}) + F_{suffix}}{F + B},$$

        with $F$ for $F_{suffix}$ unless $f = 1$. The base optimizer and the perturbation
        itself are not counted.

        Args:
          selection: A tuple of names or a `Cover` (all of whose layers have their weight
            gradients computed, whatever the mask).
          ascent: The fraction of the examples that the ascent sees, a number or what has
            a method `fraction(examples)`; None is the whole batch.
          whole_ascent: Whether the ascent's backward pass reaches all leaves.
          descent: The share of the examples that the descent gradient sees.
          shared: Whether an ascent on the whole batch shares the forward pass of what no
            selected layer reaches; a function of one's own does not.
          freezes: Whether the descent's backward pass, too, reaches the selection alone.

        Raises:
          ValueError: On unknown names, fractions outside [0, 1], or an `ascent` that asks
            for the number of examples where no argument of the loss has any.
          TypeError: On an `ascent` of another kind.
        """
        chosen, _ = static_selection(_WHO, selection, self.layers)
        f = self._fraction(ascent)
        descent = _in_range("descent", descent)
        if not chosen:
            return 1.0
        reach, perturbed = self._reach, self._reach.bits(chosen)
        plain, whole = max(self.plain, 1.0), sum(reach.forward.values())
        is_shared = shared and f == 1.0
        again = _sum_of(reach.forward, perturbed) if is_shared else whole
        climb = f * (whole + reach.backward(-1 if whole_ascent else perturbed))
        if descent < 1.0:
            return descent + (climb + again) / plain
        if freezes:
            climb -= plain - whole - reach.backward(perturbed)
        return 1.0 + (climb - (whole - again)) / plain

    def _fraction(self, ascent: Any) -> float:
        """Returns the fraction of the examples that an ascent sees."""
        if ascent is None or _checks.is_number(ascent):
            return _in_range("ascent", 1.0 if ascent is None else ascent)
        expected = "a number in [0, 1], or what has a method fraction(examples)"
        if not callable(getattr(ascent, "fraction", None)):
            remedy = "Pass the fraction of the batch, e.g. 0.1, or None for all of it."
            raise _checks.type_error(_WHO, "ascent", expected, repr(ascent), remedy)
        if self.examples is None:
            got = f"{ascent!r}, and no argument of the loss has examples"
            remedy = "Pass the batch to the loss as an argument, or a number."
            raise _checks.value_error(_WHO, "ascent", expected, got, remedy)
        return _in_range("ascent", ascent.fraction(self.examples))

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
        back = self._reach.backward(self._reach.bits(chosen))
        return 1.0 + (sum(self.forward) + back) / max(self.plain, 1.0)

    def eq9(self, period: int) -> float:
        r"""Returns the cost of LookSAM (Eq. 9) over a plain gradient, plus 1.

        $\frac1k (\mathcal B_1 + \sum_i |\nabla L(w_i)|) + C$; the forward pass of the
        ascent is needed only where the ascent is, so it is divided by k as well.

        Args:
          period: LookSAM's k, the steps between two ascents.
        """
        remedy = "Pass the steps from one ascent to the next, e.g. 5."
        _checks.count(_WHO, "period", period, remedy)
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

    def prices(
        self, ascent: Any = None, *, whole_ascent: bool = False, descent: float = 1.0
    ) -> tuple[float, ...]:
        """Returns for each layer the overhead of the cover that starts at it.

        Covers grow towards the input, so that the price of a selection, run on its
        cover, is the largest of its layers' prices.

        Args:
          ascent: As in `ratio`, like the other arguments.
          whole_ascent: Whether the ascent's backward pass reaches all leaves.
          descent: The share of the examples that the descent gradient sees.
        """
        options = {"whole_ascent": whole_ascent, "descent": descent}
        covers = (Cover(self.layers.from_depth(d)) for d in self.layers.depth)
        return tuple(self.ratio(cover, ascent, **options) - 1.0 for cover in covers)


def _in_range(argument: str, x: Any) -> float:
    """Returns a fraction as a float; raises if it is none."""
    if not _checks.is_number(x) or not 0.0 <= x <= 1.0:
        remedy = "Pass the fraction of the batch, e.g. 0.1."
        expected = "a number in [0, 1]"
        raise _checks.value_error(_WHO, argument, expected, repr(x), remedy)
    return float(x)


def step_cost(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    rule: Rule | None = None,
    layers: Layers | None = None,
    axis_env: AxisEnv = None,
) -> StepCost:
    """Counts the FLOPs of a loss, its gradient, and its steps of layer-wise SAM.

    Nothing is compiled, nothing runs. The trip count of a while loop is unknown
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
      >>> loss = lambda p, x: jnp.sum(x @ p["w1"] @ p["w2"])
      >>> params = {"w1": jnp.ones((8, 8)), "w2": jnp.ones((8, 8))}
      >>> cost = step_cost(loss, params, jnp.ones((4, 8)))
      >>> cost.ratio(()), cost.ratio(("w2",)) < cost.ratio(("w1",))
      (1.0, True)
    """
    if layers is None:
        known = Layers.of(params, rule, loss_fn, *args, axis_env=axis_env)
    else:
        known = layers
        known.flatten("step_cost", "params", params)  # refuses another tree
    program = inline(trace(loss_fn, params, args, axis_env))
    count = len(known)
    # Bits: one for each layer, then other parameters. Other inputs have none.
    sources: dict[core.Var, int] = {}
    sliced: dict[core.Var, Sliced] = {}
    for i, v in enumerate(program.params):
        is_member, stack = known.leaf_layer[i] >= 0, known.stacks[i]
        bits = [1 << at for at in known.of_leaf(i)] if is_member else [1 << count]
        sources[v] = sum(bits)
        if stack is not None:
            sliced[v] = Sliced(stack.axis, tuple(bits))
    is_open = large_remats(program)
    found, unrolled = works(
        program.eqns, sources, program.outputs[:1], is_open, sliced, count + 1
    )
    reach = _Reach.of(found, unrolled)
    plain = sum(w.forward for w in found) + reach.backward(-1)
    return StepCost(known, plain, *_by_layer(known, found), _examples(args), reach)


def _examples(args: tuple[Any, ...]) -> int | None:
    """Returns the leading axis that most leaves share, of the last that has one.

    The last is the batch where the first is model state; a raw PRNG key is neither.
    """
    for arg in reversed(args):
        shapes = [
            x.shape
            for x in jax.tree.leaves(arg)
            if getattr(x, "shape", ()) and (x.dtype, x.ndim) != (np.uint32, 1)
        ]
        if shapes:
            counts = collections.Counter(shape[0] for shape in shapes)
            return counts.most_common(1)[0][0]
    return None


class _Reach(NamedTuple):
    """FLOPs of what the value depends on, by the layers that reach it, as bit masks.

    Attributes:
      forward: Of running equations again.
      recompute: Of their recomputation in a backward pass, under remat.
      cotangent: Of the cotangents of their inputs.
      unrolled: The scans over stacked layers.
    """

    forward: dict[int, float]
    recompute: dict[int, float]
    cotangent: dict[int, float]
    unrolled: list[Unrolled]

    @staticmethod
    def of(found: list[Work], unrolled: list[Unrolled]) -> _Reach:
        made = _Reach({}, {}, {}, unrolled)
        add = lambda to, mask, x: to.update({mask: to.get(mask, 0.0) + x})
        for work in filter(lambda work: work.live, found):
            add(made.forward, work.sources, work.forward)
            for mask, flops in work.inputs:
                add(made.cotangent, mask, flops)
            add(made.recompute, union(m for m, _ in work.inputs), work.recompute)
        return made

    def bits(self, chosen: Sequence[int]) -> int:
        """Returns layers as a bit mask, with those that run because of them.

        Behind the cut of a scan the gradient of a leaf is that of every index.
        """
        found = sum(1 << i for i in chosen)
        for before, turns in self.unrolled:
            hit = [any(mask & found for mask, _ in slices) for slices in turns]
            first = (*hit, True).index(True)
            start = 0 if first == 0 and before & found else first + 1  # 0: left whole
            for of_leaf in zip(*turns[start:], strict=True):
                if any(mask & found for mask, _ in of_leaf):
                    found |= sum(own for _, own in of_leaf)
        return found

    def backward(self, chosen: int) -> float:
        """Returns the FLOPs of a backward pass from the value down to the layers."""
        return _sum_of(self.cotangent, chosen) + _sum_of(self.recompute, chosen)


def _sum_of(flops: dict[int, float], chosen: int) -> float:
    return sum(x for mask, x in flops.items() if mask & chosen)


def _by_layer(
    layers: Layers, found: list[Work]
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Attributes each equation to the deepest layer that it depends on."""
    count = len(layers)
    of_params = (1 << (count + 1)) - 1
    totals = [[0.0] * count for _ in range(3)]
    by_depth = sorted(range(count), key=layers.depth.__getitem__, reverse=True)

    @functools.cache
    def deepest(mask):
        return next((i for i in by_depth if mask >> i & 1), by_depth[-1])

    for work in found:
        at = deepest(union(mask for mask, _ in work.inputs) or work.sources)
        totals[0][at] += work.forward
        for mask, flops in work.inputs if work.live else ():
            totals[2 if mask & of_params == 1 << at else 1][at] += flops
    forward_l, input_l, weight_l = (tuple(total) for total in totals)
    return forward_l, input_l, weight_l
