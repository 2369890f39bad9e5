"""Datasets are read as they are, and batches are pure functions of seed and step."""

import dataclasses
import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from lwsam_bench.data import augment, images, prepared, sources
from lwsam_bench.data.splits import corrupt_labels, Dataset, default_data_dir, Split
from lwsam_bench.support.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits")


def write_npz(path, **changes):
    arrays = {
        "x_train": np.arange(4 * 5 * 5, dtype=np.uint8).reshape(4, 5, 5),
        "y_train": np.array([0, 1, 2, 1]),
        "x_test": np.zeros((2, 5, 5), np.uint8),
        "y_test": np.array([2, 0]),
        **changes,
    }
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return str(path)


def test_digits_are_split_once_and_for_all(digits):
    assert digits.train.images.shape == (1000, 8, 8, 1)
    assert digits.test.images.shape == (797, 8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.images.max() == 255
    from sklearn.datasets import load_digits

    both = np.concatenate([digits.train.images, digits.test.images]).reshape(1797, -1)
    digits_of_sklearn: Any = load_digits()
    known = np.rint(digits_of_sklearn.data * 255 / 16)
    assert sorted(map(bytes, both)) == sorted(map(bytes, known.astype(np.uint8)))
    assert digits.fingerprint() == sources.load("digits").fingerprint()


def test_labels_are_replaced_at_random(digits):
    labels = digits.train.labels
    noisy = corrupt_labels(labels, 0.4, 10, seed=3)
    # 400 are drawn anew; a tenth of them stays what it was by chance.
    assert 330 < np.sum(noisy != labels) < 390
    np.testing.assert_array_equal(noisy, corrupt_labels(labels, 0.4, 10, seed=3))
    assert np.any(noisy != corrupt_labels(labels, 0.4, 10, seed=4))
    np.testing.assert_array_equal(corrupt_labels(labels, 0.0, 10, 3), labels)
    assert noisy.dtype == labels.dtype


def test_statistics_are_those_of_the_pixels():
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 3, 2), dtype=np.uint8)
    split = Split(images, np.zeros(7, np.int32))
    mean, std = Dataset("x", "1", 1, split, split).statistics()
    pixels = images.reshape(-1, 2) / 255.0
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-6)


@pytest.mark.parametrize("augmented", [False, True])
def test_a_batch_is_a_function_of_seed_and_step(digits, augmented):
    def batches(seed):
        mean, std = digits.statistics()
        return augment.Batches(
            digits.train,
            batch_size=300,
            seed=seed,
            mean=mean,
            std=std,
            augment=augmented,
        )

    onward, backward = batches(5), batches(5)
    forth = [onward(step) for step in range(7)]
    back = [backward(step) for step in reversed(range(7))][::-1]
    for a, b in zip(forth, back, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert np.any(forth[0]["image"] != forth[3]["image"])  # another epoch
    assert np.any(forth[0]["image"] != batches(6)(0)["image"])  # another seed
    assert forth[0]["image"].dtype == jnp.float32
    assert forth[0]["image"].shape == (300, 8, 8, 1)


def test_an_epoch_visits_no_image_twice(digits):
    split = dataclasses.replace(digits.train, labels=np.arange(1000, dtype=np.int32))
    one = np.ones(1, np.float32)
    batches = augment.Batches(
        split, batch_size=300, seed=0, mean=0 * one, std=one, augment=False
    )
    assert batches.steps_per_epoch == 3  # 100 images are left out
    seen = np.concatenate([batches(step)["label"] for step in range(3)])
    assert len(set(seen.tolist())) == 900
    # The image is the one of the label.
    batch = batches(4)
    expected = digits.train.images[np.asarray(batch["label"])] / np.float32(255)
    np.testing.assert_allclose(batch["image"], expected, rtol=1e-6)


def test_crops_are_windows_of_the_padded_image_and_half_are_flipped(getkey):
    images = np.asarray(jax.random.normal(getkey(), (200, 6, 5, 2)))
    out = np.asarray(augment.crop_and_flip(jnp.asarray(images), getkey()))
    pad = augment.PAD
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    flips, corners = 0, set()
    for image, result in zip(padded, out, strict=True):
        places = [
            (y, x, flip)
            for y in range(2 * pad + 1)
            for x in range(2 * pad + 1)
            for flip in (False, True)
            if np.array_equal(
                image[y : y + 6, x : x + 5][:, :: -1 if flip else 1], result
            )
        ]
        assert places
        flips += places[0][2]
        corners.add(places[0][:2])
    assert 70 < flips < 130
    assert len(corners) > 50  # of 81


def test_npz(tmp_path):
    dataset = sources.load(write_npz(tmp_path / "a.npz"))
    assert dataset.image_shape == (5, 5, 1)
    assert dataset.num_classes == 3
    assert dataset.train.labels.dtype == np.int32
    np.testing.assert_array_equal(
        dataset.train.images[0, ..., 0], np.arange(25).reshape(5, 5)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "no array y_test"),
        ({"x_train": np.zeros((4, 5, 5))}, "x_train to be uint8"),
        ({"x_train": np.zeros((4, 5), np.uint8)}, "x_train to be uint8"),
        ({"y_train": np.zeros(3, int)}, "y_train to be 4 integers"),
        ({"y_train": np.zeros(4)}, "y_train to be 4 integers"),
        ({"y_train": np.array([0, 1, -1, 2])}, "label -1"),
        ({"x_test": np.zeros((2, 6, 5), np.uint8)}, "one shape"),
        ({"x_test": np.array([{}, 1])}, "cannot be read"),  # a pickle
    ],
)
def test_npz_of_another_shape_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        sources.load(write_npz(tmp_path / "a.npz", **changes))


