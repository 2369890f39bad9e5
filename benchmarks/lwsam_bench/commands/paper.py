"""The commands of the paper's tables and figures, and `report`: their arguments."""

import argparse
import dataclasses
import importlib
import pathlib
from collections.abc import Callable
from typing import Any

from lwsam_bench.commands.options import arguments as parse
from lwsam_bench.support import quick_compile


# As in `paper.setups`, which this module must not wait for; tests compare them.
SCALES = ("smoke", "small", "paper")


@dataclasses.dataclass(frozen=True)
class Command:
    """A table or a figure.

    Attributes:
      module: Within `lwsam_bench.paper`; it has a function of the command's name.
      help: What it shows.
    """

    module: str
    help: str


COMMANDS = {
    "table1": Command("tables", "accuracy of the methods on the paper's benchmarks"),
    "table2": Command(
        "throughput.race", "images a second of the methods, taking turns"
    ),
    "table3": Command("tables", "accuracy by the criterion that chooses the layers"),
    "table4": Command("tables", "accuracy and FLOPs by the number of layers"),
    "figure1": Command("curves.figures", "gradient norm of each layer over the epochs"),
    "figure2": Command(
        "landscape.figures", "loss landscape of each layer, trained with SGD"
    ),
    "figure3": Command("curves.figures", "learning curves of the methods"),
    "figure4": Command(
        "curves.figures", "gradient norm of the full model over the epochs"
    ),
    "figure5": Command("curves.figures", "in how many steps each layer is perturbed"),
    "figure6": Command("landscape.figures", "as figure2, trained with layer-wise SAM"),
    "lm": Command("tables", "perplexity of a small language model"),
    "theorem1": Command("theorem1.bound", "the measured gradient norm and its bound"),
}


def add(commands: Any, start: Callable[..., Any]) -> None:
    """Add the commands.

    Args:
      commands: What `add_subparsers` returned.
      start: Prepares JAX and returns the console.
    """
    for name, command in COMMANDS.items():
        parser = commands.add_parser(name, help=command.help)
        _add_arguments(parser)
        parser.set_defaults(
            run=lambda arguments, name=name: _run(name, arguments, start)
        )
    parser = commands.add_parser("report", help="one page of all that is in a folder")
    parser.add_argument("folder", metavar="DIR", help="what --out was")
    parser.set_defaults(run=_report)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--scale",
        choices=SCALES,
        default="small",
        help="smoke: seconds, to see that it runs; small: minutes to an hour on two CPU"
        " cores (default); paper: its networks and epochs, for GPUs",
    )
    add(
        "--out",
        default="lwsam-paper",
        help="folder for runs and results; commands that share one share their runs",
    )
    add("--data-dir", help=parse.DATA_DIR)
    add("--seeds", type=parse.count, help="runs of each method (default 3; smoke 1)")
    add(
        "--jobs",
        type=parse.count,
        default=1,
        help="runs at one time, spread over the local GPUs (default 1)",
    )
    add(
        "--retry-failed",
        action="store_true",
        help="try the runs in --out again that are recorded as failed",
    )


def _run(name: str, arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    if arguments.scale == "smoke":
        quick_compile.enable()
    console = start()
    from lwsam_bench.paper.request import Request
    from lwsam_bench.paper.runs.outcome import forget_failures
    from lwsam_bench.paper.runs.sweep import Stopped
    from lwsam_bench.support.rows import output_folder

    module = importlib.import_module(f"lwsam_bench.paper.{COMMANDS[name].module}")
    out = output_folder(arguments.out)
    if arguments.retry_failed:
        count = forget_failures(out)
        console.print(f"runs that failed and are tried again: {count}", highlight=False)
    request = Request(
        scale=arguments.scale,
        out=out,
        console=console,
        data_dir=arguments.data_dir,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
    )
    try:
        made = getattr(module, name)(request)
    except Stopped as stopped:
        return stopped.code
    console.print(f"{made.title}: {made.save(out)}", highlight=False, soft_wrap=True)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lwsam_bench.paper.report import page

    page.render(pathlib.Path(arguments.folder), Console())
    return 0
