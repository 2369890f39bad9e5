"""Which examples the descent gradient sees, where that is not the whole batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks
from .ascent import whole_batch
from .weighed import losses_of, Weighed


_WHO = "sharpest"


@dataclasses.dataclass(frozen=True)
class Sharpest:
    """The examples whose loss the perturbation raises most.

    Attributes:
      fraction: Share of the examples.
    """

    fraction: float

    def of(self, batch: Any, clean: Any, perturbed: Any) -> Any:
        """Returns these examples of a batch, from the metrics of both passes."""
        after, before = (losses_of(_WHO, m, batch) for m in (perturbed, clean))
        examples = len(after)
        count = math.floor(self.fraction * examples + 1e-9)
        if count < 1:
            remedy = "Take a larger share."
            got = f"{self.fraction}, which is 0 of {examples} examples"
            expected = "a share that gives 1 example or more"
            raise _checks.value_error(_WHO, "fraction", expected, got, remedy)
        _, places = jax.lax.top_k(after - before, count)
        return jax.tree.map(lambda x: x[places] if jnp.ndim(x) else x, batch)

    def refuse(self, who: str, method: Any) -> None:
        """Raises where the clean losses of the whole batch are not known."""
        if method.ascent != whole_batch():
            remedy = "Pass ascent=lwsam.whole_batch(), or no `descent`."
            expected = "None, for this ascent does not see the whole batch"
            raise _checks.value_error(who, "descent", expected, self, remedy)


def sharpest(fraction: float) -> Sharpest | None:
    r"""Returns the descent on the examples whose loss the perturbation raises most.

    Of B examples the `floor(fraction * B)` of largest
    $\ell_i(w + \epsilon) - \ell_i(w)$, read from `metrics["losses"]`, f32[B], which the
    loss must return. ESAM's data selection (Du et al., ICLR 2022, arXiv:2110.03141); one
    more forward pass over the batch. On several devices each takes its share of its own.

    Args:
      fraction: Share of the examples, in (0, 1]; 1 is None, all of them.

    Raises:
      ValueError: For a number out of range.
    """
    if not _checks.is_number(fraction) or not 0 < fraction <= 1:
        remedy = "0.5 takes the descent on the sharper half of the batch."
        raise _checks.value_error(_WHO, "fraction", "in (0, 1]", repr(fraction), remedy)
    return None if fraction == 1 else Sharpest(float(fraction))


def check(who: str, descent: Any) -> None:
    """Raises on what is no choice of examples."""
    if not isinstance(descent, (Sharpest, Weighed)):
        remedy = "Pass lwsam.sharpest(0.5), or None for the whole batch."
        expected = "lwsam.sharpest(fraction), lwsam.weighed(...) or None"
        raise _checks.type_error(who, "descent", expected, repr(descent), remedy)
