"""A part of a run, in a process that has so many devices: `python -m` this module.

It goes on from the newest checkpoint of its folder, whatever number of devices wrote it.
"""

import argparse
import pathlib

import jax
import numpy as np
import optax
from flax import nnx

import lwsam_jax as lwsam
from lwsam_bench.data import sources
from lwsam_bench.data.pipeline import make_batches
from lwsam_bench.models.network import Network
from lwsam_bench.training.checkpoint import Checkpoints
from lwsam_bench.training.recipe import make_loss_fn


WIDTH = 64
BATCH = 64


class Dense(nnx.Module):
    """Three dense layers; no statistics of a batch, which devices may split."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(inputs, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, outputs, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map images f32[B, H, W, C] to logits f32[B, K]."""
        del train
        x = x.reshape(len(x), -1)
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


def part(folder: pathlib.Path, until: int) -> None:
    """Train on all devices of this process up to a step, and save."""
    dataset = sources.load("digits", None)
    mean, std = dataset.statistics()
    inputs = int(np.prod(dataset.image_shape))
    model = Dense(inputs, dataset.num_classes, nnx.Rngs(0))
    network = Network.of(model)
    batches = make_batches(
        dataset.train, batch_size=BATCH, seed=0, mean=mean, std=std, augment=False
    )
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    step = lwsam.TrainStep(
        make_loss_fn(network), optax.sgd(0.05, momentum=0.9), lwsam.sam(0.05), mesh
    )
    state = step.init(
        network.params, network.model_state, batches(0), key=jax.random.key(0)
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    done = checkpoints.latest() or 0
    if done:
        state, _ = checkpoints.restore(done, state)
        print(f"going on from step {done} on {jax.device_count()} devices")
    for number in range(done, until):
        state, _ = step(state, batches(number))
    checkpoints.save(until, state, {})
    checkpoints.close()


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("until", type=int)
    arguments = parser.parse_args()
    part(arguments.folder, arguments.until)


if __name__ == "__main__":
    main()
