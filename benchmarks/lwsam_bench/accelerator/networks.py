"""The networks whose steps are timed, at full size, with bfloat16 inside.

Their data are random: how long a step takes is no matter of what it sees, and a machine
with an accelerator may have no data.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lwsam_bench.models.gpt import GPT
from lwsam_bench.models.network import Network
from lwsam_bench.models.resnet import ResNet
from lwsam_bench.models.vit import ViT
from lwsam_bench.models.wrn import WideResNet
from lwsam_bench.speed.workloads import MOMENTUM, Workload
from lwsam_bench.training.recipe import make_loss_fn, next_character_loss


COMPUTE = "bfloat16"
LEARNING_RATE = 0.01  # small: there is nothing to be learned
_BATCHES = 8  # different ones, taken in turns


@dataclasses.dataclass(frozen=True)
class Net:
    """A network and what it reads.

    Attributes:
      title: Its name in a heading.
      build: Makes it.
      shape: Of an example: height, width and channels, or the tokens of an excerpt.
      outputs: Classes, or different tokens.
      batch_size: Examples in a batch.
      layers: That layer-wise SAM perturbs, the paper's k.
    """

    title: str
    build: Callable[[nnx.Rngs], nnx.Module]
    shape: tuple[int, ...]
    outputs: int
    batch_size: int
    layers: int = 4

    @property
    def reads_text(self) -> bool:
        """Whether the examples are tokens, not images."""
        return len(self.shape) == 1

    def config(self) -> dict[str, Any]:
        """What decides the cost of a step, for a row."""
        return {
            "shape": list(self.shape),
            "outputs": self.outputs,
            "batch_size": self.batch_size,
            "compute": COMPUTE,
            "k": self.layers,
        }


def _vit(rngs: nnx.Rngs) -> nnx.Module:
    return ViT((224, 224, 3), 1_000, width=768, depth=12, heads=12, rngs=rngs)


def _gpt(rngs: nnx.Rngs) -> nnx.Module:
    # The shape of GPT-2 small.
    return GPT(50_257, context=1_024, width=768, depth=12, heads=12, rngs=rngs)


FULL: Mapping[str, Net] = {
    "resnet20": Net(
        "ResNet-20", lambda rngs: ResNet(3, 10, rngs=rngs), (32, 32, 3), 10, 512
    ),
    "wrn28-10": Net(
        "WRN-28-10",
        lambda rngs: WideResNet(3, 100, depth=28, width=10, rngs=rngs),
        (32, 32, 3),
        100,
        128,
    ),
    "vit-b16": Net("ViT-B/16", _vit, (224, 224, 3), 1_000, 128),
    "gpt": Net("GPT of the shape of GPT-2 small", _gpt, (1_024,), 50_257, 8),
}


def _tiny_vit(rngs: nnx.Rngs) -> nnx.Module:
    return ViT((8, 8, 3), 5, patch=4, width=8, depth=1, heads=2, rngs=rngs)


def _tiny_gpt(rngs: nnx.Rngs) -> nnx.Module:
    return GPT(11, context=8, width=8, depth=1, heads=2, rngs=rngs)


# The same code in seconds on a CPU; a tenth of ten examples is one.
SMOKE: Mapping[str, Net] = {
    "resnet20": Net(
        "ResNet-8",
        lambda rngs: ResNet(3, 5, depth=8, width=2, rngs=rngs),
        (8, 8, 3),
        5,
        10,
        layers=2,
    ),
    "wrn28-10": Net(
        "WRN-10-1",
        lambda rngs: WideResNet(3, 5, depth=10, width=1, rngs=rngs),
        (8, 8, 3),
        5,
        10,
        layers=2,
    ),
    "vit-b16": Net("tiny ViT", _tiny_vit, (8, 8, 3), 5, 10, layers=2),
    "gpt": Net("tiny GPT", _tiny_gpt, (8,), 11, 10, layers=2),
}


def workload(net: Net, seed: int) -> Workload:
    """Make the workload of a network on random data."""
    network = Network.of(net.build(nnx.Rngs(seed)), compute=jnp.dtype(COMPUTE))
    loss = next_character_loss if net.reads_text else make_loss_fn
    pool = [_batch(net, np.random.default_rng([seed, i])) for i in range(_BATCHES)]
    return Workload(
        title=net.title,
        data="random tokens" if net.reads_text else "random pixels",
        loss_fn=loss(network),
        params=network.params,
        model_state=network.model_state,
        batches=lambda step: pool[step % _BATCHES],
        optimizer=optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
        batch_size=net.batch_size,
        items=net.batch_size * (net.shape[0] if net.reads_text else 1),
        unit="tokens" if net.reads_text else "images",
    )


def _batch(net: Net, rng: np.random.Generator) -> Any:
    size = net.batch_size
    if net.reads_text:
        rows = rng.integers(0, net.outputs, (size, net.shape[0] + 1), dtype=np.int32)
        return jax.device_put({"text": rows[:, :-1], "next": rows[:, 1:]})
    image = rng.standard_normal((size, *net.shape), dtype=np.float32)
    label = rng.integers(0, net.outputs, size, dtype=np.int32)
    return jax.device_put({"image": image, "label": label})
