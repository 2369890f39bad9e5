"""Flat-LoRA: noise on frozen weights, in proportion to what the adapters make of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ... import _checks, _tree
from ..._axes import ascent, which
from ..._axes.proportional import size_of_filters
from ..._axes.shape import LeafFactors, like
from ..._engine.layers import Layers
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


_WHO = "flat_lora"


@dataclasses.dataclass(frozen=True)
class _Frozen:
    """Rule: every float leaf but the adapters."""

    adapters: tuple[str, str]

    def __call__(self, path: tuple[Any, ...], leaf: Any) -> str | None:
        name = leaves(path, leaf)
        is_adapter = name is not None and name.split("/")[-1] in self.adapters
        return None if is_adapter else name


def flat_lora(
    rho: Any,
    scale: float,
    names: tuple[str, str] = ("lora_a", "lora_b"),
    **parts: Any,
) -> Method:
    r"""Returns Flat-LoRA: $\epsilon_o = \rho\,\|W'_o\|\,z_o / \sqrt n$ on frozen $W$.

    $W' = W + s A B$ is what a layer computes with, f32[n, outputs], and $W'_o$ one of its
    outputs' n weights. $z \sim \mathcal N(0, I)$ anew in every step, and never stored.
    Only weights with adapters beside them move, and the adapters do not.

    $W$ is among the parameters, for it is what moves. Put `jax.lax.stop_gradient` around
    it in the loss, so that its gradient is not computed, and keep weight decay off it
    (`optax.masked`).

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.05 is published, rising as
        $\frac{1}{2} (1 - \cos(\pi t / T))$ over the run:
        `lambda t: 0.05 - optax.cosine_decay_schedule(0.05, total_steps)(t)`.
      scale: s, what the loss multiplies the product of the adapters with.
      names: What the adapters f32[n, r] and f32[r, outputs] are called: beside the
        weight `kernel`, below a `lora` beside it, or beside a `base_module` that owns it.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` but the adapters, `random()`, a shape that reads the
      merged weights, `descend()`. The price of the loop without it.

    Raises:
      ValueError: For a scale that is no number; in a step, where no weight has adapters,
        or their product has another shape.

    References:
      Li et al., Flat-LoRA, ICML 2025, arXiv:2409.14396; the formula from the authors'
      code.
    """
    if not _checks.is_number(scale):
        remedy = "Pass alpha / rank, as the loss has it."
        raise _checks.value_error(_WHO, "scale", "a number", repr(scale), remedy)

    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        ascent=ascent.random(),
        shape=_of_merged(float(scale), names),
        rule=_Frozen(names),
    )


@functools.cache
def _of_merged(scale: float, names: tuple[str, str]) -> LeafFactors:
    """Returns the shape: each slice times the root mean square of the merged one."""

    def factors(leaves: list[Any], params: list[Any], layers: Layers) -> list[Any]:
        merged = _merged(params, layers, scale, names)
        return [
            like(jnp.zeros(()), x)
            if i not in merged
            else size_of_filters(merged[i], x, is_mean=True)
            for i, x in enumerate(leaves)
        ]

    return LeafFactors(factors)


def _merged(
    params: list[Any], layers: Layers, scale: float, names: tuple[str, str]
) -> dict[int, Any]:
    """Returns W + s A B of the weights that have adapters, by their places."""
    tree = jax.tree.unflatten(layers.treedef, params)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    called = {
        leaves(p, x): i for i, (p, x) in enumerate(zip(paths, params, strict=True))
    }
    found: dict[int, Any] = {}
    for name, place in called.items():
        if name is None or params[place].ndim != 2 or layers.leaf_layer[place] < 0:
            continue
        homes = (name, f"{name}/lora", name.removesuffix("/base_module"))
        for home in homes:
            first, second = (called.get(f"{home}/{adapter}") for adapter in names)
            if first is not None and second is not None:
                product = _tree.wide(params[first]) @ _tree.wide(params[second])
                found[place] = _tree.wide(params[place]) + scale * product
                break
    if not found:
        remedy = "Pass names=(...), as the adapters are called beside their weights."
        expected = f"called {names[0]} and {names[1]} beside a kernel"
        got = ", ".join(str(name) for name in called)
        raise _checks.value_error(_WHO, "names", expected, got, remedy)
    return found
