"""The command line `lwsam-bench`: it reads arguments and calls what does the work."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from lwsam_bench.commands import demo, faults, find_rho, paper, train, tune
from lwsam_bench.commands.measures import (
    accelerator,
    cost,
    flops,
    precision,
    scaling,
    sharpness,
    speed,
)
from lwsam_bench.support.errors import UserError


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
    for command in (
        demo,
        train,
        tune,
        find_rho,
        sharpness,
        flops,
        speed,
        precision,
        cost,
        scaling,
        accelerator,
        faults,
        paper,
    ):
        command.add(commands, _start)
    return parser


def _start(*, cache: bool = True):
    """Prepare JAX and the console; imports of JAX stay out of `--help`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # The readers and writers below tell the log about each file.
    logging.getLogger("absl").setLevel(logging.ERROR)
    from rich.console import Console

    if cache:
        from lwsam_bench.support import cache as compilation_cache

        compilation_cache.enable()
    return Console()
