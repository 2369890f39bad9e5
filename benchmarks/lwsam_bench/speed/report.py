"""The tables and charts of `speed`, from its rows."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt

from lwsam_bench.pages import report
from lwsam_bench.speed.workloads import TITLES
from lwsam_bench.support.rows import Row


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
        " (arguments, results and temporaries). Executables: all that ran. Waited: share"
        " of the second half's steps that waited for a compiler. Host: median time of a"
        " step's call beyond that of its executable: reading the mask, choosing the"
        " executable."
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
