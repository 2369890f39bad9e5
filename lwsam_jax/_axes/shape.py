r"""HOW the perturbation is formed: an Optax transformation of the ascent direction.

The perturbation is $\epsilon = \rho\,s(a)$ for the ascent direction $a$ (most often the
gradient) and a shape $s$. A shape is an `optax.GradientTransformationExtraArgs`. It gets
the whole tree in at least float32, zero where nothing is perturbed, the parameters, and
two more arguments: `layers`, the `lwsam.Layers`, and `mask`, bool[L], the layers that
are perturbed. Its state persists; that of leaves which a step did not see stays. Any
Optax transformation will do, and `optax.chain` composes them.

The same arguments give the same object: a state that names its shape stays the same one
where an optimizer is made anew in each step (`optax.inject_hyperparams`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _tree
from .._engine.layers import Layers
from .._engine.rules import is_bias, slice_of


class WholeAscent(NamedTuple):
    """State of a shape that reads the ascent gradient of every leaf.

    It says so in its state, where it is also found inside an `optax.chain`.
    """


class LeafFactors(optax.GradientTransformationExtraArgs):
    """A shape that multiplies each leaf by factors: it can be undone from these.

    Attributes:
      factors: `factors(direction, params, layers) -> [factor]`, one real array for each
        leaf that broadcasts against it.
      of_layers: Whether leaves that belong to no layer never move.
    """

    factors: Callable[[list[Any], list[Any], Layers], list[jax.Array]]
    of_layers: bool

    def __new__(
        cls, factors: Any, state: Any = None, of_layers: bool = False
    ) -> LeafFactors:
        """Makes the transformation of the factors."""
        state = optax.EmptyState() if state is None else state

        def update(updates, state, params=None, *, layers=None, mask=None, **extra):
            del extra
            leaves, treedef = jax.tree.flatten(updates)
            if not isinstance(state, WholeAscent):
                leaves = perturbed_part(leaves, layers, mask)
            found = factors(leaves, leaves_of(params, leaves), layers)
            moved = [f * x for f, x in zip(found, leaves, strict=True)]
            return jax.tree.unflatten(treedef, moved), state

        made = super().__new__(cls, lambda params: state, update)
        made.factors, made.of_layers = factors, of_layers
        return made


@functools.cache
def raw() -> optax.GradientTransformationExtraArgs:
    r"""Returns the shape $s(a) = a$ (Lee 2024, Eq. 3, 6): the radius follows $\|a\|$."""
    return LeafFactors(lambda leaves, params, layers: [_ones(x, ()) for x in leaves])


@functools.cache
def normalized(over: str = "selected") -> optax.GradientTransformationExtraArgs:
    r"""Returns the shape $s(a) = a / \|a\|$, 0 where $a = 0$.

    Args:
      over: `"selected"`: the norm is over the perturbed leaves, so that
        $\|\epsilon\| = \rho$ (SAM, Foret et al., ICLR 2021, arXiv:2010.01412, Eq. 2).
        `"all"`: over all leaves, perturbed or not, at the price of a whole ascent
        gradient; then $\|\epsilon\| \le \rho$.

    Raises:
      ValueError: For another `over`.
    """
    _checks.choice("normalized", "over", over, ("selected", "all"))

    def factors(leaves, params, layers):
        del params, layers
        scale = _tree.reciprocal(_tree.norm(leaves))
        return [like(scale, x) for x in leaves]

    return LeafFactors(factors, WholeAscent() if over == "all" else None)


@functools.cache
def adaptive(
    eta: float = 0.01, *, biases: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Returns the shape $s(a) = T^2 a / \|T a\|$ with $T = |w| + \eta$ (ASAM).

    Elements move in proportion to their size: $\|T^{-1} \epsilon\| = \rho$.

    Args:
      eta: Added to $|w|$, >= 0. With 0 an element that is 0 never moves.
      biases: Whether biases are scaled too; False has $T = 1$ for them, as the authors'
        code.

    Raises:
      ValueError: For an eta out of range.

    References:
      Kwon et al., ASAM, ICML 2021, arXiv:2102.11600.
    """
    _checks.non_negative("adaptive", "eta", eta, "0.01 is the paper's value.")

    def update(updates, state, params=None, *, layers=None, mask=None, **extra):
        del extra
        leaves, treedef = jax.tree.flatten(updates)
        leaves = perturbed_part(leaves, layers, mask)
        own = [jnp.abs(_tree.wide(w)) + eta for w in leaves_of(params, leaves)]
        if not biases:
            named = jax.tree_util.tree_leaves_with_path(params)
            stacks = [None] * len(own) if layers is None else layers.stacks
            rows = zip(own, named, stacks, strict=True)
            own = [
                jnp.ones_like(t) if is_bias(path, _slice_of(w, stack)) else t
                for t, (path, w), stack in rows
            ]
        scaled = [t * x for t, x in zip(own, leaves, strict=True)]
        scale = _tree.reciprocal(_tree.norm(scaled))
        moved = [like(scale, x) * t * x for t, x in zip(own, scaled, strict=True)]
        return jax.tree.unflatten(treedef, moved), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


