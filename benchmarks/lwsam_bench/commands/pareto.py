"""The command `pareto` of the command line: its arguments."""

import argparse
from collections.abc import Callable
from typing import Any

from lwsam_bench.commands.options import arguments as parse


# As in `pareto.TASKS`, which imports JAX; tests compare them.
PARETO_DATASETS = ("digits", "fashion_mnist")


def add(commands: Any, start: Callable[..., Any]) -> None:
    """Add the command.

    Args:
      commands: What `add_subparsers` returned.
      start: Prepares JAX and returns the console.
    """
    parser = commands.add_parser(
        "pareto", help="accuracy over cost, resumable, an hour"
    )
    add_to = parser.add_argument
    add_to("--datasets", type=parse.some_of(PARETO_DATASETS), default=PARETO_DATASETS)
    add_to("--methods", type=parse.split, default=(), help="default: all")
    add_to("--seeds", type=parse.count, help="evaluated runs of each method")
    add_to("--steps", type=parse.count, help="of each run")
    add_to("--grid", type=_radii, help="ladder of radii that each method climbs")
    add_to("--data-dir", help=parse.DATA_DIR)
    add_to("--out", default="lwsam-pareto", help="folder for the results")
    add_to(
        "--docs", help="folder of the documentation whose pareto.md to bring up to date"
    )
    add_to(
        "--render-only",
        action="store_true",
        help="train nothing: tables and plots of the rows that are in --out",
    )
    parser.set_defaults(run=lambda arguments: _pareto(arguments, start))


def _pareto(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start()
    from lwsam_bench.comparison import pareto, pareto_methods

    config = pareto.ParetoConfig(
        datasets=arguments.datasets,
        methods=pareto.choose_methods(arguments.methods),
        seeds=arguments.seeds,
        steps=arguments.steps,
        ladder=arguments.grid or pareto_methods.LADDER,
    )
    return pareto.run(
        config,
        arguments.data_dir,
        arguments.out,
        arguments.docs,
        console,
        render_only=arguments.render_only,
    )


def _radii(text: str) -> tuple[float, ...]:
    try:
        radii = tuple(map(float, parse.split(text)))
    except ValueError:
        radii = ()
    if not radii or not all(0 < rho < float("inf") for rho in radii):
        raise argparse.ArgumentTypeError(
            f"expected finite numbers > 0 with commas, got {text!r}"
        )
    return tuple(sorted(set(radii)))
