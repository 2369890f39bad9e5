"""A part of a run, on so many devices or processes.

It goes on from the newest checkpoint of its folder, whatever number of devices wrote it.
"""

import argparse
import pathlib
from collections.abc import Sequence

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
HEARTBEAT = 10  # seconds without a sign of life from another process


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


def part(folder: pathlib.Path, until: int, every: int) -> None:
    """Train on all devices that there are up to a step; save there, and on the way.

    Several processes cut each batch, so that it is the same one whatever their number.
    """
    dataset = sources.load("digits", None)
    mean, std = dataset.statistics()
    inputs = int(np.prod(dataset.image_shape))
    model = Dense(inputs, dataset.num_classes, nnx.Rngs(0))
    network = Network.of(model)
    batches = make_batches(
        dataset.train, batch_size=BATCH, seed=0, mean=mean, std=std, augment=False
    )
    size = BATCH // jax.process_count()
    rows = slice(size * jax.process_index(), size * (jax.process_index() + 1))
    share = lambda number: jax.tree.map(lambda x: x[rows], batches(number))
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    step = lwsam.TrainStep(
        make_loss_fn(network), optax.sgd(0.05, momentum=0.9), lwsam.sam(0.05), mesh
    )
    state = step.init(
        network.params, network.model_state, share(0), key=jax.random.key(0)
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    done = checkpoints.latest() or 0
    if done:
        state, _ = checkpoints.restore(done, state)
        print(f"going on from step {done} on {jax.device_count()} devices", flush=True)
    for number in range(done, until):
        state, _ = step(state, share(number))
        if (number + 1) % every == 0 or number + 1 == until:
            checkpoints.save(number + 1, state, {})
    checkpoints.close()


def main(argv: Sequence[str]) -> None:
    """Read the arguments, and do the part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("until", type=int)
    parser.add_argument("--every", type=int, default=1_000_000)
    parser.add_argument("--coordinator")
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--num-processes", type=int)
    arguments = parser.parse_args(argv)
    if arguments.coordinator is None:
        part(arguments.folder, arguments.until, arguments.every)
    else:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            arguments.coordinator,
            arguments.num_processes,
            arguments.process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
        try:
            part(arguments.folder, arguments.until, arguments.every)
        finally:
            jax.distributed.shutdown()  # as at the end of any program
