"""The command `scaling` of the command line: its arguments."""

import argparse
from collections.abc import Callable
from typing import Any


def add(commands: Any, start: Callable[..., Any]) -> None:
    """Add the command.

    Args:
      commands: What `add_subparsers` returned.
      start: Prepares JAX and returns the console.
    """
    parser = commands.add_parser(
        "scaling", help="FLOPs and bytes of a step by devices and processes, minutes"
    )
    add_to = parser.add_argument
    add_to("--out", default="lwsam-scaling", help="folder for the results")
    add_to(
        "--docs",
        help="folder of the documentation whose parallel.md to bring up to date",
    )
    add_to("--smoke", action="store_true", help="two devices, two methods")
    add_to(
        "--render-only",
        action="store_true",
        help="compile nothing: the table of the rows that are in --out",
    )
    parser.set_defaults(run=lambda arguments: _scaling(arguments, start))


def _scaling(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start(cache=False)
    from lwsam_bench.scaling import run

    return run.run(
        run.SMOKE if arguments.smoke else run.Extent(),
        arguments.out,
        arguments.docs,
        console,
        arguments.render_only,
    )
