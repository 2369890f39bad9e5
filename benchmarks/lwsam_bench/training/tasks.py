"""What a run learns, and how it is measured: images with labels, or a text."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lwsam_bench.data import sources, splits, text
from lwsam_bench.data.pipeline import make_batches
from lwsam_bench.models import by_name, names
from lwsam_bench.models.finetune import CHANNELS
from lwsam_bench.models.names import ModelName
from lwsam_bench.models.network import Network
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.processes import ALONE, Processes
from lwsam_bench.training import evaluation, recipe, vit_checkpoint
from lwsam_bench.training.config import TrainConfig
from lwsam_bench.training.family import reads_losses
from lwsam_bench.training.recipe import LossFn


VIT_EVAL_BATCH_SIZE = 100  # 224 x 224 pixels each


@dataclasses.dataclass(frozen=True)
class Task:
    """A network with its data, before the first step.

    Attributes:
      network: The network with its initial parameters.
      loss_fn: What `TrainStep` takes.
      batches: The batch of a step, a pure function of the number of the step.
      steps_per_epoch: Steps in which as much data is seen as there is.
      items_per_batch: Images, or characters to be predicted, in a batch.
      unit: What the items are: "images" or "tokens".
      evaluate: `evaluate(params, model_state)` returns loss and accuracy on data held
        out; of a text also the perplexity, exp(loss).
      fingerprint: Digest of the training data.
      note: What a reader has to know about the data; may be empty.
      weights: Digest of the file of published weights, if there is one.
      dataset: The images; None of a text.
      source: What the data is, for the record of a run.
    """

    network: Network
    loss_fn: LossFn
    batches: Callable[[int], Any]
    steps_per_epoch: int
    items_per_batch: int
    unit: str
    evaluate: Callable[[Any, Any], dict[str, float]]
    fingerprint: str
    note: str
    dataset: splits.Dataset | None
    source: Mapping[str, Any]
    weights: str | None = None

    def facts(self) -> dict[str, Any]:
        """Return what `recipe.make_step` wants to know of the data."""
        counts = None
        if self.dataset is not None:
            labels = self.dataset.train.labels
            counts = np.bincount(labels, minlength=self.dataset.num_classes)
        return {"steps_per_epoch": self.steps_per_epoch, "class_counts": counts}


def make(
    config: TrainConfig,
    data_dir: str | None,
    on_record: Callable[[int, int], None] | None = None,
    processes: Processes = ALONE,
) -> Task:
    """Read the data of a run and make its network.

    Args:
      config: The run.
      data_dir: Folder of tensorflow-datasets; see `splits.default_data_dir`.
      on_record: See `sources.load`.
      processes: Of which this is one: its batches have its rows alone.

    Raises:
      UserError: If data or weights are missing, or do not fit the network.
    """
    try:
        name = names.parse(config.model)
    except ValueError as error:
        raise UserError(str(error)) from error
    # Before the data are read: that takes longer.
    weights = vit_checkpoint.find(config, data_dir)
    is_text = config.dataset == text.NAME
    if is_text != name.reads_text:
        wanted = "gpt" if is_text else "one for images, such as resnet20"
        raise UserError(
            f"--model {config.model} cannot learn from --dataset {config.dataset}; take"
            f" {wanted}"
        )
    if is_text:
        return _text(config, text.load(data_dir), processes)
    dataset = sources.load(
        config.dataset,
        data_dir,
        on_record,
        image_size=config.image_size,
        train_images=config.train_images,
        test_images=config.test_images,
    )
    task = _images(config, name, dataset, weights, processes)
    digest = vit_checkpoint.digest(config, data_dir)
    return dataclasses.replace(task, weights=digest)


def _images(
    config: TrainConfig,
    name: ModelName,
    dataset: splits.Dataset,
    weights: pathlib.Path | None,
    processes: Processes,
) -> Task:
    if config.batch_size > len(dataset.train):
        raise UserError(
            f"--batch-size {config.batch_size} is more than the"
            f" {len(dataset.train)} training images of {config.dataset}"
        )
    mean, std = dataset.statistics()
    eval_batch_size = evaluation.EVAL_BATCH_SIZE
    if name.family == "vit":
        channels = dataset.image_shape[-1]
        if channels != CHANNELS:
            raise UserError(
                f"--model {config.model} reads images of {CHANNELS} channels; those of"
                f" {config.dataset} have {channels}"
            )
        # The pixels that the published backbone has learned from are from -1 to 1.
        mean = std = np.full(CHANNELS, 0.5, np.float32)
        eval_batch_size = VIT_EVAL_BATCH_SIZE
    network = _network(config, dataset.image_shape, dataset.num_classes, weights)
    batches = make_batches(
        dataset.train,
        batch_size=config.batch_size,
        seed=config.seed,
        mean=mean,
        std=std,
        augment=config.augment,
        own=processes.rows(config.batch_size),
    )
    return Task(
        network=network,
        loss_fn=recipe.make_loss_fn(
            network,
            weight_decay=recipe.weight_decay_in_loss(config),
            label_smoothing=config.label_smoothing,
            per_example=reads_losses(config.method),
        ),
        batches=batches,
        steps_per_epoch=batches.steps_per_epoch,
        items_per_batch=config.batch_size,
        unit="images",
        evaluate=evaluation.Evaluator(
            network,
            dataset.test,
            mean=mean,
            std=std,
            batch_size=eval_batch_size,
            processes=processes,
        ),
        fingerprint=dataset.fingerprint(),
        note=dataset.note,
        dataset=dataset,
        source={
            "name": dataset.name,
            "version": dataset.version,
            "note": dataset.note,
            "train_images": len(dataset.train),
            "test_images": len(dataset.test),
        },
    )


def _text(config: TrainConfig, source: text.Text, processes: Processes) -> Task:
    train = _first(source.characters, config.train_images, "--train-images")
    validation = _first(source.validation, config.test_images, "--test-images")
    source = dataclasses.replace(source, characters=train, validation=validation)
    network = _network(config, (), source.vocabulary)
    length = network.params["positions"][...].shape[0]
    items = config.batch_size * length
    if items >= len(train):
        raise UserError(
            f"--batch-size {config.batch_size} is more than the {len(train)} characters"
            f" have excerpts of {length}"
        )
    return Task(
        network=network,
        loss_fn=recipe.next_character_loss(
            network,
            weight_decay=recipe.weight_decay_in_loss(config),
            label_smoothing=config.label_smoothing,
            per_example=reads_losses(config.method),
        ),
        batches=text.TextBatches(
            train,
            batch_size=config.batch_size,
            length=length,
            seed=config.seed,
            own=processes.rows(config.batch_size),
        ),
        steps_per_epoch=len(train) // items,
        items_per_batch=items,
        unit="tokens",
        evaluate=evaluation.TextEvaluator(
            network, validation, length=length, processes=processes
        ),
        fingerprint=source.fingerprint(),
        note="",
        dataset=None,
        source={
            "name": text.NAME,
            "version": source.version,
            "note": "",
            "train_characters": len(train),
            "validation_characters": len(validation),
        },
    )


def _network(
    config: TrainConfig,
    image_shape: tuple[int, ...],
    num_classes: int,
    weights: pathlib.Path | None = None,
) -> Network:
    model: Any = by_name.build(
        config.model,
        image_shape=image_shape,
        num_classes=num_classes,
        seed=config.seed,
    )
    if weights is not None:
        vit_checkpoint.load(model, weights)
    return Network.of(model, by_name.trainable(config.model))


def _first(characters: np.ndarray, count: int | None, option: str) -> np.ndarray:
    if count is not None and count > len(characters):
        raise UserError(
            f"{option} {count} is more than the {len(characters)} there are"
        )
    return characters[:count]
