"""The command `precision` of the command line: its arguments."""

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
        "precision", help="bfloat16 and float16 beside float32, with NaNs in the data"
    )
    add_to = parser.add_argument
    add_to("--dataset", help="default cifar10")
    add_to("--seeds", type=parse.count, default=3, help="runs of each precision")
    add_to("--steps", type=parse.count, help="of each run")
    add_to("--train-images", type=parse.count, help="only so many")
    add_to("--test-images", type=parse.count, help="only so many")
    add_to("--image-size", type=parse.count, help="sides to which images are resized")
    add_to("--batch-size", type=parse.count)
    add_to("--data-dir", help=parse.DATA_DIR)
    add_to("--out", default="lwsam-precision", help="folder for rows and table")
    parser.set_defaults(run=lambda arguments: _precision(arguments, start))


def _precision(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    console = start()
    from lwsam_bench.comparison import precision, precision_train

    named = (
        "dataset",
        "steps",
        "train_images",
        "test_images",
        "image_size",
        "batch_size",
    )
    given = {name: getattr(arguments, name) for name in named}
    task = precision_train.Task(**{k: v for k, v in given.items() if v is not None})
    config = precision.PrecisionConfig(task=task, seeds=arguments.seeds)
    return precision.run(config, arguments.data_dir, arguments.out, console)
