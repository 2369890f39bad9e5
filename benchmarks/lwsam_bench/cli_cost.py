"""The commands `speed` and `pareto` of the command line: their arguments."""

import argparse
from collections.abc import Callable
from typing import Any

from lwsam_bench._errors import UserError
from lwsam_bench.arguments import DATA_DIR


# As in `speed.WORKLOADS` and `pareto.TASKS`, which import JAX; tests compare them.
SPEED_MODELS = ("resnet20", "wrn16-2", "vit-s", "gpt", "smallcnn")
PARETO_DATASETS = ("digits", "fashion_mnist")


def add(commands: Any, start: Callable[..., Any], count: Callable[[str], int]) -> None:
    """Add the commands.

    Args:
      commands: What `add_subparsers` returned.
      start: Prepares JAX and returns the console.
      count: Parses an integer >= 1.
    """
    _add_speed(
        commands.add_parser("speed", help="FLOPs, time and memory of each method"),
        start,
        count,
    )
    _add_pareto(
        commands.add_parser("pareto", help="accuracy over cost, resumable, an hour"),
        start,
        count,
    )


def _add_speed(
    parser: argparse.ArgumentParser,
    start: Callable[..., Any],
    count: Callable[[str], int],
) -> None:
    add_to = parser.add_argument
    add_to(
        "--models",
        type=_names(SPEED_MODELS),
        help=f"some of {', '.join(SPEED_MODELS)}, with commas (default: the first four)",
    )
    add_to("--batch-size", type=count, help="default: what suits model and CPU")
    add_to(
        "--steps",
        type=count,
        help="of each method (default 200); for --check of the paper's rule (default"
        " 400), those whose time counts run an eighth",
    )
    add_to("--burst", type=count, help="steps before the next method has its turn")
    add_to("--data-dir", help=DATA_DIR)
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
    from lwsam_bench import speed

    if arguments.smoke:
        config = speed.SMOKE
    elif arguments.check:
        config = speed.check(arguments.steps)
    else:
        config = speed.SpeedConfig(
            models=arguments.models or speed.SpeedConfig.models,
            steps=arguments.steps or speed.SpeedConfig.steps,
            batch_size=arguments.batch_size,
            burst=arguments.burst,
        )
    return speed.run(
        config,
        arguments.data_dir,
        arguments.out,
        arguments.docs,
        console,
        render_only=arguments.render_only,
    )


def _add_pareto(
    parser: argparse.ArgumentParser,
    start: Callable[..., Any],
    count: Callable[[str], int],
) -> None:
    add_to = parser.add_argument
    add_to("--datasets", type=_names(PARETO_DATASETS), default=PARETO_DATASETS)
    add_to("--methods", type=_split, default=(), help="default: all")
    add_to("--seeds", type=count, help="evaluated runs of each method")
    add_to("--steps", type=count, help="of each run")
    add_to("--grid", type=_radii, help="ladder of radii that each method climbs")
    add_to("--data-dir", help=DATA_DIR)
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
    from lwsam_bench import pareto, pareto_methods

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


def _split(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = _split(text)
        if not names or not set(names) <= set(known):
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(known)}, got {text!r}"
            )
        return names

    return parse


def _radii(text: str) -> tuple[float, ...]:
    try:
        radii = tuple(map(float, _split(text)))
    except ValueError:
        radii = ()
    if not radii or not all(0 < rho < float("inf") for rho in radii):
        raise argparse.ArgumentTypeError(
            f"expected finite numbers > 0 with commas, got {text!r}"
        )
    return tuple(sorted(set(radii)))
