"""LORENZA: AdaZo-SAM whose probes lie in low-rank subspaces of the gradient."""

from __future__ import annotations

from typing import Any

from ..._axes import probe, shape, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def lorenza(
    rho: Any,
    rank: int = 8,
    period: int = 100,
    count: int = 1,
    mu: float = 1e-3,
    sign: int = 1,
    seed: int = 0,
    **parts: Any,
) -> Method:
    r"""Returns AdaZo-SAM with probes $P_j = Q\,\mathrm{diag}(u_j)\,R$ for matrices.

    $Q$ and $R$ span the columns and rows of the best part of a rank of the gradient; a
    random sketch of the descent gradient finds them every `period` steps. $u_j$ is
    Gaussian. This is the ascent; that the optimizer, too, keeps Adam's moments in the
    subspace is a base optimizer of its own: `optax.contrib.galore` for instance.

    Args:
      rho: Radius, >= 0, a number or a schedule; no published one is confirmed.
      rank: Of the subspaces, >= 1.
      period: Steps from one sketch to the next, >= 1.
      count: $q$, the number of probes, >= 1.
      mu: $\mu$, > 0.
      sign: 1 climbs; -1 is that of a formula collection, which would descend.
      seed: Of the sketches.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `subspace_differences(...)`,
      `normalized()`, `descend()`.

    Raises:
      ValueError: For numbers out of range.

    References:
      Refael et al., TMLR 2026, arXiv:2502.19571; from formula collections, of which one
      has $Q\,\mathrm{diag}(u)\,Q^T$ in place of $R$: that fits square matrices alone.
      Sign and all defaults are not confirmed.
    """
    own = probe.subspace_differences(
        count, mu, rank=rank, period=period, sign=sign, seed=seed
    )
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        ascent=own,
        shape=shape.normalized(),
        rule=leaves,
    )
