"""At how many points a step takes gradients: one, or one for each part of a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks
from .ascent import batch_size


_WHO = "sub_batches"


@dataclasses.dataclass(frozen=True)
class SubBatches:
    """Parts of the batch, each with a perturbation of its own.

    Attributes:
      count: How many there are of the global batch.
      clean: Weight of the gradient of one more part, taken at the parameters; None:
        there is no such part.
    """

    count: int
    clean: float | None = None

    def refuse(self, who: str, method: Any) -> None:
        """Raises where there is no direction to take beside a clean part."""
        if self.clean is not None and not method.is_stale:
            remedy = (
                "Pass ascent=lwsam.random(), or sub_batches(count) without `clean`."
            )
            expected = "one without `clean`, for this ascent takes a pass of its own"
            raise _checks.value_error(who, "split", expected, self, remedy)

    def on_each(self, devices: int, is_stale: bool) -> int:
        """Returns how many a device has of its own; raises where they cannot be shared.

        Devices may have one together if it needs no ascent, which they could not share.
        """
        if self.count % devices == 0:
            return self.count // devices
        if is_stale and devices % self.count == 0:
            return 1
        expected = f"a multiple of the {devices} devices"
        remedy = f"Pass sub_batches({devices * -(-self.count // devices)})."
        if is_stale:
            expected += ", or a divisor of their number"
        raise _checks.value_error(_WHO, "count", expected, self.count, remedy)

    def first_of(self, device: Any, devices: int) -> Any:
        """Returns the number, in the global batch, of the first part of a device."""
        return device * self.count // devices

    def size(self, batch: Any, on_each: int) -> int:
        """Returns how many examples a part has; raises where they are not equal."""
        parts = on_each + (self.clean is not None)
        examples = batch_size(_WHO, batch)
        if examples % parts:
            remedy = "Take another number, or another batch size."
            expected = f"one that cuts the {examples} examples into equal parts"
            got = f"{self.count}, which is {parts} parts on each device"
            raise _checks.value_error(_WHO, "count", expected, got, remedy)
        return examples // parts

    def cut(self, batch: Any, on_each: int) -> list[Any]:
        """Returns the parts of a device's batch, contiguous; a clean one is the first."""
        size = self.size(batch, on_each)

        def part(start):
            piece = lambda x: x[start : start + size] if jnp.ndim(x) else x
            return jax.tree.map(piece, batch)

        parts = on_each + (self.clean is not None)
        return [part(number * size) for number in range(parts)]

    def price(self, ratio: float, on_each: int) -> float:
        """Returns the FLOPs of a step, from those of one without parts."""
        if self.clean is None:
            return ratio
        return (1 + on_each * ratio) / (on_each + 1)


def sub_batches(count: int, *, clean: float | None = None) -> SubBatches:
    r"""Returns the split of a batch into parts, each with a perturbation of its own.

    $d = \frac{1}{m} \sum_j \nabla L(w + \epsilon_j; B_j)$ over `count` equal contiguous
    parts. With `random()` each has its own noise; with an ascent that takes a pass each
    climbs on its own examples, which is m-sharpness. No part is stored beside another:
    they run one after the other, and the gradients are averaged as they come.

    Args:
      count: m, the number of parts of the global batch, >= 1. On several devices it is
        a multiple of their number; where the direction is known beforehand it may divide
        that, too. So the number of devices changes nothing.
      clean: c, to take one more part's gradient at the parameters themselves:
        $c\,\nabla L(w; B_0) + (1 - c)\,\frac{1}{m} \sum_j \nabla L(w + \epsilon_j; B_j)$.
        Model state and metrics are those of $B_0$ then.

    Raises:
      ValueError: For numbers out of range; in a step, for a batch that cannot be cut so.
      TypeError: For arguments of the wrong kind.

    References:
      m-sharpness: Foret et al., ICLR 2021, arXiv:2010.01412. Its own noise for each part:
      DAMP, arXiv:2406.16540. Two batches: m-RWP, arXiv:2404.00357.
    """
    remedy = "Pass the number of parts, such as 8."
    _checks.count(_WHO, "count", count, remedy)
    if count < 1:
        raise _checks.value_error(_WHO, "count", ">= 1", count, remedy)
    if clean is not None and not (_checks.is_number(clean) and 0 <= clean <= 1):
        remedy = "0.5 weighs both batches alike; None takes no clean one."
        raise _checks.value_error(_WHO, "clean", "in [0, 1]", repr(clean), remedy)
    return SubBatches(int(count), None if clean is None else float(clean))


def check(who: str, split: Any) -> None:
    """Raises on what is no split of a batch."""
    if not isinstance(split, SubBatches):
        remedy = "Pass lwsam.sub_batches(8), or None for one perturbation of a step."
        expected = "lwsam.sub_batches(count) or None"
        raise _checks.type_error(who, "split", expected, repr(split), remedy)
