"""The paper's four benchmarks and a language model in numbers, at each scale."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lwsam_bench.paper.published import RECIPES
from lwsam_bench.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the methods of a benchmark share, and the two numbers in Table 1's brackets.

    Attributes:
      layers: Layers that the model has, of which k can be perturbed at most.
      k: Layers that layer-wise SAM perturbs.
      every: Interval at which LookSAM ascends.
      rho: Radius of generalised and layer-wise SAM, the paper's r.
      alpha: Of the same two.

    The others are as in `TrainConfig`.
    """

    dataset: str
    model: str
    layers: int
    k: int
    every: int
    batch_size: int = 128
    lr: float = 0.1
    rho: float = 0.1
    alpha: float = 0.8
    epochs: int | None = None
    steps: int | None = None
    train_images: int | None = None
    test_images: int | None = None
    image_size: int | None = None
    augment: bool = True
    label_smoothing: float = TrainConfig.label_smoothing


def _recipe(
    benchmark: str, dataset: str, model: str, layers: int, **more: Any
) -> Setup:
    """Return what Table 1 says of a benchmark."""
    row = RECIPES[benchmark]
    return Setup(
        dataset,
        model,
        layers,
        k=row.k,
        every=row.interval,
        batch_size=row.batch_size,
        lr=row.learning_rate,
        alpha=row.alpha,
        epochs=row.epochs,
        **more,
    )


PAPER: Mapping[str, Setup] = {
    "cifar10": _recipe("cifar10", "cifar10", "resnet20", 20),
    "cifar100": _recipe("cifar100", "cifar100", "wrn28-10", 29),
    "flowers": _recipe("flowers", "oxford_flowers102", "wrn16-2", 17),
    # Of the ViT, only the two new layers are trained.
    "vit": _recipe("vit", "cifar100", "vit-b16", 2),
    # The paper has no numbers for a language model, so there is no recipe to follow.
    "lm": Setup(
        "tiny_shakespeare",
        "gpt",
        27,
        k=4,
        every=3,
        steps=5_000,
        batch_size=64,
        augment=False,
        label_smoothing=0.0,
    ),
}
CHANGES: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "small": {
        "cifar10": {
            "model": "resnet8w8",
            "layers": 8,
            "epochs": 10,
            "train_images": 2_000,
            "test_images": 1_000,
        },
        "cifar100": {
            "model": "wrn10-1",
            "layers": 10,
            "epochs": 10,
            "train_images": 2_000,
            "test_images": 1_000,
        },
        "flowers": {
            "dataset": "oxford_flowers102_subset",
            "model": "wrn10-1",
            "layers": 10,
            "epochs": 6,
            "train_images": 1_500,
            "image_size": 32,
        },
        "vit": {
            "model": "vit-tiny",
            "epochs": 2,
            "train_images": 2_000,
            "test_images": 1_000,
        },
        "lm": {"steps": 300, "batch_size": 16, "test_images": 32_768},
    },
    "smoke": {
        "cifar10": {
            "model": "tinycnn",
            "layers": 4,
            "k": 2,
            "epochs": 2,
            "batch_size": 32,
            "train_images": 32,
            "test_images": 64,
        },
        "cifar100": {
            "model": "tinycnn",
            "layers": 4,
            "k": 2,
            "epochs": 2,
            "batch_size": 8,
            "train_images": 8,
            "test_images": 64,
        },
        "flowers": {
            "dataset": "oxford_flowers102_subset",
            "model": "tinycnn",
            "layers": 4,
            "k": 2,
            "epochs": 2,
            "batch_size": 8,
            "train_images": 8,
            "test_images": 64,
            "image_size": 16,
        },
        "vit": {
            "model": "vit-tiny",
            "epochs": 2,
            "batch_size": 8,
            "train_images": 8,
            "test_images": 64,
        },
        "lm": {
            "model": "gpt-tiny",
            "layers": 9,
            "steps": 4,
            "batch_size": 4,
            "train_images": 20_000,
            "test_images": 2_000,
        },
    },
    "paper": {},
}
