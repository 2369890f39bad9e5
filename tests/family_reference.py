"""The family of sharpness-aware methods in float64 NumPy, from published formulas.

A method is a function that returns a `Rule`: from a point and what the step before left
to the direction d for the base optimizer. `trajectory` drives any rule by momentum SGD.
Parameters are flat dictionaries from leaf names to arrays, as in `reference`; w is the
point, g the ascent gradient, ghat the gradient at w + eps. Nothing here knows JAX or the
library. Where a norm is zero, what would be divided by it is zero.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from reference import LayersByDepth, Leaves, norm_of, ValueAndGrad


# (w, batch) -> gradient of the mean loss
Gradient = Callable[[Leaves, Any], Leaves]
# (w, batch) -> loss of each example
Losses = Callable[[Leaves, Any], np.ndarray]


class Move(NamedTuple):
    """What one step of a method computes.

    Attributes:
      update: d, what the base optimizer gets.
      epsilon: The perturbation.
      ascent: What the perturbation was formed from; g in a method of two gradients.
      descent: ghat, the gradient at w + epsilon.
      memory: What the method keeps for the next step: the g_v of LookSAM, the moving
        average of Friendly SAM. GSAM leaves its g_perp here.
      late: What the parameters lose after the base optimizer's step, times the learning
        rate; None for nothing.
    """

    update: Leaves
    epsilon: Leaves
    ascent: Leaves
    descent: Leaves
    memory: Any
    late: Leaves | None = None


class Step(NamedTuple):
    """A step of the whole algorithm: parameters and velocity after it, and its move."""

    params: Leaves
    velocity: Leaves
    move: Move


# (number of the step, w, the step before or None, batch) -> move
Rule = Callable[[int, Leaves, Step | None, Any], Move]


def trajectory(
    rule: Rule,
    params: Leaves,
    batches: Iterable,
    *,
    learning_rate: float = 0.1,
    momentum: float = 0.0,
) -> list[Step]:
    """Momentum SGD (heavy ball) on a rule: v = mu v + d, w = w - lr v."""
    steps: list[Step] = []
    velocity = zeros(params)
    for number, batch in enumerate(batches):
        move = rule(number, params, steps[-1] if steps else None, batch)
        velocity = added(move.update, momentum, velocity)
        params = added(params, -learning_rate, velocity)
        if move.late is not None:
            params = added(params, -learning_rate, move.late)
        steps.append(Step(params, velocity, move))
    return steps


# --- arithmetic on leaves -------------------------------------------------------------


def zeros(leaves: Leaves) -> Leaves:
    """0 of the same shapes."""
    return {name: np.zeros_like(leaf) for name, leaf in leaves.items()}


def scaled(factor: float, leaves: Leaves) -> Leaves:
    """Factor times leaves."""
    return {name: factor * leaf for name, leaf in leaves.items()}


def added(leaves: Leaves, factor: float, others: Leaves) -> Leaves:
    """Leaves + factor times others."""
    return {name: leaf + factor * others[name] for name, leaf in leaves.items()}


def inner(leaves: Leaves, others: Leaves) -> float:
    """<leaves, others> over everything."""
    return float(sum(np.sum(leaf * others[name]) for name, leaf in leaves.items()))


def only(leaves: Leaves, names: Collection[str]) -> Leaves:
    """Leaves, zero outside of the names."""
    return {n: leaf if n in names else 0.0 * leaf for n, leaf in leaves.items()}


def over(numerator: float, denominator: float) -> float:
    """The quotient, 0 for a zero denominator."""
    return numerator / denominator if denominator else 0.0


def to_norm(radius: float, leaves: Leaves) -> Leaves:
    """Leaves scaled to a norm of `radius`; zero leaves stay zero."""
    return scaled(over(radius, norm_of(leaves.values())), leaves)


def without(leaves: Leaves, direction: Leaves) -> Leaves:
    """The part of leaves that is orthogonal to a direction."""
    share = over(inner(leaves, direction), inner(direction, direction))
    return added(leaves, -share, direction)


def rows_of(batch: Any, rows: Any) -> Any:
    """Some examples of a batch, a tuple of arrays with the examples first."""
    return tuple(part[rows] for part in batch)


def gradient_of(value_and_grad: ValueAndGrad) -> Gradient:
    """The gradient alone."""
    return lambda params, batch: value_and_grad(params, batch)[1]


def losses_of(value_and_grad: ValueAndGrad) -> Losses:
    """The loss of each example, each as the mean loss of a batch of one."""

    def losses(params: Leaves, batch: Any) -> np.ndarray:
        singles = (rows_of(batch, [i]) for i in range(len(batch[0])))
        return np.array([value_and_grad(params, single)[0] for single in singles])

    return losses


# --- the published methods ------------------------------------------------------------


def sam(gradient: Gradient, *, rho: float) -> Rule:
    """SAM, Foret et al., ICLR 2021, arXiv:2010.01412: d = g(w + rho g / |g|)."""

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        epsilon = to_norm(rho, g)
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, g, ghat, {})

    return rule


def generalized_sam(gradient: Gradient, *, rho: float, alpha: float) -> Rule:
    """Zhao et al., ICML 2022, arXiv:2202.03599: d = (1 - alpha) g + alpha ghat."""

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        epsilon = to_norm(rho, g)
        ghat = gradient(added(w, 1.0, epsilon), batch)
        update = added(scaled(1.0 - alpha, g), alpha, ghat)
        return Move(update, epsilon, g, ghat, {})

    return rule


def asam(
    gradient: Gradient,
    *,
    rho: float,
    eta: float,
    scaled_leaves: Collection[str] | None = None,
) -> Rule:
    """ASAM, Kwon et al., ICML 2021, arXiv:2102.11600: eps = rho T^2 g / |T g|.

    T is |w| + eta in the scaled leaves (None: all of them), 1 in the others.
    """

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        epsilon = scaled(rho, adaptive(eta, scaled_leaves)(w, g, w.keys()))
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, g, ghat, {})

    return rule


def sam_on(gradient: Gradient, *, rho: float, leaves: Collection[str]) -> Rule:
    """SAM-ON, Mueller et al., NeurIPS 2023, arXiv:2306.04226.

    Only the leaves of normalization layers are perturbed, with the norm over them.
    """

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        epsilon = to_norm(rho, only(g, leaves))
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, g, ghat, {})

    return rule


def gsam(
    gradient: Gradient,
    *,
    rho: float,
    alpha: float,
    leaves: Collection[str] | None = None,
) -> Rule:
    """The surrogate gap, Zhuang et al., ICLR 2022, arXiv:2203.08065.

    g_perp = g - <g, ghat> ghat / |ghat|^2 and d = ghat - alpha g_perp, over all leaves,
    also where some only are perturbed (`leaves`; the paper perturbs all).
    """

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        epsilon = to_norm(rho, g if leaves is None else only(g, leaves))
        ghat = gradient(added(w, 1.0, epsilon), batch)
        g_perp = without(g, ghat)
        return Move(added(ghat, -alpha, g_perp), epsilon, g, ghat, g_perp)

    return rule


def looksam(gradient: Gradient, *, rho: float, period: int, weight: float) -> Rule:
    """LookSAM, Liu et al., CVPR 2022, arXiv:2203.02714, with global norms.

    Every period-th step is SAM's and keeps g_v = ghat - <ghat, g> g / |g|^2; the others
    are d = g + weight (|g| / |g_v|) g_v.
    """

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        if number % period:
            g_v = last.move.memory
            update = added(g, weight, to_norm(norm_of(g.values()), g_v))
            return Move(update, zeros(w), g, g, g_v)
        epsilon = to_norm(rho, g)
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, g, ghat, without(ghat, g))

    return rule


def friendly_sam(gradient: Gradient, *, rho: float, sigma: float, decay: float) -> Rule:
    """Friendly SAM, Li et al., CVPR 2024, arXiv:2403.12350, in the order of its code.

    q = g - sigma m with the average m of the steps before (none in the first step), then
    m = decay m + (1 - decay) g; it starts as the first g. eps = rho q / |q|, d = ghat.
    """

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        q, m = g, g
        if last is not None:
            q = added(g, -sigma, last.move.memory)
            m = added(scaled(decay, last.move.memory), 1.0 - decay, g)
        epsilon = to_norm(rho, q)
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, g, ghat, m)

    return rule


def esam(
    gradient: Gradient,
    losses: Losses,
    *,
    rho: float,
    keep: float,
    samples: float,
    kept: Sequence[Collection[str]],
) -> Rule:
    """ESAM, Du et al., ICLR 2022, arXiv:2110.03141, as in its code.

    Args:
      gradient: Gradient of the mean loss.
      losses: Loss of each example.
      rho: Radius.
      keep: Probability with which a leaf is perturbed; the perturbation is divided by it.
      samples: Share of the batch, floor(samples * B) examples, that the descent gradient
        is over: those whose loss rises most from w to w + eps.
      kept: The leaves that each step perturbs. Where it is none, the loss of no example
        rises, and the step is plain.
    """

    def rule(number, w, last, batch):
        g = gradient(w, batch)
        if not kept[number]:
            return Move(g, zeros(w), g, g, {})
        epsilon = to_norm(rho / keep, only(g, kept[number]))
        point = added(w, 1.0, epsilon)
        rise = losses(point, batch) - losses(w, batch)
        count = int(np.floor(samples * len(rise)))
        steepest = np.argsort(-rise, kind="stable")[:count]
        ghat = gradient(point, rows_of(batch, np.sort(steepest)))
        return Move(ghat, epsilon, g, ghat, {})

    return rule


# --- what is perturbed from what, and how: the axes one by one ------------------------


# (number of the step, w, the step before or None, batch) -> direction
Ascent = Callable[[int, Leaves, Step | None, Any], Leaves]
# (w, direction, names of the perturbed leaves) -> perturbation at rho = 1
Shape = Callable[[Leaves, Leaves, Collection[str]], Leaves]


def perturbed(
    gradient: Gradient,
    ascent: Ascent,
    shape: Shape,
    *,
    rho: float,
    leaves: Collection[str] | None = None,
    when: Callable[[int], bool] = lambda number: True,
) -> Rule:
    """d = g(w + rho shape(ascent)); plain gradients in the steps that `when` leaves out.

    Args:
      gradient: Gradient of the mean loss, for the descent.
      ascent: Where the direction comes from.
      shape: What is made of it.
      rho: Radius.
      leaves: What may be perturbed; None: everything.
      when: Predicate of the number of the step.
    """

    def rule(number, w, last, batch):
        names = (w.keys() if leaves is None else leaves) if when(number) else ()
        direction = ascent(number, w, last, batch)
        epsilon = scaled(rho, shape(w, direction, names))
        ghat = gradient(added(w, 1.0, epsilon), batch)
        return Move(ghat, epsilon, direction, ghat, {})

    return rule


def whole_batch(gradient: Gradient) -> Ascent:
    """The gradient at w of the batch of the step."""
    return lambda number, w, last, batch: gradient(w, batch)


def micro_batch(gradient: Gradient, rows: Callable[[int], slice]) -> Ascent:
    """The gradient at w of some contiguous examples, a slice for each step."""
    return lambda number, w, last, batch: gradient(w, rows_of(batch, rows(number)))


def momentum(sign: float = -1.0) -> Ascent:
    """MSAM, Becker et al., arXiv:2401.12033: the momentum before its update.

    With its sign, -1 in the paper; 0 in step 0, whose gradient is taken at w itself.
    """

    def ascent(number, w, last, batch):
        return zeros(w) if last is None else scaled(sign, last.velocity)

    return ascent


def previous() -> Ascent:
    """The gradient that the step before descended along; 0 in step 0."""

    def ascent(number, w, last, batch):
        return zeros(w) if last is None else last.move.descent

    return ascent


def random(noise: Sequence[Leaves]) -> Ascent:
    """Given noise, one draw for each step."""
    return lambda number, w, last, batch: noise[number]


def raw() -> Shape:
    """The direction itself."""
    return lambda w, direction, names: only(direction, names)


def normalized(over_all: bool = False) -> Shape:
    """The direction over its norm, that of the perturbed leaves or that of all."""

    def shape(w, direction, names):
        inside = only(direction, names)
        norm = norm_of((direction if over_all else inside).values())
        return scaled(over(1.0, norm), inside)

    return shape


def adaptive(eta: float, scaled_leaves: Collection[str] | None = None) -> Shape:
    """T^2 a / |T a| with T = |w| + eta in the scaled leaves (None: all), else 1."""

    def shape(w, direction, names):
        t = {
            name: np.abs(leaf) + eta
            if scaled_leaves is None or name in scaled_leaves
            else np.ones_like(leaf)
            for name, leaf in w.items()
        }
        ta = {name: t[name] * leaf for name, leaf in only(direction, names).items()}
        tta = {name: t[name] * leaf for name, leaf in ta.items()}
        return scaled(over(1.0, norm_of(ta.values())), tta)

    return shape


def relative_to_layers(layers: LayersByDepth) -> Shape:
    """|w_l| a_l / |a_l| for each layer; what belongs to none stays where it is."""

    def shape(w, direction, names):
        inside = only(direction, names)
        epsilon = zeros(w)
        for leaves in layers.values():
            own = norm_of(w[leaf] for leaf in leaves)
            factor = over(own, norm_of(inside[leaf] for leaf in leaves))
            epsilon |= {leaf: factor * inside[leaf] for leaf in leaves}
        return epsilon

    return shape


def proportional_to_filters(is_mean: bool = False) -> Shape:
    """|w_f| a_f for each slice f of the last axis, or its root mean square times a_f."""

    def shape(w, direction, names):
        epsilon = {}
        for name, leaf in only(direction, names).items():
            axes = tuple(range(leaf.ndim - 1)) if leaf.ndim > 1 else None
            size = np.sqrt(np.sum(w[name] ** 2, axis=axes))
            count = leaf.size // (leaf.shape[-1] if leaf.ndim > 1 else 1)
            epsilon[name] = size / np.sqrt(count if is_mean else 1) * leaf
        return epsilon

    return shape


def proportional_to_elements() -> Shape:
    """w a, element by element."""

    def shape(w, direction, names):
        return {n: w[n] * leaf for n, leaf in only(direction, names).items()}

    return shape


def relative_to_filters(leaves: Collection[str]) -> Shape:
    """|w_f| a_f / |a_f| for each slice f of the last axis, in these leaves alone.

    A leaf of rank 1 is one filter (RWP, Li et al., arXiv:2211.11489, in its code).
    """

    def shape(w, direction, names):
        inside = only(only(direction, names), leaves)
        epsilon = {}
        for name, leaf in inside.items():
            axes = tuple(range(leaf.ndim - 1)) if leaf.ndim > 1 else None
            size = np.sqrt(np.sum(leaf**2, axis=axes))
            own = np.sqrt(np.sum(w[name] ** 2, axis=axes))
            factor = np.divide(own, size, out=np.zeros_like(own), where=size > 0)
            epsilon[name] = factor * leaf
        return epsilon

    return shape
