"""The command `tune` of the command line: its arguments."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from lwsam_bench.commands.options import arguments as parse
from lwsam_bench.tuning.tasks import TASKS


def add(commands: Any, start: Callable[..., Any]) -> None:
    """Add the command.

    Args:
      commands: What `add_subparsers` returned.
      start: Prepares JAX and returns the console.
    """
    parser = commands.add_parser(
        "tune", help="tune all methods alike, resumable, minutes a method"
    )
    add_to = parser.add_argument
    add_to("task", choices=TASKS)
    add_to("--noise", type=parse.fraction, default=0.0, help="of the training labels")
    add_to("--batch", type=parse.count, default=100, help="images in a batch")
    add_to(
        "--methods",
        type=parse.split,
        default=("five",),
        help="names with commas, or all, five, five-adamw, family (default: five)",
    )
    add_to("--trials", type=parse.count, default=32, help="of each method")
    add_to("--seeds", type=parse.count, default=5, help="fresh ones, for the best")
    add_to("--draws", type=parse.count, default=2, help="sets of draws")
    add_to("--processes", type=int, choices=(1, 2), default=1)
    add_to("--data-dir", help=parse.DATA_DIR)
    add_to(
        "--docs",
        help="folder of the documentation whose pages to bring up to date, from all"
        " tunings beside --out",
    )
    add_to("--out", help="folder for the results (default: lwsam-tune/, by the task)")
    add_to(
        "--render-only",
        action="store_true",
        help="train nothing: tables and plots of the rows that are in --out",
    )
    parser.set_defaults(run=lambda arguments: _tune(arguments, start))


def _tune(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start()
    from lwsam_bench.tuning import methods, tune
    from lwsam_bench.tuning.protocol import Protocol

    task = dataclasses.replace(
        TASKS[arguments.task], noise=arguments.noise, batch_size=arguments.batch
    )
    return tune.run(
        task,
        methods.choose(arguments.methods),
        Protocol(arguments.trials, arguments.seeds, arguments.draws),
        arguments.data_dir,
        arguments.out or f"lwsam-tune/{task.label}",
        console,
        docs=arguments.docs,
        processes=arguments.processes,
        render_only=arguments.render_only,
    )
