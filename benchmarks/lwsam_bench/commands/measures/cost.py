"""The command `cost` of the command line: its arguments."""

import argparse
from collections.abc import Callable
from typing import Any

from lwsam_bench.commands.options import arguments as parse
from lwsam_bench.support.errors import UserError


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
    add(
        "--presets",
        action="store_true",
        help="a step of every preset over SGD's, by the model and by XLA: compiles each",
    )
    add("--rows", help="with --presets: the JSONL file, whose rows are kept")
    add("--page", help="with --presets: a page with the marks of the table")
    parser.set_defaults(run=lambda arguments: _cost(arguments, start))


def _cost(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start(cache=False)  # it measures how long compiling takes
    if arguments.presets:
        if arguments.rows is None:
            raise UserError("--presets needs --rows, the file for what it finds")
        from lwsam_bench.speed import presets

        return presets.run(
            arguments.model,
            arguments.batch_size,
            arguments.image_size,
            console,
            rows=arguments.rows,
            page=arguments.page,
        )
    for option in ("rows", "page"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option} has no meaning without --presets")
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
