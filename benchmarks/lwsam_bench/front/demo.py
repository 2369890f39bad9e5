"""The demo: the methods race at their tuned recipes, which committed rows have.

No recipe is written in code. Each method runs as each of its tunings left it, on seeds
that no tuning has seen, and what is ahead by luck alone is called no difference.
"""

import pathlib
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lwsam_bench.front import committed
from lwsam_bench.pages import report
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.rows import MetricsFile, output_folder, Row, write_text
from lwsam_bench.tuning.protocol import Request
from lwsam_bench.tuning.report import plot
from lwsam_bench.tuning.report.summary import summarize, Tuned
from lwsam_bench.tuning.results import Cell
from lwsam_bench.tuning.runs.images import ImageCourse
from lwsam_bench.tuning.runs.runner import Runner
from lwsam_bench.tuning.tasks import Task, title


# From SGD's price upwards, as far as there are rows.
METHODS = ("sgd", "momentum", "momentum-relative", "micro-layers", "sam")
ROWS, TABLE, MARK = "demo-rows.jsonl", "demo-table.md", "demo"
FIRST_SEED = 2_000  # tunings and their final runs have lower ones


def run(rows: str | None, seeds: int, out: str, console: Console) -> int:
    """Race, print the table, and leave table, rows and plot in `out`.

    Args:
      rows: File of the rows with the recipes; None takes the committed ones.
      seeds: How many runs each recipe gets.
      out: The folder.
      console: Where to report.

    Raises:
      UserError: If there are no rows, or not of images.
    """
    folder = output_folder(out)
    path = pathlib.Path(rows) if rows else committed.RESULTS / committed.TUNING
    tuned = committed.tuned_rows(path)
    found = {n: t for n, t in summarize(tuned).items() if n in METHODS}
    recipes = [recipe for each in found.values() for recipe in each]
    task = Task(**{**tuned[0]["task"], "steps": tuple(tuned[0]["task"]["steps"])})
    if task.is_text:
        raise UserError(f"--rows {path}: the demo is for images")
    console.print(f"{title(tuned[0]['task'])}. Recipes from {path}:", soft_wrap=True)
    _print(console, _recipe_lines(recipes))
    with MetricsFile(folder / ROWS) as file:
        made = _race(
            recipes, task, range(FIRST_SEED, FIRST_SEED + seeds), file, console
        )
    _print(console, _lines(made))
    notes = _notes(made, tuned).replace("**", "")
    console.print(notes, highlight=False, markup=False)
    write_text(folder / TABLE, markdown(made, tuned))
    plot.draw(folder, made)
    console.print(f"table, rows and plot are in {folder}/", soft_wrap=True)
    return 0


def _race(
    recipes: Sequence[Tuned],
    task: Task,
    seeds: Sequence[int],
    file: MetricsFile,
    console: Console,
) -> list[Row]:
    """Return a row for each recipe and seed; all recipes run on a seed, then the next."""
    course, origin = ImageCourse(task, None), provenance()
    methods = {recipe.method.name: recipe.method for recipe in recipes}
    runners = {name: Runner(course, method) for name, method in methods.items()}
    made: list[Row] = []
    total, began = len(recipes) * len(seeds), time.perf_counter()
    for seed in seeds:
        for recipe in recipes:
            method, one = recipe.method, recipe.one
            request = Request("final", one["trial"], seed, one["config"], one["length"])
            row = Cell(method, recipe.draws).row(
                request, runners[method.name].run(request), task, one["trials"]
            )
            made.append({**row, "origin": origin})
            file.write(made[-1])
            console.print(
                f"{len(made):3} of {total}, {time.perf_counter() - began:3.0f} s: seed"
                f" {seed}, {method.label}, tuning {recipe.draws + 1}:"
                f" {row['last']['accuracy']:.1%} of the test images after"
                f" {row['steps']} steps of {row['price']:.2f} gradients",
                highlight=False,
                soft_wrap=True,
            )
    return made


def _recipe_lines(recipes: Sequence[Tuned]) -> list[list[str]]:
    """Return what is run, and which of how many trials found it."""
    names = ("lr", "weight_decay", "steps", "rho")
    header = ["method", "tuning", "rate", "decay", "steps", "ρ", "trial"]
    lines = [header]
    for recipe in recipes:
        numbers = [
            f"{recipe.config[n]:.3g}" if n in recipe.config else "–" for n in names
        ]
        trial = f"{recipe.one['trial'] + 1} of {recipe.one['trials']}"
        lines.append([recipe.method.label, str(recipe.draws + 1), *numbers, trial])
    return lines


def markdown(made: Sequence[Row], tuned: Sequence[Row]) -> str:
    """Return the table of a demo.

    Args:
      made: Its rows.
      tuned: Those that it took its recipes from.
    """
    if not made:
        return "No rows yet.\n"
    header, *cells = _lines(made)
    return report.markdown(header, cells, _notes(made, tuned))


def _lines(made: Sequence[Row]) -> list[list[str]]:
    """Return the table, with what a whole run costs by each tuning."""
    header, *cells = committed.table(made, METHODS)
    costs = [
        [
            "; ".join(f"{t.mean('gradients')[0]:.0f}" for t in each),
            "; ".join(f"{t.mean('cpu_seconds')[0]:.1f}" for t in each),
        ]
        for each in summarize(made).values()
    ]
    joined = [[*some, *cost] for some, cost in zip(cells, costs, strict=True)]
    return [[*header, "gradients a run", "CPU seconds"], *joined]


def _notes(made: Sequence[Row], tuned: Sequence[Row]) -> str:
    origin, task = made[0]["origin"], made[0]["task"]
    mine = [row for row in tuned if row["method"] in METHODS]
    return (
        f"{committed.verdict(made)} {title(task)}: {task['train_images']:,} training"
        " images, a tenth of them left out as in the tuning. Test accuracy in % of the"
        f" last step, ± is the standard error over {_seeds(made)} that no tuning has"
        " seen. Differences are paired by seed; within two standard errors there is none."
        " A gradient is what a plain one costs in FLOPs; CPU seconds are of the steps"
        f" alone. JAX {origin['packages']['jax']}, {origin['platform']},"
        f" {origin['cores']} core{'s' * (origin['cores'] > 1)}.\n\n"
        f"The rows of the tuning, on {_seeds(mine)}: {committed.verdict(mine)} Where the"
        " two differ the seeds decided, not the method."
    )


def _seeds(rows: Sequence[Row]) -> str:
    count = len({row["seed"] for row in rows if row["phase"] == "final"})
    return f"{count} seed{'s' * (count > 1)}"


def _print(console: Console, lines: Sequence[Sequence[str]]) -> None:
    table = Table()
    for number, name in enumerate(lines[0]):
        table.add_column(name, justify="right" if number else "left")
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)
