"""AE-SAM: SAM where the gradient is unusually large, else the plain step."""

from __future__ import annotations

from typing import Any

from ..._axes import shape, when, which
from ..._engine.rules import leaves
from ..._method import Method
from ..preset import preset


def ae_sam(
    rho: Any,
    total_steps: int,
    decay: float = 0.9,
    first: float = 1.0,
    last: float = -1.0,
    **parts: Any,
) -> Method:
    r"""Returns SAM where $\|g\|^2 \ge \mu + c\,\sigma$, and $d = g$ in all other steps.

    $\mu \leftarrow \delta\mu + (1 - \delta)\|g\|^2$ and
    $\sigma^2 \leftarrow \delta\sigma^2 + (1 - \delta)(\|g\|^2 - \mu)^2$, while $c$ goes
    from `first` to `last` in a straight line: late in a run more steps are SAM's. The
    others cost 1, for $g$ is there already: about 1.5 in the mean. A large negative $c$
    is SAM, a large positive one the base optimizer.

    `combine=lwsam.reuse(0.7)` makes it AE-LookSAM: the other steps reuse what the last
    ascent left.

    Args:
      rho: Radius, >= 0, a number or a schedule.
      total_steps: Steps of the whole run.
      decay: $\delta$.
      first: $c$ at the first step, the paper's $\lambda_2$.
      last: $c$ at the last step, the paper's $\lambda_1$.
      **parts: Arguments of `Method` in place of the preset's.

    Returns:
      A `Method`: `everything()` with the rule `leaves`, `normalized()`, `descend()`,
      `unusual(total_steps)`.

    Raises:
      ValueError: For numbers out of range, a stale ascent.

    References:
      Jiang et al., ICLR 2023, arXiv:2304.14647; two secondary sources agree on the
      formulas. The defaults of $\lambda_1$ and $\lambda_2$ and the start of both
      averages are not confirmed: here they start at 0.
    """
    return preset(
        parts,
        select=which.everything(),
        rho=rho,
        shape=shape.normalized(),
        when=when.unusual(total_steps, decay=decay, first=first, last=last),
        rule=leaves,
    )
