"""The page of `accelerator`, from its rows alone."""

import math
import pathlib
from collections.abc import Sequence

from lwsam_bench.pages import report
from lwsam_bench.pages.docs import replace_generated
from lwsam_bench.support.rows import Row, write_text


NAME = "accelerator"
NONE = (
    "**No accelerator yet.** `lwsam-bench accelerator` has not run on one: there are no"
    " rows, so there are no numbers here."
)
_CPU = (
    "These rows are of a CPU. They show that everything runs, and say nothing about an"
    " accelerator."
)


def render(rows: Sequence[Row], folder: pathlib.Path, docs: str | None) -> None:
    """Write the page to a folder and, if that is given, into the documentation.

    Raises:
      UserError: If `docs` has no page `accelerator.md` with the marks that enclose what
        is generated.
    """
    write_text(folder / f"{NAME}.md", f"# On an accelerator\n\n{section(rows)}")
    if docs is not None:
        page = pathlib.Path(docs) / f"{NAME}.md"
        write_text(page, replace_generated(page, NAME, published(rows)))


def published(rows: Sequence[Row]) -> str:
    """Return what the documentation shows: only what ran on an accelerator."""
    return section([row for row in rows if row["origin"]["platform"] != "cpu"])


def section(rows: Sequence[Row]) -> str:
    """Return the Markdown of all rows, or that there are none."""
    if not rows:
        return NONE + "\n"
    parts = []
    if any(row["origin"]["platform"] == "cpu" for row in rows):
        parts.append(_CPU + "\n")
    races = [row for row in rows if row["kind"] == "race"]
    for piece in dict.fromkeys(row["piece"] for row in races):
        parts.append(_race([row for row in races if row["piece"] == piece]))
    runs = [row for row in rows if row["kind"] == "run"]
    if runs:
        parts.append(_runs(runs))
    return "\n".join(parts)


def _race(rows: Sequence[Row]) -> str:
    first = rows[0]
    config = first["config"]
    header = [
        "method",
        f"{first['unit']}/s",
        "time",
        "quartiles",
        "FLOPs",
        "TFLOP a step",
        "TFLOP/s",
        "memory",
        "compiling, s",
        "executables",
    ]
    cells = [
        [
            row["method"],
            f"{row['items_per_second']:,.0f}",
            f"{row['time']:.2f} ×",
            f"{row['time_quartiles'][0]:.2f} to {row['time_quartiles'][1]:.2f}",
            f"{row['flops']:.2f} ×",
            f"{row['step_flops'] / 1e12:.3g}",
            f"{row['step_flops'] / row['seconds'] / 1e12:.3g}",
            _bytes(row["memory_bytes"]),
            f"{row['compile_seconds']:.0f}",
            str(row["executables"]),
        ]
        for row in rows
    ]
    shape = " x ".join(map(str, config["shape"]))
    notes = (
        f"{first['data'].capitalize()}, {shape}, batch {config['batch_size']}; float32"
        f" parameters, {config['compute']} inside. {config['steps']} steps of each"
        f" method, taking turns every {config['burst']} in one process. Time and FLOPs"
        " are over SGD's: time the median over blocks of 10 steps without warm-up and"
        " steps that compiled, FLOPs by the cost model. Memory is the most of any"
        f" executable: arguments, results and temporaries. {_origin(first)}"
    )
    return f"## {first['title']}\n\n{report.markdown(header, cells, notes)}"


def _runs(rows: Sequence[Row]) -> str:
    first = rows[0]
    config = first["config"]
    sgd = {row["seed"]: row["accuracy"] for row in rows if row["method"] == "sgd"}
    header = [
        "method",
        "ρ",
        "test accuracy",
        "against SGD",
        "FLOPs",
        "seconds",
        "seeds",
    ]
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        pairs = [
            row["accuracy"] - sgd[row["seed"]] for row in mine if row["seed"] in sgd
        ]
        lost = sum(row["diverged"] for row in mine)
        rho = mine[0]["config"]["rho"]
        cells.append(
            [
                method,
                f"{rho:g}" if rho else "–",
                _percent([row["accuracy"] for row in mine])
                + (f" ({lost} diverged)" if lost else ""),
                "–" if method == "sgd" or not pairs else _difference(pairs),
                f"{1 + _mean([row['overhead'] for row in mine]):.2f} ×",
                f"{_mean([row['seconds'] for row in mine]):.0f}",
                str(len(mine)),
            ]
        )
    notes = (
        f"{config['dataset']}, {config['model']}, {config['epochs']} epochs, batch"
        f" {config['batch_size']}, learning rate {config['lr']:g} divided by ten twice,"
        f" weight decay {config['weight_decay']:g}, labels smoothed by"
        f" {config['label_smoothing']:g}. The recipe is one for all, the radii are those"
        " that were published; nothing was tuned. Accuracy is mean ± standard error after"
        " the last epoch; the difference is that of runs from the same seed, and within"
        " twice its standard error it is none. Seconds are of a whole run, compiling and"
        f" evaluation included. {first['data']['note']} {_origin(first)}".replace(
            "  ", " "
        )
    )
    title = f"{config['model']} on {config['dataset']}"
    return f"## {title}\n\n{report.markdown(header, cells, notes)}"


def _difference(pairs: Sequence[float]) -> str:
    mean, error = report.mean_and_error(pairs)
    if math.isnan(error):
        return f"{100 * mean:+.2f}, one seed"
    text = f"{100 * mean:+.2f} ± {100 * error:.2f}"
    return f"{text}: no difference" if abs(mean) <= 2 * error else text


def _percent(values: Sequence[float]) -> str:
    mean, error = report.mean_and_error(values)
    spread = "" if math.isnan(error) else f" ± {100 * error:.2f}"
    return f"{100 * mean:.2f}{spread} %"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _origin(row: Row) -> str:
    origin = row["origin"]
    commit = origin["commit"]
    code = f", commit {commit[:7]}" if commit else ""
    return f"JAX {origin['packages']['jax']}, {origin['device']}{code}."
