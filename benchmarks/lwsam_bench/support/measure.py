"""FLOPs of compiled programs."""

import math
from typing import Any


def flops(compiled: Any) -> float:
    """Return the FLOPs of a compiled program, as XLA counts them.

    A multiply-add is two. XLA counts what it compiled: work that it removed or shared
    is not in the number. NaN where it does not count.
    """
    analysis = compiled.cost_analysis()
    # Some versions of JAX return one mapping for each computation.
    if isinstance(analysis, (list, tuple)):
        analysis = analysis[0]
    return float(analysis.get("flops", math.nan))
