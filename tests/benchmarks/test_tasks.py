"""What a run learns: images and texts, whole runs of the smallest networks."""

import dataclasses
import io
import json
import math

import jax
import numpy as np
import pytest
from rich.console import Console

from lwsam_bench.commands.cli import _parser
from lwsam_bench.commands.train import train_config
from lwsam_bench.data import pipeline, sources, splits, text
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import read_rows
from lwsam_bench.training import evaluation, loop, recipe, tasks
from lwsam_bench.training.config import RunOptions


def config(*arguments):
    return train_config(_parser().parse_args(["train", *map(str, arguments)]))


def train(out, wanted, data_dir=None):
    """Run to the end; return the rows."""
    console = Console(file=io.StringIO(), width=200)
    options = RunOptions(
        out=str(out), data_dir=data_dir, log_every=1, checkpoint_every=None
    )
    assert loop.train(wanted, options, console) == 0
    return list(read_rows(out / "metrics.jsonl"))


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    """A file of images of three channels."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(
        path,
        x_train=rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8),
        y_train=np.arange(24) % 4,
        x_test=rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8),
        y_test=np.arange(9) % 4,
    )
    return str(path)


TINY = ("--batch-size", 8, "--steps", 3)


def test_fine_tuning_leaves_the_backbone_alone(blobs, tmp_path):
    wanted = config("--dataset", blobs, "--model", "vit-tiny", "--k", 1, *TINY)
    rows = train(tmp_path, wanted)
    assert [row["kind"] for row in rows] == ["train"] * 3 + ["test", "end"]
    assert set(rows[0]["norms"]) == {"head/hidden", "head/dense"}
    # The backbone is not run twice, and nothing runs back through it.
    assert all(row["overhead"] < 0.1 for row in rows if row["kind"] == "train")
    task = tasks.make(wanted, None)
    state = loop.final_state(tmp_path, wanted, task)
    jax.tree.map(
        np.testing.assert_array_equal, state.model_state, task.network.model_state
    )
    moved = [
        np.any(a != b)
        for a, b in zip(
            jax.tree.leaves(state.params),
            jax.tree.leaves(task.network.params),
            strict=True,
        )
    ]
    assert all(moved)


def test_pixels_for_a_vit_are_from_minus_one_to_one(blobs):
    wanted = config("--dataset", blobs, "--model", "vit-tiny", "--no-augment", *TINY)
    image = np.asarray(tasks.make(wanted, None).batches(0)["image"])
    assert image.min() == -1.0
    assert image.max() == 1.0


def test_a_vit_wants_three_channels():
    wanted = config("--dataset", "digits", "--model", "vit-tiny")
    with pytest.raises(UserError, match="images of 3 channels; those of digits have 1"):
        tasks.make(wanted, None)


def test_missing_weights_are_said_before_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "load", None)
    wanted = config("--dataset", "cifar100", "--model", "vit-b16")
    with pytest.raises(UserError, match="--weights"):
        tasks.make(wanted, str(tmp_path))


def test_images_may_stay_on_the_host(blobs, monkeypatch):
    wanted = config("--dataset", blobs, "--model", "wrn10-1", *TINY)
    on_device = tasks.make(wanted, None)
    monkeypatch.setattr(splits, "DEVICE_BYTES", 100)
    on_host = tasks.make(wanted, None)
    assert isinstance(on_host.batches, pipeline.HostBatches)
    jax.tree.map(
        np.testing.assert_array_equal, on_host.batches(4), on_device.batches(4)
    )
    state = (on_host.network.params, on_host.network.model_state)
    assert on_host.evaluate(*state) == on_device.evaluate(*state)


def test_a_task_says_what_it_is(blobs):
    task = tasks.make(
        config("--dataset", blobs, "--model", "resnet8w4", "--train-images", 20, *TINY),
        None,
    )
    assert (task.steps_per_epoch, task.items_per_batch, task.unit) == (2, 8, "images")
    assert task.source["train_images"] == 20
    assert task.source["test_images"] == 9
    assert task.dataset is not None
    assert task.dataset.num_classes == 4
    assert task.fingerprint == task.dataset.fingerprint()
    assert task.weights is None


def test_language_model(data_dir, tmp_path):
    wanted = config(
        *("--dataset", "tiny_shakespeare", "--model", "gpt-tiny", "--method", "sgd"),
        *("--optimizer", "adamw", "--train-images", 4_000, "--test-images", 200),
        *TINY,
    )
    *_, test, end = train(tmp_path, wanted, str(data_dir))
    assert end["perplexity"] == test["perplexity"] == math.exp(end["loss"])
    assert 20 < end["perplexity"] < 90  # of 65 characters
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["data"]["name"] == "tiny_shakespeare"
    assert record["data"]["train_characters"] == 4_000
    with pytest.raises(UserError, match="--train-images 2000000 is more than the 1003"):
        tasks.make(dataclasses.replace(wanted, train_images=2_000_000), str(data_dir))
    with pytest.raises(UserError, match="--batch-size 500 is more than"):
        tasks.make(dataclasses.replace(wanted, batch_size=500), str(data_dir))


class Bigram:
    """In place of a network: the logits of the next character, given one."""

    def __init__(self, table):
        self._table = table

    def apply(self, params, model_state, given, *, train):
        del train
        return params * self._table[given], model_state


def test_perplexity_counts_each_character_but_the_first_once():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(7, 7)).astype(np.float32)
    characters = rng.integers(0, 7, 48).astype(np.uint8)
    log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
    given, following = characters[:-1], characters[1:]
    loss = -log_p[given, following].mean()
    hits = np.mean(table[given].argmax(1) == following)
    network = Bigram(jax.numpy.asarray(table))
    for length, batch_size in ((5, 4), (47, 1), (10, 100), (8, 3)):
        evaluate = evaluation.TextEvaluator(
            network, characters, length=length, batch_size=batch_size
        )
        result = evaluate(1.0, {})
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        assert result["accuracy"] == pytest.approx(hits)
        assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_of_the_next_character(smoothing):
    rng = np.random.default_rng(1)
    table = rng.normal(size=(5, 5)).astype(np.float32)
    batch = {name: rng.integers(0, 5, (3, 4)) for name in ("text", "next")}
    network = Bigram(jax.numpy.asarray(table))
    loss_fn = recipe.next_character_loss(
        network, weight_decay=0.5, label_smoothing=smoothing
    )
    params = jax.numpy.full((1, 1), 2.0)  # of rank 2, hence decayed
    loss, (_, metrics) = loss_fn(params, {}, batch, None)
    logits = 2.0 * table[batch["text"]].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = (1 - smoothing) * np.eye(5)[batch["next"]] + smoothing / 5
    expected = -np.mean(np.sum(target * log_p, -1)) + 0.5 * 0.5 * 2.0**2
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    hits = np.mean(logits.argmax(-1) == batch["next"])
    assert float(metrics["accuracy"]) == pytest.approx(hits)


def test_text_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="tiny_shakespeare is not in"):
        text.load(str(tmp_path))


def test_validation_text(data_dir):
    source = text.load(str(data_dir))
    assert source.vocabulary == 65
    assert len(source.validation) == 55_770
    assert source.validation.max() < 65
    # The same characters have the same numbers in both.
    counts = [
        np.bincount(x, minlength=65) / len(x)
        for x in (source.characters, source.validation)
    ]
    np.testing.assert_allclose(*counts, atol=0.01)
