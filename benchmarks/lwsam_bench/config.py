"""What a training run is made of: frozen configurations and their defaults.

The defaults are the recipe of the layer-wise SAM paper for ResNet-20 on CIFAR-10. The
learning rate decays at the same fractions of a run whatever its length, so a short run
sees the whole schedule.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


DATASETS = ("digits", "fashion_mnist", "cifar10")
MODELS = ("smallcnn", "resnet20")
METHODS = ("sgd", "sam", "lwsam")
NORMALIZE = ("none", "selected", "full")

# The paper decays at epochs 100 and 130 of 150.
DECAY_AT = (100 / 150, 130 / 150)


@dataclasses.dataclass(frozen=True)
class DatasetDefaults:
    """What a dataset wants unless the user says otherwise."""

    model: str
    epochs: int
    augment: bool


DATASET_DEFAULTS: Mapping[str, DatasetDefaults] = {
    # Flipping or shifting a digit of 8 x 8 pixels can change what it is.
    "digits": DatasetDefaults(model="smallcnn", epochs=40, augment=False),
    "fashion_mnist": DatasetDefaults(model="resnet20", epochs=30, augment=True),
    "cifar10": DatasetDefaults(model="resnet20", epochs=150, augment=True),
}
FILE_DEFAULTS = DatasetDefaults(model="resnet20", epochs=150, augment=True)


@dataclasses.dataclass(frozen=True)
class MethodDefaults:
    """Hyperparameters of a method unless the user says otherwise."""

    k: int
    rho: float
    alpha: float
    normalize: str


METHOD_DEFAULTS: Mapping[str, MethodDefaults] = {
    "sgd": MethodDefaults(k=0, rho=0.0, alpha=1.0, normalize="none"),
    # Foret et al. (2021) for CIFAR-10.
    "sam": MethodDefaults(k=0, rho=0.05, alpha=1.0, normalize="selected"),
    # Lee (2024) for CIFAR-10: r = 0.1, alpha = 0.8, and no normalisation (Eq. 3).
    "lwsam": MethodDefaults(k=4, rho=0.1, alpha=0.8, normalize="none"),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a training run, and nothing else.

    Two runs with equal configurations on one machine end with equal parameters.
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
