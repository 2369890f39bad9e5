"""What a training run is made of: frozen configurations and their defaults.

The defaults are the recipe of the layer-wise SAM paper for ResNet-20 on CIFAR-10. The
learning rate decays at the same fractions of a run whatever its length, so a short run
sees the whole schedule.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


# Presets of the library that `training.family` makes.
FAMILY = (
    "sparse_sam",
    "sl_sam",
    "gcsam",
    "lightsam",
    "mup_perturbation",
    "stable_sam",
    "wsam",
    "gam",
    "ae_sam",
    "csam",
    "focal_sam",
    "imbsam",
    "adazo_sam",
    "lorenza",
    "async_sam",
    "m_sam",
    "random_sam",
    "rwp",
    "m_rwp",
    "arwp",
    "m_arwp",
    "damp",
)
# Of these, those whose direction is their own and takes no gradient.
OWN_DIRECTION = (
    "adazo_sam",
    "lorenza",
    "random_sam",
    "rwp",
    "m_rwp",
    "arwp",
    "m_arwp",
    "damp",
)
METHODS = (
    "sgd",
    "sam",
    "lwsam",
    "generalized_sam",
    "looksam",
    "asam",
    "sam_on",
    "gsam",
    "friendly_sam",
    "esam",
    "perturbed",
    "momentum_sam",
    *FAMILY,
)
# Along what the perturbation is: the second kind takes no gradient of its own.
STALE = ("momentum", "previous", "random")
ASCENTS = ("whole_batch", "micro_batch", *STALE)
# The shapes of the layer-wise paper, by what its radius is over; and all of them.
NORMALIZE: Mapping[str, str] = {
    "none": "raw",
    "selected": "normalized",
    "full": "normalized_all",
}
SHAPES = (*NORMALIZE.values(), "adaptive", "relative", "relative_filter")
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

    rho: float
    alpha: float = 1.0
    k: int = 0
    normalize: str = "selected"
    every: int = 1
    reuse: float = 0.0
    ascent: str = "whole_batch"
    shape: str | None = None


METHOD_DEFAULTS: Mapping[str, MethodDefaults] = {
    "sgd": MethodDefaults(rho=0.0, normalize="none"),
    # Foret et al. (2021) for CIFAR-10.
    "sam": MethodDefaults(rho=0.05),
    # Lee (2024) for CIFAR-10: r = 0.1, alpha = 0.8, and no normalisation (Eq. 3).
    "lwsam": MethodDefaults(rho=0.1, alpha=0.8, k=4, normalize="none"),
    # Zhao et al. (2022), as the layer-wise paper tuned it: Eq. 3 of that.
    "generalized_sam": MethodDefaults(rho=0.1, alpha=0.8, normalize="none"),
    # Liu et al. (2022): the radius of SAM, ascents in every third step (Lee, Table 1).
    "looksam": MethodDefaults(rho=0.05, every=3, reuse=0.7),
    # Kwon et al. (2021) for CIFAR-10.
    "asam": MethodDefaults(rho=0.5),
    # Mueller et al. (2023) for CIFAR.
    "sam_on": MethodDefaults(rho=0.5),
    # Zhuang et al. (2022): the smallest of their radii, which are for ImageNet.
    "gsam": MethodDefaults(rho=0.1, alpha=0.4),
    # Li et al. (2024) for CIFAR-10.
    "friendly_sam": MethodDefaults(rho=0.1),
    # Du et al. (2022).
    "esam": MethodDefaults(rho=0.05),
    "perturbed": MethodDefaults(rho=0.1, ascent="momentum", shape="relative"),
    # Becker et al. (2024), as their code is called.
    "momentum_sam": MethodDefaults(rho=3.0, ascent="momentum"),
    # Those of the library's docstrings; where none is published, one of SAM's size.
    "sparse_sam": MethodDefaults(rho=0.1),
    "sl_sam": MethodDefaults(rho=0.05, k=4),
    "gcsam": MethodDefaults(rho=0.05),
    "lightsam": MethodDefaults(rho=0.001),
    "mup_perturbation": MethodDefaults(rho=0.01),
    "stable_sam": MethodDefaults(rho=0.05),
    "wsam": MethodDefaults(rho=0.05),
    "gam": MethodDefaults(rho=0.2),
    "ae_sam": MethodDefaults(rho=0.05),
    "csam": MethodDefaults(rho=0.05),
    "focal_sam": MethodDefaults(rho=0.2),
    "imbsam": MethodDefaults(rho=0.05),
    "adazo_sam": MethodDefaults(rho=0.05),
    "lorenza": MethodDefaults(rho=0.05),
    "async_sam": MethodDefaults(rho=0.05),
    "m_sam": MethodDefaults(rho=0.05),
    "random_sam": MethodDefaults(rho=0.05),
    "rwp": MethodDefaults(rho=0.01),
    "m_rwp": MethodDefaults(rho=0.01),
    "arwp": MethodDefaults(rho=0.01),
    "m_arwp": MethodDefaults(rho=0.01),
    "damp": MethodDefaults(rho=0.2),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a training run, and nothing else.

    Two runs with equal configurations on one machine end with equal parameters.

    Attributes:
      dataset: One of `data.names.DATASETS`, or the path of an `.npz` file.
      model: A name that follows `models.names.SCHEME`.
      method: One of `METHODS`.
      k: Layers that `lwsam` perturbs, and those methods that perturb all layers if it is
        0.
      rho: Radius of the perturbation.
      alpha: Weight of the perturbed gradient; of `gsam` that of the surrogate gap.
      normalize: One of `NORMALIZE`.
      steps: Length of the run; exactly one of steps and epochs is given.
      epochs: Length of the run.
      criterion: Which layers `lwsam` takes: of the largest norms, of the smallest, drawn
        at random, or all of them.
      every: Period of the perturbation in steps.
      reuse: Weight of the stored direction in the steps of `looksam` between two ascents.
      max_overhead: As of `lwsam.Method`.
      mean_overhead: As of `lwsam.Method`.
      optimizer: One of `OPTIMIZERS`; `adamw` decouples the weight decay from the loss.
      train_images: Only so many training images, the first of a fixed random order; None
        takes all. Of a text, characters.
      test_images: Only so many test images, likewise.
      image_size: Sides in pixels to which images are resized; None leaves them. Datasets
        whose images differ in size have a default of their own.
      decay_at: Fractions of the run at which the learning rate falls by ten.
      weights: File of published weights for a network that is fine-tuned. It is the
        content that decides, not the path.
      ascent: One of `ASCENTS`.
      fraction: Share of the batch that the ascent `micro_batch` sees.
      shape: One of `SHAPES` that `normalize` has no name for; None if it has one. Not
        read of methods whose shape is their own.
      last: Only the last steps perturb, this share of the run; None is the whole run.
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
    ascent: str = "whole_batch"
    fraction: float | None = None
    shape: str | None = None
    last: float | None = None

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
    seconds: float | None = None  # of this call; then it stops, to go on in the next


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe each entry in which two configurations differ, as `name: old -> new`."""
    missing = "(not there)"
    return [
        f"{name}: {old.get(name, missing)} -> {new.get(name, missing)}"
        for name in sorted({*old, *new})
        if old.get(name, missing) != new.get(name, missing)
    ]
