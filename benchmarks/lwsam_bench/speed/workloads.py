"""What `speed` trains: a network, its loss and its batches of real data, by name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from lwsam_bench.data import sources, splits, text
from lwsam_bench.data.augment import Batches
from lwsam_bench.models import by_name
from lwsam_bench.models.gpt import GPT
from lwsam_bench.models.network import Network
from lwsam_bench.models.vit import ViT
from lwsam_bench.models.wrn import WideResNet
from lwsam_bench.training.recipe import LossFn, make_loss_fn, next_character_loss


TITLES = {
    "resnet20": "ResNet-20",
    "wrn16-2": "WRN-16-2",
    "vit-s": "ViT-S",
    "gpt": "GPT",
    "smallcnn": "small CNN",
}
CONTEXT = 128  # characters that the GPT reads
MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network under training, before its first step."""

    title: str
    data: str  # the dataset, with its version
    loss_fn: LossFn
    params: Any
    model_state: Any
    batches: Callable[[int], Any]  # of a step
    optimizer: optax.GradientTransformation
    batch_size: int
    items: int  # of a batch
    unit: str  # what the items are

    def args(self, step: int = 0) -> tuple[Any, ...]:
        """Return the arguments of the loss."""
        key = jax.random.key(0)
        return self.params, self.model_state, self.batches(step), key


def make(
    name: str, *, batch_size: int | None, data_dir: str | None, seed: int = 0
) -> Workload:
    """Make a workload.

    Args:
      name: A key of `WORKLOADS`.
      batch_size: Images or excerpts in a batch; None takes the default of `WORKLOADS`.
      data_dir: Folder of tensorflow-datasets.
      seed: Decides initial parameters, order and augmentation.

    Raises:
      UserError: If the data is not there.
    """
    build, default = WORKLOADS[name]
    return build(batch_size or default, data_dir, seed)


def _images(
    title: str,
    dataset: splits.Dataset,
    model: nnx.Module,
    *,
    batch_size: int,
    seed: int,
    lr: float,
    augment: bool,
) -> Workload:
    network = Network.of(model)
    mean, std = dataset.statistics()
    return Workload(
        title=title,
        data=". ".join(
            filter(None, (f"{dataset.name} {dataset.version}", dataset.note))
        ),
        loss_fn=make_loss_fn(network, weight_decay=1e-4, label_smoothing=0.1),
        params=network.params,
        model_state=network.model_state,
        batches=Batches(
            dataset.train,
            batch_size=batch_size,
            seed=seed,
            mean=mean,
            std=std,
            augment=augment,
        ),
        optimizer=optax.sgd(lr, momentum=MOMENTUM),
        batch_size=batch_size,
        items=batch_size,
        unit="images",
    )


def _cifar10(
    title: str, make_model: Callable[[splits.Dataset, nnx.Rngs], nnx.Module], lr: float
) -> Callable[[int, str | None, int], Workload]:
    def build(batch_size: int, data_dir: str | None, seed: int) -> Workload:
        dataset = sources.load("cifar10", data_dir)
        return _images(
            title,
            dataset,
            make_model(dataset, nnx.Rngs(seed)),
            batch_size=batch_size,
            seed=seed,
            lr=lr,
            augment=True,
        )

    return build


def _small_cnn(batch_size: int, data_dir: str | None, seed: int) -> Workload:
    del data_dir  # the digits are inside scikit-learn
    dataset = sources.load("digits")
    model = by_name.build(
        "smallcnn",
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        seed=seed,
    )
    return _images(
        TITLES["smallcnn"],
        dataset,
        model,
        batch_size=batch_size,
        seed=seed,
        lr=0.1,
        augment=False,
    )


def _gpt(batch_size: int, data_dir: str | None, seed: int) -> Workload:
    shakespeare = text.load(data_dir)
    model = GPT(shakespeare.vocabulary, context=CONTEXT, rngs=nnx.Rngs(seed))
    return gpt_workload(shakespeare, model, batch_size=batch_size, seed=seed)


def gpt_workload(
    source: text.Text, model: GPT, *, batch_size: int, seed: int, length: int = CONTEXT
) -> Workload:
    """Make the workload of a GPT of any size on a text."""
    network = Network.of(model)
    return Workload(
        title=TITLES["gpt"],
        data=f"{text.NAME} {source.version}",
        loss_fn=next_character_loss(network),
        params=network.params,
        model_state=network.model_state,
        batches=text.TextBatches(
            np.asarray(source.characters),
            batch_size=batch_size,
            length=length,
            seed=seed,
        ),
        optimizer=optax.sgd(0.1, momentum=MOMENTUM),
        batch_size=batch_size,
        items=batch_size * length,
        unit="tokens",
    )


def _resnet20(dataset: splits.Dataset, rngs: nnx.Rngs) -> nnx.Module:
    return by_name.ResNet(dataset.image_shape[-1], dataset.num_classes, rngs=rngs)


def _wrn(dataset: splits.Dataset, rngs: nnx.Rngs) -> nnx.Module:
    return WideResNet(dataset.image_shape[-1], dataset.num_classes, rngs=rngs)


def _vit(dataset: splits.Dataset, rngs: nnx.Rngs) -> nnx.Module:
    # ViT-S/16 reads 14 x 14 patches; patches of 4 give an image of 32 pixels 8 x 8.
    return ViT(dataset.image_shape, dataset.num_classes, patch=4, rngs=rngs)


# How to make each, and the size of a batch that a CPU manages in a second or so.
WORKLOADS: Mapping[str, tuple[Callable[[int, str | None, int], Workload], int]] = {
    "resnet20": (_cifar10(TITLES["resnet20"], _resnet20, 0.1), 128),
    "wrn16-2": (_cifar10(TITLES["wrn16-2"], _wrn, 0.1), 64),
    "vit-s": (_cifar10(TITLES["vit-s"], _vit, 0.01), 16),
    "gpt": (_gpt, 16),
    "smallcnn": (_small_cnn, 100),
}
