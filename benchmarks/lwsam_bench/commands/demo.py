"""The command `demo` of the command line: its arguments."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from lwsam_bench.commands.options import arguments as parse


def add(commands: Any, start: Callable[..., Any]) -> None:
    """Add the command.

    Args:
      commands: What `add_subparsers` returned.
      start: Prepares JAX and returns the console.
    """
    parser = commands.add_parser("demo", help="compare the methods on digits, minutes")
    parser.add_argument("--out", default="lwsam-demo", help="folder for the results")
    parser.add_argument(
        "--seeds", type=parse.count, default=3, help="runs of each method"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=parse.count, help="epochs of 10 steps each")
    length.add_argument("--steps", type=parse.count, help="steps, rounded up to epochs")
    parser.add_argument(
        "--tune", action="store_true", help="look for the best radius of each method"
    )
    parser.set_defaults(run=lambda arguments: _demo(arguments, start))


def _demo(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start()
    from lwsam_bench.comparison import demo, demo_run

    config = demo.DemoConfig(seeds=tuple(range(arguments.seeds)))
    if arguments.epochs or arguments.steps:
        epochs = arguments.epochs or math.ceil(arguments.steps / 10)
        config = demo.DemoConfig(seeds=config.seeds, epochs=epochs)
    work = demo_run.tune if arguments.tune else demo_run.run
    return work(config, arguments.out, console)