def test_npz_that_is_none(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match="no such file"):
        sources.load(str(path))
    path.write_bytes(b"PK\x03\x04 but no more")
    with pytest.raises(UserError, match="cannot be read"):
        sources.load(str(path))


@pytest.mark.parametrize(
    ("name", "shape", "jpeg"),
    [("cifar10", (32, 32, 3), True), ("fashion_mnist", (28, 28, 1), False)],
)
def test_real_data(data_dir, monkeypatch, name, shape, jpeg):
    decode, sizes = prepared._decode, []

    def decode_head(records, *rest):
        sizes.append(len(records))
        return decode(records[:200], *rest)  # all of them take half a minute

    monkeypatch.setattr(prepared, "_decode", decode_head)
    dataset = sources.load(name, str(data_dir))
    assert sizes == [50_000 if name == "cifar10" else 60_000, 10_000]
    assert dataset.image_shape == shape
    assert dataset.num_classes == 10
    assert dataset.train.images.dtype == np.uint8
    assert set(dataset.train.labels.tolist()) == set(range(10))
    assert dataset.version.startswith("3.0.")
    assert ("JPEG" in dataset.note) == jpeg


def test_some_of_the_real_data(data_dir):
    few = sources.load("cifar10", str(data_dir), train_images=30, test_images=20)
    fewer = sources.load("cifar10", str(data_dir), train_images=5, test_images=20)
    assert (len(few.train), len(few.test)) == (30, 20)
    np.testing.assert_array_equal(few.train.images[:5], fewer.train.images)
    np.testing.assert_array_equal(few.test.labels, fewer.test.labels)
    assert few.fingerprint() != fewer.fingerprint()


def test_real_flowers(data_dir, monkeypatch):
    decode, sizes = prepared._decode, []

    def decode_head(records, *rest):
        sizes.append(len(records))
        return decode(records[:8], *rest)

    monkeypatch.setattr(prepared, "_decode", decode_head)
    dataset = sources.load("oxford_flowers102_subset", str(data_dir))
    assert sizes == [4535, 775 + 757]  # learns from the split test
    assert dataset.image_shape == (64, 64, 3)
    assert dataset.num_classes == 102
    assert "subset" in dataset.note
    smaller = sources.load("oxford_flowers102_subset", str(data_dir), image_size=16)
    assert smaller.image_shape == (16, 16, 3)


MOCK_SIZES = {"train": 3, "validation": 2, "test": 4}


