"""The command `accelerator` of the command line: its arguments."""

import argparse
from collections.abc import Callable
from typing import Any

from lwsam_bench.commands.options import arguments as parse
from lwsam_bench.support.errors import UserError


# As in `evidence.PIECES`, which must not be waited for; tests compare them.
PIECES = ("resnet20", "wrn28-10", "vit-b16", "gpt", "cifar10")


def add(commands: Any, start: Callable[..., Any]) -> None:
    """Add the command.

    Args:
      commands: What `add_subparsers` returned.
      start: Prepares JAX and returns the console.
    """
    parser = commands.add_parser(
        "accelerator",
        help="what a GPU has to show, resumable, 45 minutes planned",
    )
    add = parser.add_argument
    add("--out", default="lwsam-accelerator", help="folder for rows, runs and page")
    add(
        "--pieces",
        type=parse.some_of(PIECES),
        default=PIECES,
        help=f"some of {', '.join(PIECES)}, with commas (default: all, in this order)",
    )
    add(
        "--minutes",
        type=parse.positive,
        help="stop after so many; the same command goes on, until it returns 0",
    )
    add("--seeds", type=parse.count, help="runs of each method on CIFAR-10 (default 3)")
    add("--data-dir", help=parse.DATA_DIR)
    add(
        "--docs",
        help="folder of the documentation whose accelerator.md to bring up to date",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--smoke",
        action="store_true",
        help="tiny networks and digits, on any device: seconds, to see that it runs",
    )
    mode.add_argument(
        "--render-only",
        action="store_true",
        help="measure nothing: the page of the rows that are in --out",
    )
    parser.set_defaults(run=lambda arguments: _accelerator(arguments, start))


def _accelerator(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    if arguments.smoke and arguments.seeds:
        raise UserError("--smoke chooses --seeds as well")
    console = start()
    from lwsam_bench.accelerator import evidence

    if arguments.smoke:
        wanted = evidence.smoke(arguments.pieces)
    else:
        seeds = arguments.seeds or evidence.Evidence.seeds
        wanted = evidence.Evidence(arguments.pieces, seeds)
    return evidence.run(
        wanted,
        arguments.data_dir,
        arguments.out,
        arguments.docs,
        console,
        minutes=arguments.minutes,
        render_only=arguments.render_only,
    )
