r"""WHAT the base optimizer gets, from the ascent gradient $g$ and the descent gradient.

A function of one's own is `(ascent, descent) -> gradient`, on tuples of the leaves that
are perturbed; all other leaves get the descent gradient. A `Combine` says more: which
ascent gradients it needs, what it remembers, and what steps without an ascent do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .which import everything


Leaves = tuple[jax.Array, ...]


class Combine(NamedTuple):
    r"""How both gradients become the one that the base optimizer gets.

    Attributes:
      update: `update(ascent, descent, state, alpha) -> (gradient, state)`, on tuples of
        leaves.
      needs: Which ascent gradients it reads: `"none"`, `"selected"` (those of the
        perturbed leaves, and only these are given and returned) or `"all"`.
      alpha: A weight that a loop may set, a number or a schedule of the step count; it
        is `state.hyperparams["alpha"]`. None: there is none.
      init: `init(leaves) -> state` from the leaves that may be perturbed.
      otherwise: `otherwise(gradient, state) -> gradient`, in steps without an ascent, on
        the leaves that may be perturbed; None leaves the gradient as it is.
      everywhere: Whether it is right only where every layer is perturbed.
      late: `late(ascent, descent, alpha) -> leaves`, on the leaves that `update` gets:
        what the parameters lose after the base optimizer's step, times its learning
        rate. `TrainStep` only.
      learning_rate: That rate, a number or a schedule of the step count.
      freezes: Whether leaves that a step does not perturb stand still in it: they have
        no gradient, and the base optimizer leaves them and their moments alone.
        `TrainStep` only.
      pair: A radius r: each pass takes a second gradient, r along the first one; the
        perturbation is then along the difference of the two, and `update` gets the
        leaves of both, those of the first ahead. None: each pass takes one.
    """

    update: Callable[[Leaves, Leaves, Any, Any], tuple[Leaves, Any]]
    needs: str = "selected"
    alpha: Any = None
    init: Callable[[Leaves], Any] = lambda leaves: ()
    otherwise: Callable[[Leaves, Any], Leaves] | None = None
    everywhere: bool = False
    late: Callable[[Leaves, Leaves, Any], Leaves] | None = None
    learning_rate: Any = None
    freezes: bool = False
    pair: float | None = None

    def refuse(self, who: str, method: Any) -> None:
        """Raises where the other parts of a method do not give what it needs."""
        if self.needs != "none" and method.is_stale:
            remedy = (
                "Pass combine=lwsam.descend(), or an ascent with a pass of its own: "
                "whole_batch() or micro_batch()."
            )
            expected = "one that needs no ascent gradient, for this ascent takes none"
            got = f"one that needs {self.needs!r}"
            raise _checks.value_error(who, "combine", expected, got, remedy)
        for name in ("descent", "gate") if self.pair is not None else ():
            if getattr(method, name) is not None:
                remedy = f"Pass combine=lwsam.descend(), or leave the {name} out."
                expected = "one that takes one gradient of each pass"
                got = "one that takes two"
                raise _checks.value_error(who, "combine", expected, got, remedy)
        budget = (method.max_overhead, method.mean_overhead) != (None, None)
        if self.everywhere and (method.select is not everything() or budget):
            remedy = "Pass select=lwsam.everything() and no budget."
            got = "another selection" if not budget else "a budget"
            expected = "one for some layers, or `select` everything()"
            raise _checks.value_error(who, "combine", expected, got, remedy)


def as_combine(who: str, combine: Any) -> Combine:
    """Returns a `Combine` of what a user may pass; raises on what is none."""
    if isinstance(combine, Combine):
        _checks.choice(who, "combine.needs", combine.needs, ("none", "selected", "all"))
        if combine.alpha is not None:
            _checks.alpha(who, combine.alpha)
        return combine
    remedy = "Pass lwsam.descend(), lwsam.mix(alpha), or a function (ascent, descent)."
    _checks.is_callable(who, "combine", combine, remedy)
    return Combine(lambda g, d, state, alpha: (tuple(combine(g, d)), state))


def descend() -> Combine:
    r"""Returns $d = \hat g$, the gradient at the perturbed point: SAM."""
    return _DESCEND


def descend_on_selected() -> Combine:
    r"""Returns $d = \hat g$ on the perturbed leaves; all others stand still in the step.

    So the descent's backward pass, too, stops at the input-most of them. The base
    optimizer leaves what stands still alone, moments and all. `TrainStep` only.
    """
    return _ON_SELECTED


def mix(alpha: Any) -> Combine:
    r"""Returns $d = (1 - \alpha)\,g + \alpha\,\hat g$ on the perturbed leaves.

    Args:
      alpha: Weight of the descent gradient, >= 0, a number or a schedule of the step
        count. A Python 1 is `descend()`; above 1 it extrapolates (WSAM).

    Raises:
      ValueError: For an alpha out of range.

    References:
      Lee, KDD 2024, arXiv:2503.14205, Eq. 6; Zhao et al., ICML 2022, arXiv:2202.03599.
    """
    _checks.alpha("mix", alpha)
    if _checks.is_number(alpha) and alpha == 1:
        return _DESCEND

    def update(ascent, descent, state, weight):
        weight = jnp.asarray(weight)
        pairs = zip(ascent, descent, strict=True)
        return tuple(_tree.mix(g, d, weight) for g, d in pairs), state

    return Combine(update, alpha=alpha)


def surrogate_gap(alpha: Any) -> Combine:
    r"""Returns $d = \hat g - \alpha\,g_\perp$ with $g_\perp \perp \hat g$ (GSAM).

    $g_\perp = g - \langle g, \hat g\rangle\,\hat g / \|\hat g\|^2$ over all leaves: it
    needs the ascent gradient of every leaf.

    Args:
      alpha: Weight, >= 0, a number or a schedule of the step count. A Python 0 is
        `descend()`.

    References:
      Zhuang et al., ICLR 2022, arXiv:2203.08065.
    """
    _checks.non_negative("surrogate_gap", "alpha", alpha, "0.4 and 0.6 are published.")
    if _checks.is_number(alpha) and alpha == 0:
        return _DESCEND

    def update(ascent, descent, state, weight):
        across = orthogonal_part(descent, ascent)
        scale = -jnp.asarray(weight)
        pairs = zip(descent, across, strict=True)
        return tuple(_tree.add_scaled(d, scale, x) for d, x in pairs), state

    return Combine(update, needs="all", alpha=alpha)


def match_norm() -> Combine:
    r"""Returns $d = (\|g\| / \|\hat g\|)\,\hat g$, with both norms over all leaves.

    It needs the ascent gradient of every leaf. Where $\hat g = 0$, so is $d$.

    References:
      Stable SAM, Tan et al., JMLR, arXiv:2401.07250.
    """
    return _MATCH_NORM


def _match_norm(ascent: Leaves, descent: Leaves, state: Any, alpha: Any) -> Any:
    del alpha
    dtype = _tree.accumulation_dtype(*ascent, *descent)
    scale = _tree.norm(ascent, dtype) * _tree.reciprocal(_tree.norm(descent, dtype))
    zero = lambda x: jnp.zeros_like(x)
    return tuple(_tree.add_scaled(zero(x), scale, x) for x in descent), state


def decoupled(alpha: Any, learning_rate: Any) -> Combine:
    r"""Returns $d = g$; the base optimizer does not see $\alpha\,(\hat g - g)$.

    After its step $w \leftarrow w - \eta\,\alpha\,(\hat g - g)$, past its momentum and
    its scales. It needs the ascent gradient of every leaf, and `TrainStep`.

    Args:
      alpha: Weight, >= 0, a number or a schedule of the step count.
      learning_rate: $\eta$, that of the base optimizer, a number or its schedule.

    Raises:
      ValueError: For numbers out of range.
      TypeError: Without a learning rate.

    References:
      WSAM, Yue et al., KDD 2023, arXiv:2305.15817.
    """
    remedy = "Its weight is that of the sharpness; WSAM's is gamma / (1 - gamma)."
    _checks.non_negative("decoupled", "alpha", alpha, remedy)
    remedy = "Pass the learning rate of the base optimizer, or its schedule."
    _checks.non_negative("decoupled", "learning_rate", learning_rate, remedy)

    def update(ascent, descent, state, weight):
        del descent, weight
        return ascent, state

    def late(ascent, descent, weight):
        weight = jnp.asarray(weight)
        scaled = lambda x: weight.astype(jnp.real(x).dtype) * x
        pairs = zip(ascent, descent, strict=True)
        return tuple(scaled(_tree.wide(d) - _tree.wide(g)) for g, d in pairs)

    return Combine(
        update, needs="all", alpha=alpha, late=late, learning_rate=learning_rate
    )


def flatness(radius: float, beta0: float, beta1: float, gamma: float) -> Combine:
    r"""Returns GAM's combination of four gradients.

    With $g_1$ at $w + r\,g_0 / \|g_0\|$ and $g_3$ at $\hat w + r\,g_2 / \|g_2\|$ for the
    gradients $g_0$ at $w$ and $g_2$ at the perturbed $\hat w$, which goes along
    $g_1 - g_0$: $d = q - \gamma\,(p - \langle p, q\rangle\,q / \|q\|^2)$ with
    $p = g_0 + |1 - \beta_0|\,g_2$ and $q = \beta_1 g_1 + (1 - \beta_1)\,g_3$.

    Args:
      radius: $r$, >= 0.
      beta0: $\beta_0$.
      beta1: $\beta_1$.
      gamma: $\gamma$, >= 0.

    Raises:
      ValueError: For numbers out of range.

    References:
      Zhang et al., CVPR 2023, arXiv:2303.03108; see `gam`.
    """
    _checks.non_negative("flatness", "radius", radius, "0.02 is a published value.")
    _checks.non_negative("flatness", "gamma", gamma, "0.03 is a published value.")
    for name, x in (("beta0", beta0), ("beta1", beta1)):
        if not _checks.is_number(x) or not math.isfinite(x):
            remedy = "Pass a number such as 0.5."
            raise _checks.value_error("flatness", name, "finite", repr(x), remedy)

    def update(ascent, descent, state, alpha):
        del alpha
        half = len(ascent) // 2
        g0, g1, g2, g3 = ascent[:half], ascent[half:], descent[:half], descent[half:]
        plus = lambda xs, ys, factor: tuple(
            _tree.add_scaled(x, jnp.asarray(factor), y)
            for x, y in zip(xs, ys, strict=True)
        )
        p = plus(g0, g2, abs(1 - beta0))
        q = tuple(
            _tree.mix(c, a, jnp.asarray(beta1)) for a, c in zip(g1, g3, strict=True)
        )
        return plus(q, orthogonal_part(q, p), -gamma), state

    return Combine(update, needs="all", pair=float(radius))


def reuse(weight: float) -> Combine:
    r"""Returns SAM's gradient, and $g + a\,(\|g\| / \|g_v\|)\,g_v$ between the ascents.

    $g_v = \hat g - \langle\hat g, g\rangle\,g / \|g\|^2$ is kept from the last ascent:
    one copy of the leaves that are perturbed, 0 at first. The norms are over all of
    these, so every layer must be selected.

    Args:
      weight: $a$, a number >= 0.

    References:
      LookSAM, Liu et al., CVPR 2022, arXiv:2203.02714.
    """
    _checks.non_negative("reuse", "weight", weight, "0.7 is a published value.")

    def update(ascent, descent, state, alpha):
        del state, alpha
        across = orthogonal_part(ascent, descent)
        # What is left of parallel gradients is rounding; between, it would be scaled up.
        dtype = _tree.accumulation_dtype(*descent)
        noise = _ROUNDING * max(float(jnp.finfo(x.dtype).eps) for x in descent)
        size = _tree.norm(across, dtype)
        is_real = size > noise * _tree.norm(descent, dtype)
        return descent, tuple(jnp.where(is_real, v, 0) for v in across)

    def otherwise(grads, stored):
        dtype = _tree.accumulation_dtype(*grads, *stored)
        scale = jnp.asarray(weight).astype(dtype) * _tree.norm(grads, dtype)
        scale = scale * _tree.reciprocal(_tree.norm(stored, dtype))
        pairs = zip(grads, stored, strict=True)
        return tuple(_tree.add_scaled(g, scale, v) for g, v in pairs)

    init = lambda leaves: tuple(jnp.zeros_like(x) for x in leaves)
    return Combine(update, init=init, otherwise=otherwise, everywhere=True)


def orthogonal_part(onto: Leaves, x: Leaves) -> Leaves:
    r"""Returns $x - \langle x, o\rangle\,o / \|o\|^2$ over all leaves, x if $o = 0$."""
    dtype = _tree.accumulation_dtype(*onto, *x)
    scale = _tree.reciprocal(_tree.norm(onto, dtype))
    # One division after the other: a square of a small norm has no reciprocal.
    share = (_tree.inner(x, onto, dtype) * scale) * scale
    pairs = zip(onto, x, strict=True)
    return tuple(_tree.add_scaled(b, -share, a) for a, b in pairs)


_ROUNDING = 8.0
_DESCEND = Combine(lambda ascent, descent, state, alpha: (descent, state), needs="none")
_MATCH_NORM = Combine(_match_norm, needs="all")
_ON_SELECTED = _DESCEND._replace(freezes=True)