@functools.cache
def relative(per: str = "layer") -> optax.GradientTransformationExtraArgs:
    r"""Returns the shape $s(a)_l = \|w_l\|\,a_l / \|a_l\|$: a radius without a unit.

    $\rho$ is the share of its own norm by which a layer moves. A change of weight decay,
    of width or of network moves the best radius least (docs: The radius). Leaves that
    belong to no layer stay, and so does a layer whose weights are all 0.

    Args:
      per: `"layer"`, or `"filter"`: the same for each slice of a leaf's last axis, its
        outputs; leaves of rank below 2 as a whole.

    Raises:
      ValueError: For another `per`.
    """
    _checks.choice("relative", "per", per, ("layer", "filter"))

    def of_filters(leaves, params, layers):
        found = [like(jnp.zeros(()), x) for x in leaves]
        for i in layers.member_leaves:
            stack = layers.stacks[i]
            weights = norm_of_slices(params[i], stack)
            found[i] = weights * _tree.reciprocal(norm_of_slices(leaves[i], stack))
        return found

    def of_layers(leaves, params, layers):
        found = [like(jnp.zeros(()), x) for x in leaves]
        for places in layers.groups:
            weights, size = (layers.norm(xs, places) for xs in (params, leaves))
            factor = weights.astype(size.dtype) * _tree.reciprocal(size)
            for i in places:
                found[i] = layers.spread(like(factor, leaves[i]), i)
        return found

    return LeafFactors(of_layers if per == "layer" else of_filters, of_layers=True)


# What the argument `normalize` of the paper's preset calls them.
BY_NORMALIZE = {
    "none": raw,
    "selected": normalized,
    "full": lambda: normalized("all"),
}


def wants_whole_ascent(shape: Any, params: Any) -> bool:
    """Returns whether a shape reads the ascent gradient of every leaf."""
    state = jax.eval_shape(shape.init, params)
    is_sign = lambda x: isinstance(x, WholeAscent)
    return any(map(is_sign, jax.tree.leaves(state, is_leaf=is_sign)))


def keep_unseen(new: Any, old: Any, params: Any, seen: list[Any]) -> Any:
    """Returns a new state with the old leaves of what a step did not see.

    Args:
      new: State after the update.
      old: State before it.
      params: Parameter tree; parts of a state that are structured as it belong to it.
      seen: For each of its leaves True, False, or bool[]; of a stack for each index.
    """
    if all(s is True for s in seen):
        return new
    treedef = jax.tree.structure(params)
    is_ours = lambda x: jax.tree.structure(x) == treedef

    def pick(a, b):
        if not is_ours(a):
            return a
        rows = zip(seen, jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return jax.tree.unflatten(treedef, [leaf(*row) for row in rows])

    def leaf(s, x, y):
        # Some indices of a stack may be seen; a state of another rank has no indices.
        is_whole = jnp.ndim(s) in (0, jnp.ndim(x))
        return jnp.where(s if is_whole else jnp.any(s), x, y)

    return jax.tree.map(pick, new, old, is_leaf=is_ours)


def check(who: str, shape: Any) -> None:
    """Raises unless a shape is an Optax transformation."""
    if not (hasattr(shape, "init") and hasattr(shape, "update")):
        remedy = "Pass lwsam.raw(), normalized(), adaptive(), relative(), or any other."
        expected = "an Optax transformation"
        raise _checks.type_error(who, "shape", expected, repr(shape), remedy)


def leaves_of(params: Any, leaves: list[Any]) -> list[Any]:
    found = jax.tree.leaves(params)
    if len(found) != len(leaves):
        remedy = "Call update(direction, state, params, layers=layers, mask=mask)."
        got = f"{len(found)} leaves"
        expected = f"the parameters, {len(leaves)} leaves"
        raise _checks.value_error("shape", "params", expected, got, remedy)
    return found


def perturbed_part(leaves: list[Any], layers: Any, mask: Any) -> list[Any]:
    """Returns the leaves, 0 where nothing is perturbed.

    They are so when they come, but behind a part with a state, such as an average.
    """
    if layers is None or mask is None:
        return leaves
    return [
        jnp.where(layers.at_leaf(mask, i), x, 0) if at >= 0 else jnp.zeros_like(x)
        for i, (at, x) in enumerate(zip(layers.leaf_layer, leaves, strict=True))
    ]


def norm_of_slices(x: jax.Array, stack: Any = None) -> jax.Array:
    """Returns the norms over all axes but the last; of rank below 2, over all.

    Of a stack the same for each index.
    """
    x = jnp.abs(_tree.wide(x))
    axes = [i for i in range(x.ndim) if stack is None or i != stack.axis]
    axes = axes[:-1] if len(axes) > 1 else axes
    keep = x.ndim > 1
    return _tree.root(jnp.sum(x**2, axis=tuple(axes), keepdims=keep))


def _slice_of(leaf: Any, stack: Any) -> Any:
    return leaf if stack is None else slice_of(leaf, stack.axis)


def like(scale: jax.Array, x: jax.Array) -> jax.Array:
    """Casts a scalar to the real precision of a leaf."""
    return scale.astype(_tree.accumulation_dtype(x))


def _ones(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, _tree.accumulation_dtype(x))
