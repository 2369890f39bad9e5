"""The command `cost` of the command line: its arguments."""

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
        "cost", help="FLOPs of each layer of a network, and of steps that perturb it"
    )
    add = parser.add_argument
    add("--model", type=parse.model, default="wrn28-10", help="default wrn28-10")
    add("--batch-size", type=parse.count, default=128)
    add(
        "--image-size",
        type=parse.count,
        default=32,
        help="sides in pixels (default 32)",
    )
    add(
        "--classes",
        type=parse.count,
        default=100,
        help="number of outputs (default 100)",
    )
    add(
        "--compile",
        action="store_true",
        help="compile some of the steps, run none: how long it takes, what XLA counts",
    )
    add("--out", help="file for the Markdown (default: print it)")
    parser.set_defaults(run=lambda arguments: _cost(arguments, start))


def _cost(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start(cache=False)  # it measures how long compiling takes
    from lwsam_bench.speed import cost

    return cost.run(
        cost.Network(
            arguments.model,
            batch_size=arguments.batch_size,
            image_size=arguments.image_size,
            classes=arguments.classes,
        ),
        arguments.out,
        console,
        compiling=arguments.compile,
    )
