"""A task on images that compiles in no time, for tests of what is done with tasks."""

import numpy as np
from flax import nnx

from lwsam_bench.data.augment import Batches
from lwsam_bench.data.splits import Dataset, Split
from lwsam_bench.models.network import Network
from lwsam_bench.training import recipe
from lwsam_bench.training.tasks import Task


NOTE = "Random pixels."


class Tiny(nnx.Module):
    """Three dense layers with a BatchNorm between the first two."""

    def __init__(self, inputs, num_classes, *, rngs):
        self.first = nnx.Linear(inputs, 6, rngs=rngs)
        self.bn = nnx.BatchNorm(6, rngs=rngs)
        self.middle = nnx.Linear(6, 5, rngs=rngs)
        self.last = nnx.Linear(5, num_classes, rngs=rngs)

    def __call__(self, x, *, train):
        x = self.first(x.reshape(len(x), -1))
        x = nnx.relu(self.bn(x, use_running_average=not train))
        return self.last(nnx.relu(self.middle(x)))


def make(config=None, data_dir=None, on_record=None, processes=None):
    """As `tasks.make`, whatever the arguments."""
    rng = np.random.default_rng(0)
    splits = [
        Split(
            rng.integers(0, 256, (size, 4, 4, 1), dtype=np.uint8),
            rng.integers(0, 3, size, dtype=np.int32),
        )
        for size in (20, 10)
    ]
    dataset = Dataset("tiny", "1.0.0", 3, *splits, note=NOTE)
    network = Network.of(Tiny(16, 3, rngs=nnx.Rngs(0)))
    mean, std = dataset.statistics()
    batches = Batches(
        dataset.train, batch_size=5, seed=0, mean=mean, std=std, augment=False
    )
    return Task(
        network=network,
        loss_fn=recipe.make_loss_fn(network),
        batches=batches,
        steps_per_epoch=batches.steps_per_epoch,
        items_per_batch=5,
        unit="images",
        evaluate=lambda params, model_state: {"loss": 0.0, "accuracy": 0.0},
        fingerprint="",
        note=NOTE,
        dataset=dataset,
        source={"name": "tiny", "version": "1.0.0", "note": NOTE},
    )
