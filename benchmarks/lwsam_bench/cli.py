"""The command line `lwsam-bench`: it reads arguments and calls what does the work."""

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence

from lwsam_bench import cli_cost, cli_paper, cli_train, cost_table
from lwsam_bench._errors import UserError
from lwsam_bench.arguments import count


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    2 stands for an error that the user can mend, 1 for a limit that does not hold, 130
    and 143 for a run that was stopped.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"lwsam-bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lwsam-bench: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lwsam-bench",
        description="Layer-wise SAM on real data, beside SGD and SAM.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(
        commands.add_parser("demo", help="compare the methods on digits, minutes")
    )
    cli_train.add(commands, _start)
    _add_flops(commands.add_parser("flops", help="FLOPs of a step over a gradient"))
    cli_cost.add(commands, _start, count)
    cost_table.add_cost(commands, _start, count)
    cli_paper.add(commands, _start)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="lwsam-demo", help="folder for the results")
    parser.add_argument("--seeds", type=count, default=3, help="runs of each method")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=count, help="epochs of 10 steps each")
    length.add_argument("--steps", type=count, help="steps, rounded up to epochs")
    parser.add_argument(
        "--tune", action="store_true", help="look for the best radius of each method"
    )
    parser.set_defaults(run=_demo)


def _add_flops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("resnet20",), default="resnet20")
    parser.add_argument("--batch-size", type=count, default=64)
    parser.set_defaults(run=_flops)


def _demo(arguments: argparse.Namespace) -> int:
    console = _start()
    from lwsam_bench import demo, demo_run

    config = demo.DemoConfig(seeds=tuple(range(arguments.seeds)))
    if arguments.epochs or arguments.steps:
        epochs = arguments.epochs or math.ceil(arguments.steps / 10)
        config = demo.DemoConfig(seeds=config.seeds, epochs=epochs)
    work = demo_run.tune if arguments.tune else demo_run.run
    return work(config, arguments.out, console)


def _flops(arguments: argparse.Namespace) -> int:
    console = _start(cache=False)  # it counts what it compiles
    from lwsam_bench import flops

    return flops.run(arguments.batch_size, console)


def _start(*, cache: bool = True):
    """Prepare JAX and the console; imports of JAX stay out of `--help`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # The readers and writers below tell the log about each file.
    logging.getLogger("absl").setLevel(logging.ERROR)
    from rich.console import Console

    if cache:
        from lwsam_bench import cache as compilation_cache

        compilation_cache.enable()
    return Console()
