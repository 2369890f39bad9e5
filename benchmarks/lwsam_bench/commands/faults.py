"""The command `faults` of the command line: its arguments."""

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
        "faults", help="break runs on purpose, and see what is lost, minutes"
    )
    add_to = parser.add_argument
    add_to("--kills", type=parse.count, help="how often a run is killed (default 10)")
    add_to("--steps", type=parse.count, help="of each run (default 400)")
    add_to("--out", default="lwsam-faults", help="folder for the results")
    add_to(
        "--docs", help="folder of the documentation whose faults.md to bring up to date"
    )
    add_to("--smoke", action="store_true", help="two kills of a short run")
    add_to(
        "--render-only",
        action="store_true",
        help="break nothing: the table of the rows that are in --out",
    )
    parser.set_defaults(run=lambda arguments: _faults(arguments, start))


def _faults(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start()
    import dataclasses

    from lwsam_bench.faults import suite

    extent = suite.SMOKE if arguments.smoke else suite.Extent()
    given = {"kills": arguments.kills, "steps": arguments.steps}
    given = {name: x for name, x in given.items() if x is not None}
    return suite.run(
        dataclasses.replace(extent, **given),
        arguments.out,
        arguments.docs,
        console,
        arguments.render_only,
    )
