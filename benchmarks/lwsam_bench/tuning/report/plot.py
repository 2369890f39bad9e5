"""The plot of a tuning: what counts over what it costs."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from lwsam_bench.pages import report
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row
from lwsam_bench.tuning.report.summary import (
    ACCURACY,
    counted,
    measure_of,
    summarize,
)
from lwsam_bench.tuning.tasks import title


def name(rows: Sequence[Row], family: str) -> str:
    """Return the name of the file of a plot."""
    task = rows[0]["task"]
    noise = f"noise{task['noise'] * 100:g}"
    return f"tuning-{task['name']}-{noise}-batch{task['batch_size']}-{family}.png"


def draw(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """Draw what counts over total gradients, with the curve of half and twice the steps.

    Of a method's sets of draws it has the one that counts; the curve is of the
    base, in both.
    """
    found = summarize(rows)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from error
    for family in ("sgd", "adamw"):
        some = [t for t in found.values() if t[0].method.family == family]
        if not some:
            continue
        figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
        _draw_lengths(axis, rows, family)
        for number, tuned in enumerate(some):
            again, place = divmod(number, len(report.COLOURS))
            one = counted(tuned, "last")
            mean, error = one.score("last")
            axis.errorbar(
                one.mean("gradients")[0],
                mean,
                yerr=0.0 if math.isnan(error) else error,
                color=report.COLOURS[place],
                marker="os^Dv"[again % 5],
                ls="",
                elinewidth=0.7,
                capsize=2,
                label=tuned[0].method.label,
            )
        axis.set(
            xscale="log",
            xlabel="gradients of the whole run",
            title=f"{title(rows[0]['task'])}: {some[0][0].measure.name}, last step",
        )
        if some[0][0].measure is ACCURACY:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(ScalarFormatter())
        figure.legend(loc="outside right upper", frameon=False, fontsize=7)
        report._save(figure, [axis], folder / name(rows, family))


def _draw_lengths(axis: Any, rows: Sequence[Row], family: str) -> None:
    """Draw what the base optimizer has with half, the same and twice the steps."""
    mine = [r for r in rows if r["method"] == family and r["phase"] == "final"]
    for draws in sorted({row["draws"] for row in mine}):
        points = []
        for length in sorted({row["length"] for row in mine}):
            some = [r for r in mine if (r["draws"], r["length"]) == (draws, length)]
            if some:
                field = measure_of(some[0]["last"]).field
                scores = [row["last"][field] for row in some]
                points.append((some[0]["gradients"], report.mean_and_error(scores)[0]))
        gradients, scores = zip(*points, strict=True)
        axis.plot(gradients, scores, color=report.COLOURS[0], lw=1.5)
