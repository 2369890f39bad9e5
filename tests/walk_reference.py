"""One step of any combination of the built-in parts, in float64 NumPy.

A combination names a value for each axis, as `walk_combinations` has it. What a library
draws is given: the layers of a step, the examples of its ascent, its noise. Everything
else is computed here, with the arithmetic of `family_reference`.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

import family_reference as family
import reference
from family_reference import added, norm_of, only, over, scaled, zeros
from reference import Leaves
from walk_combinations import Parts


LAYERS = reference.WEIGHTS
LEAVES = tuple(reference.LEAVES)
MEMBERS = tuple(leaf for leaves in LAYERS.values() for leaf in leaves)
SIZE, STEPS = 8, 4
RATE, MOMENTUM = 0.3, 0.9
ETA, DECAY = 0.05, 0.5

ALPHA = {"mix": 0.8, "surrogate_gap": 0.5, "decoupled": 0.6}
WEIGHT = 0.7  # of `reuse`
FLATNESS = {"radius": 0.1, "beta0": 0.3, "beta1": 0.6, "gamma": 0.2}
SHARE = 0.5  # of `sharpest`
MU = 0.05  # of `differences`
LIGHT = {"b1": 0.8, "b2": 0.9, "delta": 0.1}  # of the shape "light"
BEND = 0.5  # of `weighed`: the descent has l + BEND l^2 / 2 of each loss l
CLASSES = (0.9, 0.2, 0.5)  # of "weighed thrice": the ascent's share of each class
# How many examples each ascent sees; the function's are the first ones.
COUNTS = {"fraction": 2, "size": 3, "function": 5}
WHEN = {
    "always": (True, True, True, True),
    "every": (True, False, True, False),
    "last": (False, False, True, True),
    "between": (False, True, True, False),
    "predicate": (True, True, False, True),
    "gate": (True, False, True, True),
}


class Step(NamedTuple):
    """What a step did, and what it leaves to the next.

    Attributes:
      params: After the step.
      value: Clean loss of the whole batch; without such a pass that at the point.
      perturbed_value: Loss of the whole batch at the point.
      ascent_value: Clean loss of what the ascent sees; None where it takes no pass.
      reported: Where the metrics were computed.
      norms: Of the descent gradient, one for each layer; 0 of what stands still.
      known: The last one that is known of each layer.
      rho: What was applied.
      velocity: Of the base optimizer.
      update: What the base optimizer got.
      trace: State of the chain's trace.
      mean: Of gradients, which the shape "light" keeps.
      squares: The same of their squares.
      across: What `reuse` keeps.
    """

    params: Leaves
    value: float
    perturbed_value: float
    ascent_value: float | None
    reported: Leaves
    norms: dict[str, float]
    known: dict[str, float]
    rho: float
    velocity: Leaves
    update: Leaves
    trace: Leaves
    mean: Leaves
    squares: Leaves
    across: Leaves


# (losses of the examples, labels) -> d weighed loss / d loss of each example
Slopes = Callable[[np.ndarray, np.ndarray], np.ndarray]
GRADIENT = family.gradient_of(reference.mlp_value_and_grad)
LOSSES = family.losses_of(reference.mlp_value_and_grad)


def loss(params: Leaves, batch: Any) -> float:
    """Mean loss."""
    return reference.mlp_value_and_grad(params, batch)[0]


def first(params: Leaves) -> Step:
    """What there is before the first step."""
    zero = zeros(params)
    norms = dict.fromkeys(LAYERS, 0.0)
    squares = {name: leaf + LIGHT["delta"] ** 2 for name, leaf in zero.items()}
    return Step(
        params=params,
        value=0,
        perturbed_value=0,
        ascent_value=None,
        reported=params,
        norms=norms,
        known=norms,
        rho=0,
        velocity=zero,
        update=zero,
        trace=zero,
        mean=zero,
        squares=squares,
        across=zero,
    )


def layers_of(parts: Parts, number: int, last: Step) -> tuple[str, ...] | None:
    """The layers of a step; None where they are drawn."""
    if not WHEN[parts.when][number] or parts.which == "nothing":
        return ()
    if parts.which in ("random_k", "bandit"):
        return None
    if parts.which == "top_k":
        return reference.top_k(last.known, 1)
    if parts.which == "named":
        return tuple(name for name in LAYERS if name in ("a_out", "m_mid"))
    if parts.which == "function":
        bound = 0.9 * max(last.known.values())
        return tuple(name for name in LAYERS if last.known[name] >= bound)
    return tuple(LAYERS)


def blocks(ascent: str) -> list[slice]:
    """The examples that an ascent may see: blocks at multiples of their number."""
    if ascent not in COUNTS:
        return [slice(0, SIZE)]
    count = COUNTS[ascent]
    offsets = range(0, 1 if ascent == "function" else SIZE - count + 1, count)
    return [slice(offset, offset + count) for offset in offsets]


def step(
    parts: Parts,
    last: Step,
    batch: Any,
    layers: Collection[str],
    rows: slice,
    noise: Leaves,
    mask: Leaves | None = None,
) -> Step:
    """One step.

    Args:
      parts: The combination.
      last: The step before.
      batch: Inputs and labels.
      layers: Those that this step perturbs; none: a plain step.
      rows: The examples of the ascent.
      noise: What `random` draws, or the vector of `differences`.
      mask: The elements that `sparse` leaves, 1 and 0.
    """
    w = last.params
    part = family.rows_of(batch, rows)
    if not layers:
        taken = _plain(parts, last, batch)
        if parts.when == "gate" and parts.which != "nothing":  # it saw an ascent
            return taken._replace(ascent_value=loss(w, part))
        return taken
    names = [leaf for name in layers for leaf in LAYERS[name]]
    direction, ascent_value = _direction(parts, last, part, batch, noise, names)
    pair = parts.combine == "flatness"
    if pair:
        g0, g1 = direction, GRADIENT(_along(w, direction, names), part)
        direction = added(g1, -1.0, g0)
    epsilon, kept = _perturbation(parts, last, direction, names)
    if parts.shape == "sparse":
        epsilon = {name: mask[name] * leaf for name, leaf in epsilon.items()}
    point = added(w, 1.0, epsilon)
    perturbed_value = loss(point, batch)
    seen = batch
    if parts.descent == "sharpest":
        rise = LOSSES(point, batch) - LOSSES(w, batch)
        order = np.argsort(-rise, kind="stable")
        seen = family.rows_of(batch, np.sort(order[: int(SHARE * len(order))]))
    descent, rest = GRADIENT(point, seen), zeros(w)
    if parts.descent.startswith("weighed"):
        descent = weighed_gradient(point, batch, _bent)
    if parts.descent == "weighed thrice":
        rest = weighed_gradient(w, batch, _others)
    update, across, late, moves = descent, last.across, None, None
    norms = _norms(added(descent, 1.0, rest))
    known = norms
    if parts.combine == "descend_on_selected":
        update, moves = only(descent, names), names
        norms = {name: norms[name] * (name in layers) for name in norms}
        known = {n: x if n in layers else last.known[n] for n, x in norms.items()}
    if parts.combine == "decoupled":
        update = direction
        late = scaled(ALPHA["decoupled"], added(descent, -1.0, direction))
    elif pair:
        g3 = GRADIENT(_along(point, descent, names), batch)
        p = added(g0, abs(1 - FLATNESS["beta0"]), descent)
        q = added(scaled(FLATNESS["beta1"], g1), 1 - FLATNESS["beta1"], g3)
        update = added(q, -FLATNESS["gamma"], family.without(p, q))
    elif not parts.is_stale and moves is None:
        update, across = _combined(parts, last, direction, descent, names)
    is_whole = parts.ascent == "whole_batch"
    return _finished(
        last,
        added(update, 1.0, rest),
        late=late,
        moves=moves,
        value=loss(w, batch) if is_whole else perturbed_value,
        perturbed_value=perturbed_value,
        ascent_value=ascent_value,
        reported=w if is_whole else point,
        norms=norms,
        known=known,
        rho=parts.rho,
        across=across,
        **kept,
    )


def weighed_gradient(w: Leaves, batch: Any, slopes: Slopes) -> Leaves:
    """The gradient of a mean over functions of the losses, example by example."""
    factors = slopes(LOSSES(w, batch), batch[1])
    total = zeros(w)
    for i, factor in enumerate(factors):
        one = GRADIENT(w, family.rows_of(batch, [i]))
        total = added(total, factor / len(factors), one)
    return total


def _bent(losses: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return 1 + BEND * losses


def _own(losses: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.array(CLASSES)[labels]


def _others(losses: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return 1 - np.array(CLASSES)[labels]


def _along(point: Leaves, gradient: Leaves, names: Sequence[str]) -> Leaves:
    """A point moved along its gradient by the second radius, in the perturbed leaves."""
    return added(point, 1.0, family.to_norm(FLATNESS["radius"], only(gradient, names)))


def _plain(parts: Parts, last: Step, batch: Any) -> Step:
    w = last.params
    g = GRADIENT(w, batch)
    update = g
    if parts.combine == "reuse":
        inside = only(g, MEMBERS)
        share = over(WEIGHT * norm_of(inside.values()), norm_of(last.across.values()))
        update = added(g, share, last.across)
    value = loss(w, batch)
    return _finished(
        last,
        update,
        value=value,
        perturbed_value=value,
        ascent_value=None if parts.is_stale else value,
        reported=w,
        norms=_norms(g),
        known=_norms(g),
        rho=0.0,
        across=last.across,
        **_kept(last),
    )


def _kept(last: Step) -> dict[str, Leaves]:
    """What a shape keeps from step to step."""
    return {"trace": last.trace, "mean": last.mean, "squares": last.squares}


def _finished(
    last: Step,
    update: Leaves,
    late: Leaves | None = None,
    moves: Sequence[str] | None = None,
    **found: Any,
) -> Step:
    velocity = added(update, MOMENTUM, last.velocity)
    if moves is not None:  # all others keep their velocity, and stand still
        still = [name for name in velocity if name not in moves]
        velocity |= {name: last.velocity[name] for name in still}
        params = added(last.params, -RATE, only(velocity, moves))
        return Step(params=params, velocity=velocity, update=update, **found)
    params = added(last.params, -RATE, velocity)
    if late is not None:
        params = added(params, -RATE, late)
    return Step(params=params, velocity=velocity, update=update, **found)


def _norms(gradient: Leaves) -> dict[str, float]:
    return {
        name: norm_of(gradient[leaf] for leaf in leaves)
        for name, leaves in LAYERS.items()
    }


def _direction(
    parts: Parts,
    last: Step,
    part: Any,
    batch: Any,
    noise: Leaves,
    names: Sequence[str],
) -> tuple[Leaves, float | None]:
    """What the perturbation is formed from, for all leaves; the loss on the way."""
    if parts.ascent == "momentum":
        return scaled(-1.0, last.velocity), None
    if parts.ascent == "previous":
        return last.update, None
    if parts.ascent == "random":
        return noise, None
    w = last.params
    if parts.ascent == "differences":  # of the loss along the leaves that move
        ahead, behind = (
            loss(added(w, mu, only(noise, names)), batch) for mu in (MU, -MU)
        )
        return scaled((ahead - behind) / (2 * MU), noise), None
    if parts.descent == "weighed thrice":
        return weighed_gradient(w, part, _own), loss(w, part)
    return GRADIENT(w, part), loss(w, part)


def _perturbation(
    parts: Parts, last: Step, direction: Leaves, names: Sequence[str]
) -> tuple[Leaves, dict[str, Leaves]]:
    """The perturbation, and what the shape keeps: of each leaf while it is perturbed."""
    w, kept = last.params, _kept(last)
    if parts.shape == "chain":  # a trace of what each leaf had, then a norm of 1
        direction = added(direction, DECAY, last.trace)
        kept["trace"] = last.trace | only_of(direction, names)
    if parts.shape == "light":  # Adam's scale, without its corrections
        b1, b2 = LIGHT["b1"], LIGHT["b2"]
        mean = added(scaled(b1, last.mean), 1 - b1, direction)
        squared = {name: g**2 for name, g in direction.items()}
        squares = added(scaled(b2, last.squares), 1 - b2, squared)
        kept["mean"] = last.mean | only_of(mean, names)
        kept["squares"] = last.squares | only_of(squares, names)
        direction = {name: mean[name] / np.sqrt(squares[name]) for name in mean}
    shapes = {
        "raw": family.raw(),
        "normalized": family.normalized(),
        "normalized all": family.normalized(over_all=True),
        "adaptive": family.adaptive(ETA),
        "relative layer": family.relative_to_layers(LAYERS),
        "relative filter": family.relative_to_filters(MEMBERS),
        "proportional filter": family.proportional_to_filters(),
        "proportional rms": family.proportional_to_filters(is_mean=True),
        "proportional element": family.proportional_to_elements(),
        "chain": family.normalized(),
        "sparse": family.normalized(),
        "light": family.raw(),
    }
    return scaled(parts.rho, shapes[parts.shape](w, direction, names)), kept


def only_of(leaves: Leaves, names: Sequence[str]) -> Leaves:
    """These leaves alone."""
    return {name: leaves[name] for name in names}


def _combined(
    parts: Parts, last: Step, ascent: Leaves, descent: Leaves, names: Sequence[str]
) -> tuple[Leaves, Leaves]:
    """What the base optimizer gets, and what `reuse` keeps."""
    if parts.combine == "surrogate_gap":
        across = family.without(ascent, descent)
        return added(descent, -ALPHA["surrogate_gap"], across), last.across
    if parts.combine == "match_norm":
        size = norm_of(ascent.values())
        return scaled(over(size, norm_of(descent.values())), descent), last.across
    inside, above = only(descent, names), only(ascent, names)
    if parts.combine == "reuse":
        return descent, family.without(inside, above)
    if parts.combine == "mix":
        mixed = added(scaled(1 - ALPHA["mix"], above), ALPHA["mix"], inside)
    elif parts.combine == "function":  # the ascent gradient at the descent's length
        length = over(norm_of(inside.values()), norm_of(above.values()))
        mixed = scaled(0.5, added(inside, length, above))
    else:
        mixed = inside
    return {n: mixed[n] if n in names else leaf for n, leaf in descent.items()}, (
        last.across
    )
