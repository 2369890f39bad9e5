"""The command `train` of the command line: its arguments, and what they stand for."""

import argparse
from collections.abc import Callable
from typing import Any

from lwsam_bench.commands.options import (
    arguments as parse,
    method as cli_method,
    processes as group_options,
)
from lwsam_bench.commands.options.method import filled, refuse
from lwsam_bench.data.names import DATASETS
from lwsam_bench.models import names
from lwsam_bench.support.errors import UserError
from lwsam_bench.training.config import (
    DATASET_DEFAULTS,
    FILE_DEFAULTS,
    LOG_EVERY,
    OPTIMIZERS,
    RunOptions,
    TrainConfig,
)


# The learning rate of AdamW, and of a new head on a network that is trained already.
_SMALL_LR = 0.001


def add(commands: Any, start: Callable[..., Any]) -> None:
    """Add the command.

    Args:
      commands: What `add_subparsers` returned.
      start: Prepares JAX and returns the console.
    """
    parser = commands.add_parser("train", help="train one network")
    add = parser.add_argument
    add(
        "--dataset",
        default="digits",
        help=f"{', '.join(DATASETS)}, or an .npz file with the arrays x_train, x_test"
        " (uint8 images) and y_train, y_test (integer labels)",
    )
    add(
        "--model",
        type=parse.model,
        help=f"{names.SCHEME}; default: what suits the dataset",
    )
    cli_method.add(parser)
    add("--optimizer", choices=OPTIMIZERS, default=TrainConfig.optimizer)
    add("--lr", type=parse.non_negative, help="default: 0.1; 0.001 for adamw and ViT")
    add("--momentum", type=parse.non_negative, help="of sgd (default 0.9)")
    add("--weight-decay", type=parse.non_negative, default=TrainConfig.weight_decay)
    add("--label-smoothing", type=parse.fraction, help="default: 0.1; 0 for a text")
    add("--batch-size", type=parse.count, help="default: 128; 40 for Flowers")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=parse.count)
    length.add_argument("--steps", type=parse.count)
    add("--seed", type=parse.seed, default=TrainConfig.seed)
    _add_data(parser)
    add("--out", default="lwsam-run", help="folder for checkpoints and metrics")
    add("--log-every", type=parse.count, help="steps between rows of metrics.jsonl")
    add("--checkpoint-every", type=parse.count, help="steps between checkpoints")
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with the run in --out, if there is one; --no-resume replaces it",
    )
    group_options.add(parser)
    parser.set_defaults(run=lambda arguments: _train(arguments, start))


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--augment", action=argparse.BooleanOptionalAction, help="pad, crop and flip")
    add("--train-images", type=parse.count, help="only so many; of a text, characters")
    add("--test-images", type=parse.count, help="only so many; of a text, characters")
    add("--image-size", type=parse.count, help="sides to which images are resized")
    add(
        "--weights",
        help="safetensors file of a ViT-B/16 trained on ImageNet, in timm's layout"
        " (default: vit_base_patch16_224.safetensors in the folder of the data)",
    )
    add("--data-dir", help=parse.DATA_DIR)


def _train(arguments: argparse.Namespace, start: Callable[..., Any]) -> int:
    config = train_config(arguments)
    group = group_options.read(arguments)
    options = RunOptions(
        out=arguments.out,
        data_dir=arguments.data_dir,
        log_every=arguments.log_every or (1 if config.steps else LOG_EVERY),
        checkpoint_every=arguments.checkpoint_every,
        resume=arguments.resume,
    )
    console = start()
    if group is None:
        from lwsam_bench.training import loop

        return loop.train(config, options, console)
    from lwsam_bench.support import processes

    # Before what imports more of JAX.
    joined = processes.join(group.coordinator, group.index, group.count)
    console.quiet = not joined.is_first
    from lwsam_bench.training import loop

    return group_options.alike(
        lambda: loop.train(config, options, console, joined), joined.index
    )


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """Fill in what the user left open.

    Raises:
      UserError: If an option has no meaning beside the others.
    """
    name = arguments.dataset
    if name not in DATASETS and not name.endswith(".npz"):
        raise UserError(
            f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}, or the"
            " path of an .npz file"
        )
    dataset = DATASET_DEFAULTS.get(name, FILE_DEFAULTS)
    model = names.parse(arguments.model or dataset.model)
    method = cli_method.fields(arguments)
    if model.reads_text:
        refuse(arguments, ("augment", "image_size"), "model", model.name)
    if model.family != "vit":
        refuse(arguments, ("weights",), "model", model.name)
    if arguments.optimizer != "sgd":
        refuse(arguments, ("momentum",), "optimizer", arguments.optimizer)
    is_slow = arguments.optimizer == "adamw" or model.family == "vit"
    epochs = arguments.epochs
    if arguments.steps is None and epochs is None:
        epochs = dataset.epochs
    return TrainConfig(
        dataset=name,
        model=model.name,
        steps=arguments.steps,
        epochs=epochs,
        seed=arguments.seed,
        batch_size=filled(arguments.batch_size, dataset.batch_size),
        lr=filled(arguments.lr, _SMALL_LR if is_slow else TrainConfig.lr),
        momentum=filled(arguments.momentum, TrainConfig.momentum),
        weight_decay=arguments.weight_decay,
        label_smoothing=filled(arguments.label_smoothing, dataset.label_smoothing),
        augment=filled(arguments.augment, dataset.augment),
        optimizer=arguments.optimizer,
        train_images=arguments.train_images,
        test_images=arguments.test_images,
        image_size=arguments.image_size,
        weights=arguments.weights,
        **method,
    )
