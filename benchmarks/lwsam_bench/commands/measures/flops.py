"""The command `flops` of the command line: its arguments."""

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
    parser = commands.add_parser("flops", help="FLOPs of a step over a gradient")
    parser.add_argument("--model", choices=("resnet20",), default="resnet20")
    parser.add_argument("--batch-size", type=parse.count, default=64)
    parser.set_defaults(run=lambda arguments: _flops(arguments, start))


def _flops(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start(cache=False)  # it counts what it compiles
    from lwsam_bench.speed import flops

    return flops.run(arguments.batch_size, console)
