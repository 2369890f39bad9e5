"""The command `demo` of the command line: its arguments."""

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
        "demo", help="race tuned methods on digits with noisy labels, minutes"
    )
    parser.add_argument("--out", default="lwsam-demo", help="folder for the results")
    parser.add_argument(
        "--seeds", type=parse.count, default=5, help="runs of each recipe"
    )
    parser.add_argument(
        "--rows", help="file of a tuning with the recipes (default: the committed one)"
    )
    parser.set_defaults(run=lambda arguments: _demo(arguments, start))


def _demo(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start()
    from lwsam_bench.front import demo

    return demo.run(arguments.rows, arguments.seeds, arguments.out, console)