@pytest.fixture
def mock(monkeypatch):
    """Stands in for datasets that are prepared; returns the splits that were read.

    `mock_data` says that nothing is prepared, and has any split under any name.
    """
    make, source, read = tfds.builder, tfds.data_source, []

    def builder(name, **options):
        real = make(name, **options)
        splits = MOCK_SIZES if "flowers" in name else {"train": 3, "test": 4}
        info = types.SimpleNamespace(
            features=real.info.features,
            splits={
                split: types.SimpleNamespace(num_examples=size)
                for split, size in splits.items()
            },
        )
        return types.SimpleNamespace(
            name=name, version=real.version, info=info, is_prepared=lambda: True
        )

    def data_source(name, *, split, **options):
        assert split in builder(name).info.splits
        assert options["download"] is False
        read.append(split)
        with tfds.testing.mock_data(num_examples=MOCK_SIZES[split]):
            return source(name, split=split, **options)

    monkeypatch.setattr(tfds, "builder", builder)
    monkeypatch.setattr(tfds, "data_source", data_source)
    # What it mocks is no encoded image.
    monkeypatch.setattr(prepared, "_is_jpeg", lambda *_: False)
    return read


def test_cifar100(mock, tmp_path):
    dataset = sources.load("cifar100", str(tmp_path))
    assert mock == ["train", "test"]
    assert (len(dataset.train), len(dataset.test)) == (3, 4)
    assert dataset.image_shape == (32, 32, 3)
    assert dataset.num_classes == 100
    assert dataset.note == ""


def test_flowers_learn_from_the_split_test(mock, tmp_path):
    dataset = sources.load("oxford_flowers102", str(tmp_path), image_size=24)
    assert mock == ["test", "train", "validation"]
    assert (len(dataset.train), len(dataset.test)) == (4, 3 + 2)
    assert dataset.image_shape == (24, 24, 3)
    assert dataset.num_classes == 102
    assert "split test" in dataset.note
    default = sources.load("oxford_flowers102", str(tmp_path), train_images=2)
    assert default.image_shape == (64, 64, 3)
    assert len(default.train) == 2
    with pytest.raises(UserError, match="--test-images 6 is more than the 5 images"):
        sources.load("oxford_flowers102", str(tmp_path), test_images=6)


@pytest.mark.parametrize("name", ["cifar100", "oxford_flowers102"])
def test_data_that_is_missing_is_said_once(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is not in {tmp_path}"):
        sources.load(name, str(tmp_path))


def test_images_are_resized_and_the_middle_is_kept():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 1:7] = 200  # the filter reads a pixel beyond the middle square
    np.testing.assert_array_equal(images.fit(image, 2), np.full((2, 2, 3), 200))
    tall = np.repeat(np.arange(0, 60, 10, dtype=np.uint8), 2)[:, None, None]
    tall = np.broadcast_to(tall, (12, 4, 1))
    # Rows 4 to 7 of twelve are the middle square: values 20, 20, 30, 30.
    np.testing.assert_array_equal(images.fit(tall, 4)[:, 0, 0], [20, 20, 30, 30])
    assert images.fit(tall, 4).shape == (4, 4, 1)
    with pytest.raises(UserError, match="2 channels"):
        images.fit(np.zeros((3, 4, 2), np.uint8), 2)


def test_some_images_of_any_dataset(digits, tmp_path):
    few = sources.load("digits", train_images=7, image_size=4)
    assert few.train.images.shape == (7, 4, 4, 1)
    assert few.test.images.shape == (797, 4, 4, 1)
    again = sources.load("digits", train_images=9)
    np.testing.assert_array_equal(few.train.labels, again.train.labels[:7])
    assert (again.train.images[0] == digits.train.images).all((1, 2, 3)).sum() == 1
    with pytest.raises(UserError, match="--train-images 5 is more than the 4 images"):
        sources.load(write_npz(tmp_path / "a.npz"), train_images=5)


def test_damaged_data(data_dir, tmp_path):
    folder = tmp_path / "cifar10"
    shutil.copytree(data_dir / "cifar10", folder)
    (shard,) = folder.glob("*/cifar10-test*")
    shard.write_bytes(shard.read_bytes()[:100_000])
    with pytest.raises(UserError, match="cifar10 in .* cannot be read"):
        sources.load("cifar10", str(tmp_path))


def test_missing_data_names_the_command_that_fetches_it(tmp_path):
    with pytest.raises(UserError) as caught:
        sources.load("cifar10", str(tmp_path))
    message = str(caught.value)
    assert f"cifar10 is not in {tmp_path}" in message
    assert "tfds.builder(" in message
    assert "download_and_prepare()" in message
    assert not list(tmp_path.iterdir())  # and nothing was begun


def test_default_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert default_data_dir() == str(tmp_path)
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == str(tmp_path / "tensorflow_datasets")
