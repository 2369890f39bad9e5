"""The command `demo`, around the race of `demo.py`: progress, table, plots, tuning."""

import dataclasses
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from lwsam_bench.comparison.demo import BASE, Demo, DemoConfig, DemoMethod, METHODS
from lwsam_bench.pages import report
from lwsam_bench.support.progress import LiveTable, name_layers
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.rows import (
    MetricsFile,
    output_folder,
    Row,
    write_json,
    write_text,
)


# Names and widths; the last one takes what a terminal of 80 columns leaves.
COLUMNS = (
    ("method", 21),
    ("loss", 5),
    ("accuracy", 8),
    ("images/s", 8),
    ("perturbed", 12),
)

# Seeds that the demo does not use. In results/ the radii in MORE_RADII were added later,
# and not every radius has run on every one of these seeds.
TUNING_SEEDS = (100, 101, 102, 103)
RADII = (0.3, 0.6, 0.9, 1.2)
# The best of a method must not be the largest that was tried.
MORE_RADII = {METHODS[1].label: (1.5, 1.8), METHODS[3].label: (0.75,)}
TUNING_GRID = (
    METHODS[0],  # SGD has no radius
    *(
        dataclasses.replace(method, label=f"{method.label}, ρ {rho}", rho=rho)
        for method in METHODS[1:]
        for rho in (*RADII, *MORE_RADII.get(method.label, ()))
    ),
)


def run(config: DemoConfig, out: str, console: Console) -> int:
    """Train all methods, print the table, leave table, rows and plots in `out`."""
    folder = output_folder(out)
    rows, summary = _race(config, folder, console)
    header, cells = report.table(summary)
    table = Table()
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for line in cells:
        table.add_row(*line)
    console.print(table)
    text = report.markdown(header, cells, _notes(config))
    write_text(folder / "demo-table.md", text)
    report.plot_learning_curves(folder / "learning-curves.png", rows)
    # Of the methods with a choice, the last one.
    label = config.methods[-1].label
    chosen = [row for row in rows if row["label"] == label]
    report.plot_norms(folder / "layer-norms.png", chosen)
    report.plot_selection(folder / "selection.png", chosen)
    console.print(f"table, rows and plots are in {folder}/", soft_wrap=True)
    return 0


def tune(config: DemoConfig, out: str, console: Console) -> int:
    """Train each method at several radii, on seeds that the demo does not use."""
    folder = output_folder(out)
    config = dataclasses.replace(config, methods=TUNING_GRID, seeds=TUNING_SEEDS)
    _, summary = _race(config, folder, console)
    with MetricsFile(folder / "demo-radius.jsonl") as file:
        origin = {"config": dataclasses.asdict(config), "provenance": provenance()}
        file.write({"kind": "origin", **origin})
        for row in summary:
            file.write(row)
    for row in summary:
        mean, error = report.mean_and_error(row["test_accuracy"])
        console.print(f"{row['label']}: {mean:.4f} ± {error:.4f}", highlight=False)
    return 0


def _race(
    config: DemoConfig, folder: pathlib.Path, console: Console
) -> tuple[list[Row], list[Row]]:
    """Return the rows of all epochs, and one row for each method."""
    write_json(
        folder / "config.json",
        {"config": dataclasses.asdict(config), "provenance": provenance()},
    )
    demo = Demo(config)
    rows: list[Row] = []
    started = time.perf_counter()
    with (
        MetricsFile(folder / "demo-rows.jsonl") as file,
        LiveTable(console, COLUMNS) as live,
    ):
        for number, seed in enumerate(config.seeds, start=1):
            title = f"seed {number} of {len(config.seeds)}"
            console.print(f"{title}: {config.epochs} epochs", highlight=False)
            epoch: list[Row] = []
            for epoch in demo.epochs(seed):
                rows += epoch
                for row in epoch:
                    file.write(row)
                seconds = time.perf_counter() - started
                progress = f"epoch {epoch[0]['epoch']} of {config.epochs}"
                live.show(f"{title}, {progress}, {seconds:.0f} s", _in_short(epoch))
            for row in epoch:
                console.print(
                    f"  {row['label']}: test accuracy {row['test_accuracy']:.1%}",
                    highlight=False,
                )
        summary = [_summary(demo, method, rows) for method in config.methods]
        for row in summary:
            file.write(row)
    return rows, summary


def _summary(demo: Demo, method: DemoMethod, rows: Sequence[Row]) -> Row:
    mine = [row for row in rows if row["label"] == method.label]
    last = [row for row in mine if row["epoch"] == demo.config.epochs]
    return {
        "kind": "summary",
        **dataclasses.asdict(method),
        "seeds": list(demo.config.seeds),
        "test_accuracy": [row["test_accuracy"] for row in last],
        "overhead": float(np.mean([row["overhead"] for row in mine])),
        "time": demo.stopwatch.ratio(method.label, BASE),
        "executables": next(
            len(racer.step.executables)
            for racer in demo.racers
            if racer.method == method
        ),
    }


def _in_short(epoch: Sequence[Row]) -> list[list[str]]:
    lines = []
    for row in epoch:
        steps = max(row["perturbed"].values(), default=0)
        often = [name for name, n in row["perturbed"].items() if n and 2 * n >= steps]
        lines.append(
            [
                row["label"],
                f"{row['train_loss']:.3f}",
                f"{row['test_accuracy']:.1%}",
                f"{row['images_per_second']:,.0f}",
                name_layers(often, len(row["perturbed"])),
            ]
        )
    return lines


def _notes(config: DemoConfig) -> str:
    origin = provenance()
    packages = origin["packages"]
    number = len(config.seeds)
    seeds = "1 seed" if number == 1 else f"{number} seeds"
    return (
        f"scikit-learn's digits, 1,000 training images, {config.label_noise:.0%} of"
        f" their labels replaced at random; a residual CNN of 10 layers,"
        f" {config.epochs} epochs, {seeds} (± is the standard error)."
        " FLOPs and time are over SGD; the methods took turns in one process, the time"
        f" is the median over epochs. JAX {packages['jax']}, {origin['platform']},"
        f" {origin['cpu_count']} cores."
    )
