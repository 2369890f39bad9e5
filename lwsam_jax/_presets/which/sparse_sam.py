"""Sparse SAM: some elements of the parameters are perturbed."""

from __future__ import annotations

from typing import Any

import optax

from ..._axes import shape, sparse, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def sparse_sam(
    rho: Any,
    sparsity: float = 0.5,
    mask: str = "dynamic",
    *,
    period: int = 100,
    total_steps: int | None = None,
    drop: float = 0.5,
    seed: int = 0,
    **parts: Any,
) -> Method:
    r"""Returns SAM with $\epsilon = m \odot \rho\,g / \|g\|$ and a mask of elements m.

    The norm is over all of $g$, so that $\|\epsilon\| \le \rho$. The mask is
    `lwsam.sparse`'s: `"dynamic"` (SSAM-D) exchanges some of its elements every `period`
    steps. `"fisher"` (SSAM-F) is set by the loop, every few epochs:
    `state = lwsam.set_mask(state, lwsam.fisher_mask(loss, params, examples, sparsity))`;
    until then nothing is perturbed, as in the authors' code. `sparsity=0` is SAM. No
    FLOPs are saved: what is selected by elements cannot be skipped.

    Args:
      rho: Radius, >= 0, a number or a schedule; 0.1 and 0.2 (CIFAR) are the authors'.
      sparsity: Share of the elements that stay unperturbed, in [0, 1); 0.5 is the
        authors'.
      mask: `"dynamic"` or `"fisher"`.
      period: Steps between updates of a dynamic mask; 1 to 5 epochs are the authors'.
      total_steps: Steps of the run, over which the share that is exchanged falls.
      drop: That share at first; 0.5 is the authors'.
      seed: Of what the mask draws.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, a chain of `normalized()` and
      `sparse(...)`, `descend()`.

    Raises:
      ValueError: For numbers out of range.

    References:
      Mi et al., NeurIPS 2022, arXiv:2210.05177; confirmed in the authors' code. What is
      drawn may be an element that was dropped just before: there that is not confirmed.
    """
    own = sparse.sparse(
        sparsity, mask, period=period, total_steps=total_steps, drop=drop, seed=seed
    )
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=optax.chain(shape.normalized(), own),
        rule=leaves,
    )
