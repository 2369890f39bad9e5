"""The tables, charts and acceptance figures of `speed`, from its rows."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt

from lwsam_bench import report
from lwsam_bench.metrics import Row
from lwsam_bench.racers import budget, OPTAX_SAM, PAPER
from lwsam_bench.workloads import TITLES


EXACT_SETS = 24  # the default of `lwsam.TrainStep`


def table(rows: Sequence[Row], chart: str | None = None) -> str:
    """Return the Markdown of one workload's rows, with a heading and notes.

    Args:
      rows: One for each method.
      chart: Path of what `plot` drew, if it is to be shown.
    """
    first = rows[0]
    header = [
        "method",
        "FLOPs",
        "FLOPs by XLA",
        "time",
        "quartiles",
        f"{first['unit']}/s",
        "memory",
        "executables",
        "compiled",
        "compiling, s",
        "waited",
        "host, µs",
    ]
    cells = [
        [
            row["method"],
            f"{row['flops']:.3f}",
            f"{row['flops_xla']:.3f}",
            f"{row['time']:.2f}",
            f"{row['time_quartiles'][0]:.2f} to {row['time_quartiles'][1]:.2f}",
            f"{row['items_per_second']:,.0f}",
            f"{row['memory']:.2f}",
            str(row["executables"]),
            str(len(row["programs"])),
            f"{row['compile_seconds']:.0f}",
            f"{row['waits']:.1%}",
            "–" if row["host_us"] is None else f"{row['host_us']:.0f}",
        ]
        for row in rows
    ]
    name = TITLES[first["model"]]
    title = f"### {name}, batch {first['batch_size']}"
    if chart is not None:
        title += f"\n\n![FLOPs and time of each method over SGD's, {name}]({chart})"
    return f"{title}\n\n{report.markdown(header, cells, _notes(rows))}"


def by_model(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each model, in the order in which the models come."""
    models = dict.fromkeys(row["model"] for row in rows)
    return [[row for row in rows if row["model"] == model] for model in models]


def _notes(rows: Sequence[Row]) -> str:
    first = rows[0]
    origin = first["origin"]
    cores = f", {origin['cpu_count']} cores" if origin["platform"] == "cpu" else ""
    turns = "step by step" if first["burst"] == 1 else f"every {first['burst']} steps"
    return (
        f"{first['data'].removesuffix('.')}; {_steps(rows)} steps of real training,"
        f" the methods taking turns {turns} in one process. FLOPs, time and memory are"
        " over SGD's: FLOPs the mean over the steps, by the cost model and by XLA's"
        " count for the executables that ran; time the median over blocks of 10 steps"
        " without warm-up and steps that compiled;"
        f" {first['unit']}/s are SGD's over the time; memory the most of any executable"
        " (arguments, results and temporaries). Executables: the most held at one time;"
        " compiled: all that ran. Waited: share of the second half's"
        " steps that waited for a compiler. Host: median time of a step's call beyond"
        " that of its executable: reading the mask, choosing the executable."
        f" JAX {origin['packages']['jax']}, {origin['device']}{cores}."
    )


def _steps(rows: Sequence[Row]) -> str:
    """Return how many steps the methods ran, fewest to most."""
    fewest, most = (f(row["steps"] for row in rows) for f in (min, max))
    return str(most) if fewest == most else f"{fewest} to {most}"


def plot(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Draw FLOPs and time of each method over SGD's."""
    names = [row["method"] for row in rows]
    place = np.arange(len(rows))
    time = np.asarray([row["time"] for row in rows])
    quartiles = np.asarray([row["time_quartiles"] for row in rows]).T
    spread = np.abs(quartiles - time)
    figure, axis = plt.subplots(figsize=(8, 1 + 0.42 * len(rows)), layout="constrained")
    axis.barh(
        place - 0.2,
        [row["flops"] for row in rows],
        0.38,
        color=report.COLOURS[2],
        label="FLOPs",
    )
    axis.barh(
        place + 0.2,
        time,
        0.38,
        xerr=spread,
        color=report.COLOURS[1],
        label="time, with quartiles",
    )
    axis.axvline(1.0, color="black", lw=0.8)
    axis.set_yticks(place, names)
    axis.invert_yaxis()
    axis.set(xlabel="over SGD", title=TITLES[rows[0]["model"]])
    axis.legend(loc="lower right", frameon=False)
    report._save(figure, [axis], path)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured number and its limit."""

    title: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the limit is kept; a number that is missing breaks it."""
        if self.at_least:
            return self.value >= self.limit
        return self.value <= self.limit

    def cells(self) -> list[str]:
        """Return its line of a table."""
        sign = "≥" if self.at_least else "≤"
        verdict = "kept" if self.holds else "**missed**"
        return [self.title, f"{self.value:.4g}", f"{sign} {self.limit:g}", verdict]


def figures_table(figures: Sequence[Figure]) -> str:
    """Return the Markdown of numbers beside their limits."""
    header = ["what", "measured", "limit", ""]
    return report.markdown(header, [figure.cells() for figure in figures], "")


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Return what `--check` compares with its limits."""
    by_method = {row["method"]: row for row in rows}
    small, paper = by_method[budget(0.10)], by_method[PAPER]
    optax_sam = by_method[OPTAX_SAM]
    most = max(small["flops_most"], small["flops_most_xla"])
    off = abs(paper["flops_xla"] / paper["flops"] - 1)
    second = paper["steps"] - paper["steps"] // 2
    found = [
        Figure(f"{budget(0.10)}: FLOPs of the dearest step", most, 1.10),
        Figure(f"{budget(0.10)}: time", small["time"], 1.12),
        Figure(
            f"{OPTAX_SAM}: time over that of {budget(0.10)}",
            optax_sam["time"] / small["time"],
            1.5,
            at_least=True,
        ),
        Figure(f"{PAPER}: XLA's mean FLOPs off the cost model's", off, 0.02),
        Figure(f"{PAPER}: mean FLOPs", paper["flops_xla"], 1.65),
        Figure(
            f"{PAPER}: executables compiled",  # those given up again included
            len(paper["programs"]),
            paper["layers"] + 1 + EXACT_SETS,
        ),
        Figure(  # fewer than 2 %
            f"{PAPER}: steps that waited, of the last {second}",
            round(paper["waits"] * second),
            math.ceil(0.02 * second) - 1,
        ),
        Figure(f"{budget(0.10)}: memory", small["memory"], 1.05),
        Figure(f"{PAPER}: memory", paper["memory"], 1.15),
    ]
    return found + [
        Figure(f"{row['method']}: host time of a step, µs", row["host_us"], 300)
        for row in (small, paper)
    ]
