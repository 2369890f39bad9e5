"""The command `sharpness` of the command line: its arguments."""

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
        "sharpness", help="Hessian and gaps of the network of a run"
    )
    add_to = parser.add_argument
    add_to("run_folder", metavar="RUN", help="folder of a run of `train`")
    add_to("--examples", type=parse.count, help="of the training set (default 512)")
    add_to("--m", type=parse.count, help="examples in a group (default 32)")
    add_to("--rho", type=parse.positive, help="radius of the gaps (default 0.05)")
    add_to("--eigenvalues", type=parse.count, help="how many (default 3)")
    add_to("--iterations", type=parse.count, help="of Lanczos (default 32)")
    add_to("--samples", type=parse.count, help="random directions (default 8)")
    add_to("--data-dir", help=parse.DATA_DIR)
    parser.set_defaults(run=lambda arguments: _sharpness(arguments, start))


def _sharpness(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start()
    import dataclasses

    from lwsam_bench.sharpness import measure

    names = [field.name for field in dataclasses.fields(measure.Extent)]
    given = {name: getattr(arguments, name) for name in names}
    extent = measure.Extent(**{k: v for k, v in given.items() if v is not None})
    return measure.run(arguments.run_folder, extent, arguments.data_dir, console)
