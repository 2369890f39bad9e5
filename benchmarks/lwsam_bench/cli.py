"""The command line `lwsam-bench`: it reads arguments and calls what does the work."""

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence

from lwsam_bench import cli_cost
from lwsam_bench._errors import UserError
from lwsam_bench.config import (
    DATASET_DEFAULTS,
    DATASETS,
    FILE_DEFAULTS,
    METHOD_DEFAULTS,
    METHODS,
    MODELS,
    NORMALIZE,
    RunOptions,
    TrainConfig,
)


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
    _add_train(commands.add_parser("train", help="train one network"))
    _add_flops(commands.add_parser("flops", help="FLOPs of a step over a gradient"))
    cli_cost.add(commands, _start, _count)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="lwsam-demo", help="folder for the results")
    parser.add_argument("--seeds", type=_count, default=3, help="runs of each method")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_count, help="epochs of 10 steps each")
    length.add_argument("--steps", type=_count, help="steps, rounded up to epochs")
    parser.add_argument(
        "--tune", action="store_true", help="look for the best radius of each method"
    )
    parser.set_defaults(run=_demo)


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--dataset",
        default="digits",
        help=f"{', '.join(DATASETS)}, or an .npz file with the arrays x_train, x_test"
        " (uint8 images) and y_train, y_test (integer labels)",
    )
    add("--model", choices=MODELS, help="default: what suits the dataset")
    add("--method", choices=METHODS, default="lwsam")
    add("--k", type=_count, help="layers that lwsam perturbs (default 4)")
    add("--rho", type=_non_negative, help="radius (default: of the method's paper)")
    add("--alpha", type=_non_negative, help="weight of the perturbed gradient")
    add("--normalize", choices=NORMALIZE, help="norm that the perturbation is over")
    add("--lr", type=_non_negative, default=TrainConfig.lr)
    add("--momentum", type=_non_negative, default=TrainConfig.momentum)
    add("--weight-decay", type=_non_negative, default=TrainConfig.weight_decay)
    add("--label-smoothing", type=_fraction, default=TrainConfig.label_smoothing)
    add("--batch-size", type=_count, default=TrainConfig.batch_size)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_count)
    length.add_argument("--steps", type=_count)
    add("--seed", type=_seed, default=TrainConfig.seed)
    add("--augment", action=argparse.BooleanOptionalAction, help="pad, crop and flip")
    add(
        "--data-dir",
        help="folder of tensorflow-datasets (default: TFDS_DATA_DIR, then"
        " ~/tensorflow_datasets)",
    )
    add("--out", default="lwsam-run", help="folder for checkpoints and metrics")
    add("--log-every", type=_count, help="steps between rows of metrics.jsonl")
    add("--checkpoint-every", type=_count, help="steps between checkpoints")
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with the run in --out, if there is one; --no-resume replaces it",
    )
    parser.set_defaults(run=_train)


def _add_flops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("resnet20",), default="resnet20")
    parser.add_argument("--batch-size", type=_count, default=64)
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


def _train(arguments: argparse.Namespace) -> int:
    config = train_config(arguments)
    options = RunOptions(
        out=arguments.out,
        data_dir=arguments.data_dir,
        log_every=arguments.log_every or (1 if config.steps else 50),
        checkpoint_every=arguments.checkpoint_every,
        resume=arguments.resume,
    )
    console = _start()
    from lwsam_bench import loop

    return loop.train(config, options, console)


def _flops(arguments: argparse.Namespace) -> int:
    console = _start(cache=False)  # it counts what it compiles
    from lwsam_bench import flops

    return flops.run(arguments.batch_size, console)


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """Fill in what the user left open."""
    name = arguments.dataset
    if name not in DATASETS and not name.endswith(".npz"):
        raise UserError(
            f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}, or the"
            " path of an .npz file"
        )
    dataset = DATASET_DEFAULTS.get(name, FILE_DEFAULTS)
    method = METHOD_DEFAULTS[arguments.method]
    if arguments.method == "sgd":
        for option in ("k", "rho", "alpha", "normalize"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option} has no meaning for --method sgd")
    if arguments.method == "sam" and arguments.k is not None:
        raise UserError("--k has no meaning for --method sam, which takes every layer")
    epochs = arguments.epochs
    if arguments.steps is None and epochs is None:
        epochs = dataset.epochs
    return TrainConfig(
        dataset=name,
        model=arguments.model or dataset.model,
        method=arguments.method,
        k=_or(arguments.k, method.k),
        rho=_or(arguments.rho, method.rho),
        alpha=_or(arguments.alpha, method.alpha),
        normalize=_or(arguments.normalize, method.normalize),
        steps=arguments.steps,
        epochs=epochs,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        momentum=arguments.momentum,
        weight_decay=arguments.weight_decay,
        label_smoothing=arguments.label_smoothing,
        augment=_or(arguments.augment, dataset.augment),
    )


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


def _or(value, default):
    return default if value is None else value


def _number(text: str, kind: Callable, holds: Callable, expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _count(text: str) -> int:
    return _number(text, int, lambda x: x >= 1, "an integer >= 1")


def _seed(text: str) -> int:
    return _number(text, int, lambda x: 0 <= x < 2**31, "an integer from 0 to 2^31 - 1")


def _non_negative(text: str) -> float:
    return _number(
        text, float, lambda x: math.isfinite(x) and x >= 0, "a finite number >= 0"
    )


def _fraction(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
