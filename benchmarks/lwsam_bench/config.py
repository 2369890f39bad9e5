"""What a training run is made of: frozen configurations and their defaults.

The defaults are the recipe of the layer-wise SAM paper for ResNet-20 on CIFAR-10. The
learning rate decays at the same fractions of a run whatever its length, so a short run
sees the whole schedule.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


DATASETS = (
    "digits",
    "fashion_mnist",
    "cifar10",
    "cifar100",
    "oxford_flowers102",
    "oxford_flowers102_subset",
    "tiny_shakespeare",
)
METHODS = ("sgd", "sam", "gsam", "looksam", "lwsam")
NORMALIZE = ("none", "selected", "full")
CRITERIA = ("high", "low", "random", "all")
OPTIMIZERS = ("sgd", "adamw")

# Steps between the rows of a long run: a multiple of no period of ascents, or a method
# that ascends now and then would be seen only in its ascents, or never.
LOG_EVERY = 49

# The paper decays at epochs 100 and 130 of 150.
DECAY_AT = (100 / 150, 130 / 150)


@dataclasses.dataclass(frozen=True)
class DatasetDefaults:
    """What a dataset wants unless the user says otherwise."""

    model: str
    epochs: int
    augment: bool
    batch_size: int = 128
    label_smoothing: float = 0.1


_FLOWERS = DatasetDefaults(model="wrn16-2", epochs=100, augment=True, batch_size=40)
DATASET_DEFAULTS: Mapping[str, DatasetDefaults] = {
    # Flipping or shifting a digit of 8 x 8 pixels can change what it is.
    "digits": DatasetDefaults(model="smallcnn", epochs=40, augment=False),
    "fashion_mnist": DatasetDefaults(model="resnet20", epochs=30, augment=True),
    "cifar10": DatasetDefaults(model="resnet20", epochs=150, augment=True),
    "cifar100": DatasetDefaults(model="wrn28-10", epochs=200, augment=True),
    "oxford_flowers102": _FLOWERS,
    "oxford_flowers102_subset": _FLOWERS,
    "tiny_shakespeare": DatasetDefaults(
        model="gpt", epochs=10, augment=False, batch_size=64, label_smoothing=0.0
    ),
}
FILE_DEFAULTS = DatasetDefaults(model="resnet20", epochs=150, augment=True)


@dataclasses.dataclass(frozen=True)
class MethodDefaults:
    """Hyperparameters of a method unless the user says otherwise."""

    k: int
    rho: float
    alpha: float
    normalize: str
    every: int = 1
    reuse: float = 0.0


METHOD_DEFAULTS: Mapping[str, MethodDefaults] = {
    "sgd": MethodDefaults(k=0, rho=0.0, alpha=1.0, normalize="none"),
    # Foret et al. (2021) for CIFAR-10.
    "sam": MethodDefaults(k=0, rho=0.05, alpha=1.0, normalize="selected"),
    # Lee (2024) for CIFAR-10: r = 0.1, alpha = 0.8, and no normalisation (Eq. 3).
    "lwsam": MethodDefaults(k=4, rho=0.1, alpha=0.8, normalize="none"),
    # Zhao et al. (2022), as the layer-wise paper tuned it: Eq. 3 of that.
    "gsam": MethodDefaults(k=0, rho=0.1, alpha=0.8, normalize="none"),
    # Liu et al. (2022): the radius of SAM, ascents in every third step (Lee, Table 1).
    "looksam": MethodDefaults(
        k=0, rho=0.05, alpha=1.0, normalize="selected", every=3, reuse=0.7
    ),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a training run, and nothing else.

    Two runs with equal configurations on one machine end with equal parameters.

    Attributes:
      dataset: One of `DATASETS`, or the path of an `.npz` file.
      model: A name that follows `model_names.SCHEME`.
      method: One of `METHODS`.
      k: Layers that `lwsam` perturbs.
      rho: Radius of the perturbation.
      alpha: Weight of the perturbed gradient.
      normalize: One of `NORMALIZE`.
      steps: Length of the run; exactly one of steps and epochs is given.
      epochs: Length of the run.
      criterion: Which layers `lwsam` takes: of the largest norms, of the smallest, drawn
        at random, or all of them.
      every: Period of the ascent in steps, for every method that has one.
      reuse: Weight of the stored direction in the steps of `looksam` between two ascents.
      max_overhead: As of `lwsam.LayerwiseSAM`.
      mean_overhead: As of `lwsam.LayerwiseSAM`.
      optimizer: One of `OPTIMIZERS`; `adamw` decouples the weight decay from the loss.
      train_images: Only so many training images, the first of a fixed random order; None
        takes all. Of a text, characters.
      test_images: Only so many test images, likewise.
      image_size: Sides in pixels to which images are resized; None leaves them. Datasets
        whose images differ in size have a default of their own.
      decay_at: Fractions of the run at which the learning rate falls by ten.
      weights: File of published weights for a network that is fine-tuned. It is the
        content that decides, not the path.
    """

    dataset: str
    model: str
    method: str
    k: int
    rho: float
    alpha: float
    normalize: str
    steps: int | None  # exactly one of steps and epochs is given
    epochs: int | None
    seed: int = 0
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    augment: bool = True
    criterion: str = "high"
    every: int = 1
    reuse: float = 0.0
    max_overhead: float | None = None
    mean_overhead: float | None = None
    optimizer: str = "sgd"
    train_images: int | None = None
    test_images: int | None = None
    image_size: int | None = None
    decay_at: tuple[float, ...] = DECAY_AT
    weights: str | None = None

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of training steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * steps_per_epoch


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What does not change the result: where to read and write, and how often."""

    out: str
    data_dir: str | None
    log_every: int
    checkpoint_every: int | None  # steps; None: ten times a run, but once an epoch
    resume: bool = True


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe each entry in which two configurations differ, as `name: old -> new`."""
    missing = "(not there)"
    return [
        f"{name}: {old.get(name, missing)} -> {new.get(name, missing)}"
        for name in sorted({*old, *new})
        if old.get(name, missing) != new.get(name, missing)
    ]
