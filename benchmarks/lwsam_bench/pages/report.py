"""Tables and plots from rows; the rows are all that they know."""

import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib


matplotlib.use("Agg")  # writes files, needs no screen

from matplotlib import pyplot as plt

from lwsam_bench.support.errors import UserError


# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error of the mean; the error is NaN for one value.

    Both are NaN where a value is.
    """
    if any(math.isnan(x) for x in values):
        return float("nan"), float("nan")
    if len(values) < 2:
        return values[0], float("nan")
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]], notes: str) -> str:
    """Return a Markdown table with a paragraph below it."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{notes}\n"
    )


def _save(figure: Any, axes: Sequence[Any], path: pathlib.Path) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error}") from error
    finally:
        plt.close(figure)
