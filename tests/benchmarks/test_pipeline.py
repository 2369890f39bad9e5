"""Images that stay on the host make the same batches as images on the device."""

import threading

import jax
import numpy as np
import pytest

from lwsam_bench.data import pipeline, splits
from lwsam_bench.data.augment import Batches
from lwsam_bench.data.splits import Split


def split(size=23):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, 6, 5, 3), dtype=np.uint8)
    return Split(images, np.arange(size, dtype=np.int32))


def make(augment):
    return pipeline.make_batches(
        split(),
        batch_size=4,
        seed=7,
        mean=np.array([0.4, 0.5, 0.6], np.float32),
        std=np.array([0.2, 0.3, 0.25], np.float32),
        augment=augment,
    )


@pytest.mark.parametrize("augment", [False, True])
def test_the_batches_are_the_same(augment, monkeypatch):
    monkeypatch.setattr(splits, "DEVICE_BYTES", split().images.nbytes)
    device = make(augment)
    monkeypatch.setattr(splits, "DEVICE_BYTES", split().images.nbytes - 1)
    host = make(augment)
    assert type(device) is Batches
    assert isinstance(host, pipeline.HostBatches)
    assert host.steps_per_epoch == device.steps_per_epoch == 5
    for step in [*range(12), 3, 4, 50]:  # over the ends of epochs, and back
        jax.tree.map(np.testing.assert_array_equal, host(step), device(step))


def test_batches_are_gathered_ahead(monkeypatch):
    monkeypatch.setattr(splits, "DEVICE_BYTES", 0)
    host = make(False)
    gather, seen, enough = host._gather, [], threading.Event()

    def watched(step):
        seen.append(step)
        if len(seen) > pipeline.AHEAD:
            enough.set()
        return gather(step)

    host._gather = watched
    host(0)
    assert enough.wait(timeout=30)  # though nobody asked for a second batch
    assert set(range(pipeline.AHEAD)) <= set(seen)
