"""The command `find-rho` of the command line: its arguments."""

import argparse
from collections.abc import Callable
from typing import Any

from lwsam_bench.commands.options import arguments as parse


def add(commands: Any, start: Callable[..., Any]) -> None:
    """Add the command.

    Args:
      commands: What `add_subparsers` returned.
      start: Prepares JAX and returns the console.
    """
    parser = commands.add_parser(
        "find-rho",
        help="lwsam.find_rho against the full grid, on four tasks, resumable, minutes",
    )
    add_to = parser.add_argument
    add_to(
        "--tasks", type=int, nargs="*", choices=range(4), help="numbers (default: all)"
    )
    add_to("--data-dir", help=parse.DATA_DIR)
    add_to(
        "--docs", help="folder of the documentation whose helps.md to bring up to date"
    )
    add_to("--out", default="lwsam-find-rho", help="folder for the results")
    add_to(
        "--render-only",
        action="store_true",
        help="train nothing: the table of the rows that are in --out",
    )
    parser.set_defaults(run=lambda arguments: _find_rho(arguments, start))


def _find_rho(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start()
    from lwsam_bench.radius import run

    names = list(run.FOUR)
    chosen = names if arguments.tasks is None else [names[i] for i in arguments.tasks]
    return run.run(
        chosen,
        arguments.data_dir,
        arguments.out,
        console,
        docs=arguments.docs,
        render_only=arguments.render_only,
    )
