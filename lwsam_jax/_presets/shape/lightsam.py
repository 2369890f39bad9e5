"""LightSAM: the perturbation has adaptive scales, as the step of the optimizer has."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import _checks, _tree
from ..._axes import which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


class LightScaleState(NamedTuple):
    """State of `light_scale`: a mean of gradients (III) or (), and of their squares."""

    mean: Any
    squares: Any


def light_scale(
    variant: str = "III", *, b1: float = 0.9, b2: float = 0.999, delta: float = 1e-8
) -> optax.GradientTransformation:
    r"""Returns LightSAM's transformation of gradients, for the ascent and the descent.

    * I, AdaGrad-Norm: $u \leftarrow u + \|g\|^2$, to $g / \sqrt u$;
    * II, AdaGrad: $u \leftarrow u + g^2$, to $g / \sqrt u$, for each element;
    * III, Adam: $r \leftarrow \beta_1 r + (1 - \beta_1) g$ and
      $u \leftarrow \beta_2 u + (1 - \beta_2) g^2$, to $r / \sqrt u$, for each element.

    No bias is corrected; $u_0 = \delta^2$ and $r_0 = 0$.

    Args:
      variant: `"I"`, `"II"` or `"III"`.
      b1: $\beta_1$ of variant III, in [0, 1).
      b2: $\beta_2$ of variant III, in [0, 1).
      delta: $\delta$, > 0.

    Raises:
      ValueError: For arguments out of range.

    Examples:
      >>> import optax, lwsam_jax as lwsam
      >>> base = optax.chain(lwsam.light_scale("II"), optax.scale(-0.01))

    References:
      Cheng et al., LightSAM, 2025, arXiv:2505.24399; see `lightsam`.
    """
    _checks.choice("light_scale", "variant", variant, ("III", "II", "I"))
    for name, x in (("b1", b1), ("b2", b2)):
        if not _checks.is_number(x) or not 0 <= x < 1:
            remedy = "0.9 and 0.999 are those of Adam."
            raise _checks.value_error("light_scale", name, "in [0, 1)", repr(x), remedy)
    if not _checks.is_number(delta) or delta <= 0:
        remedy = "1e-8 is the paper's."
        raise _checks.value_error("light_scale", "delta", "> 0", repr(delta), remedy)
    if variant == "I":
        return _by_one_norm(delta)
    # AdaGrad's sum has both weights 1, and no mean.
    old, new = (b2, 1 - b2) if variant == "III" else (1.0, 1.0)
    return _by_elements(b1 if variant == "III" else None, old, new, delta)


def _by_one_norm(delta: float) -> optax.GradientTransformation:
    def init(params):
        dtype = _tree.accumulation_dtype(*jax.tree.leaves(params))
        return LightScaleState((), jnp.full((), delta**2, dtype))

    def update(updates, state, params=None):
        del params
        found = jax.tree.leaves(updates)
        squares = state.squares + _tree.norm(found, state.squares.dtype) ** 2
        scale = _tree.reciprocal(jnp.sqrt(squares))
        zero = jax.tree.map(jnp.zeros_like, updates)
        scaled = jax.tree.map(lambda z, g: _tree.add_scaled(z, scale, g), zero, updates)
        return scaled, LightScaleState((), squares)

    return optax.GradientTransformation(init, update)


def _by_elements(
    b1: float | None, old: float, new: float, delta: float
) -> optax.GradientTransformation:
    def init(params):
        wide = jax.tree.map(_tree.wide, params)
        mean = () if b1 is None else jax.tree.map(jnp.zeros_like, wide)
        squares = jax.tree.map(lambda w: jnp.full_like(jnp.real(w), delta**2), wide)
        return LightScaleState(mean, squares)

    def update(updates, state, params=None):
        del params
        wide = jax.tree.map(_tree.wide, updates)
        squares = jax.tree.map(
            lambda u, g: old * u + new * jnp.abs(g) ** 2, state.squares, wide
        )
        if b1 is not None:
            average = lambda r, g, b1=b1: b1 * r + (1 - b1) * g
            wide = jax.tree.map(average, state.mean, wide)
        scaled = jax.tree.map(
            lambda r, u, g: (r * _tree.reciprocal(jnp.sqrt(u))).astype(g.dtype),
            wide,
            squares,
            updates,
        )
        return scaled, LightScaleState(() if b1 is None else wide, squares)

    return optax.GradientTransformation(init, update)


def lightsam(
    rho: Any,
    variant: str = "III",
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    delta: float = 1e-8,
    **parts: Any,
) -> Method:
    r"""Returns LightSAM: $\epsilon = \rho\,s(g)$ with an adaptive scale, $d = \hat g$.

    $s$ is `light_scale(variant)`: AdaGrad-Norm (I), AdaGrad (II) or Adam (III) of the
    ascent gradients, with sums of its own that persist. The base optimizer is meant to
    be the same transformation of the descent gradients:
    `optax.chain(lwsam.light_scale(variant), optax.scale(-learning_rate))`.

    Args:
      rho: Radius, >= 0, a number or a schedule; no published one is confirmed. Of
        variant III it is nearly the step of each element, so that it is small.
      variant: `"I"`, `"II"` or `"III"`.
      b1: $\beta_1$ of variant III.
      b2: $\beta_2$ of variant III.
      delta: $\delta$.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `light_scale`, `descend()`.

    Raises:
      ValueError: For arguments out of range.

    References:
      Cheng et al., 2025, arXiv:2505.24399; two secondary sources agree on the formulas.
      The defaults of rho and of both decays are not confirmed.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=light_scale(variant, b1=b1, b2=b2, delta=delta),
        rule=leaves,
    )
