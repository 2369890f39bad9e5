"""The command `speed` of the command line: its arguments."""

import argparse
from collections.abc import Callable
from typing import Any

from lwsam_bench.commands.options import arguments as parse
from lwsam_bench.support.errors import UserError


# As in `workloads.TITLES`, which must not be waited for; tests compare them.
SPEED_MODELS = ("resnet20", "wrn16-2", "vit-s", "gpt", "smallcnn")


def add(commands: Any, start: Callable[..., Any]) -> None:
    """Add the command.

    Args:
      commands: What `add_subparsers` returned.
      start: Prepares JAX and returns the console.
    """
    parser = commands.add_parser("speed", help="FLOPs, time and memory of each method")
    add_to = parser.add_argument
    add_to(
        "--models",
        type=parse.some_of(SPEED_MODELS),
        help=f"some of {', '.join(SPEED_MODELS)}, with commas (default: the first four)",
    )
    add_to("--batch-size", type=parse.count, help="default: what suits model and CPU")
    add_to(
        "--steps",
        type=parse.count,
        help="of each method (default 200); for --check of the paper's rule (default"
        " 400), those whose time counts run an eighth",
    )
    add_to(
        "--burst", type=parse.count, help="steps before the next method has its turn"
    )
    add_to("--data-dir", help=parse.DATA_DIR)
    add_to("--out", default="lwsam-speed", help="folder for the results")
    add_to(
        "--docs", help="folder of the documentation whose cost.md to bring up to date"
    )
    add_to(
        "--render-only",
        action="store_true",
        help="measure nothing: tables and charts of the rows that are in --out",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--smoke", action="store_true", help="six steps of a small network on digits"
    )
    mode.add_argument(
        "--check",
        action="store_true",
        help="compare ResNet-20 at batch 128 with its limits; exit with 1 if one is"
        " broken",
    )
    parser.set_defaults(run=lambda arguments: _speed(arguments, start))


def _speed(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    fixed = arguments.models or arguments.batch_size
    if fixed and (arguments.smoke or arguments.check):
        raise UserError("--smoke and --check choose --models and --batch-size")
    if arguments.smoke and arguments.steps:
        raise UserError("--smoke chooses --steps as well as --models")
    console = start(cache=False)  # it measures how long compiling takes
    from lwsam_bench.speed import prices

    if arguments.smoke:
        config = prices.SMOKE
    elif arguments.check:
        config = prices.check(arguments.steps)
    else:
        config = prices.SpeedConfig(
            models=arguments.models or prices.SpeedConfig.models,
            steps=arguments.steps or prices.SpeedConfig.steps,
            batch_size=arguments.batch_size,
            burst=arguments.burst,
        )
    return prices.run(
        config,
        arguments.data_dir,
        arguments.out,
        arguments.docs,
        console,
        render_only=arguments.render_only,
    )
