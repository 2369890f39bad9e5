"""Losses on a plane through one layer of a trained network (Appendix A.2 of the paper).

The plane is spanned by two random directions of the layer's shape, orthonormal over all
its entries. The loss is the mean cross-entropy of fixed training images, not augmented,
with the running statistics of BatchNorm: what the network would answer if this layer were
another one, and nothing else.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import lwsam_jax as lwsam
from lwsam_bench.data.augment import normalize
from lwsam_bench.models.network import Network
from lwsam_bench.training.tasks import Task


CHUNK = 256  # images at a time
_POINTS = 4  # of the plane at a time; more of them take more memory

_IMAGE_SEED = 0  # fixed: the same images for all networks


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a network.

    Attributes:
      name: As `lwsam.Layers` has it.
      leaf: Its place among the leaves of the parameters.
      shape: Of its weights.
    """

    name: str
    leaf: int
    shape: tuple[int, ...]


def choose_layers(task: Task, count: int) -> list[Layer]:
    """Return layers at equal distances in depth, from the first to the last."""
    network = task.network
    layers = lwsam.Layers.of(
        network.params,
        None,
        task.loss_fn,
        network.model_state,
        task.batches(0),
        jax.random.key(0),
    )
    by_depth = sorted(range(len(layers)), key=layers.depth.__getitem__)
    places = np.linspace(0, len(layers) - 1, min(count, len(layers)))
    leaves = jax.tree.leaves(network.params)
    found = []
    for place in np.rint(places).astype(int):
        index = by_depth[place]
        leaf = layers.leaf_layer.index(index)
        found.append(Layer(layers.names[index], leaf, leaves[leaf].shape))
    return found


def directions(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Return two orthonormal f64 arrays of a layer's shape; its name decides them."""
    rng = np.random.default_rng(zlib.crc32(layer.name.encode()))
    first, second = rng.standard_normal((2, *layer.shape))
    first /= np.linalg.norm(first)
    # Twice: what rounding leaves of the first direction goes as well.
    for _ in range(2):
        second -= np.vdot(first, second) * first
        second /= np.linalg.norm(second)
    return first, second


class Images:
    """The training images of a landscape, in chunks of one size.

    Args:
      task: Where the images are from.
      count: How many, at most.
    """

    def __init__(self, task: Task, count: int):
        assert task.dataset is not None  # a task on images
        split = task.dataset.train
        order = np.random.default_rng(_IMAGE_SEED).permutation(len(split))
        chosen = np.sort(order[:count])
        self.count = len(chosen)
        self.mean, self.std = task.dataset.statistics()
        size = min(CHUNK, self.count)
        self.chunks = [
            self._chunk(split.images, split.labels, chosen[at : at + size], size)
            for at in range(0, self.count, size)
        ]

    def _chunk(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, size: int
    ) -> tuple[Array, Array, Array]:
        """Return images, labels and weights; the rest of the last chunk has none."""
        weights = np.zeros(size, np.float32)
        weights[: len(rows)] = 1.0
        rows = np.resize(rows, size)
        return (
            jnp.asarray(images[rows]),
            jnp.asarray(labels[rows]),
            jnp.asarray(weights),
        )


class Plane:
    """The mean loss as a function of one layer, of any parameters of a network.

    Points are evaluated side by side, and what does not depend on the layer is computed
    once for all of them: `vmap` has no axis for it.

    Args:
      network: The network.
      layer: The layer.
      images: The images.
    """

    def __init__(self, network: Network, layer: Layer, images: Images):
        self._layer, self._images = layer, images
        self._directions = directions(layer)

        @jax.jit
        def losses(points: Array, params: Any, model_state: Any, chunk: Any) -> Array:
            pixels, labels, weights = chunk
            leaves, treedef = jax.tree.flatten(params)

            def loss(point: Array) -> Array:
                moved = [*leaves[: layer.leaf], point, *leaves[layer.leaf + 1 :]]
                logits, _ = network.apply(
                    jax.tree.unflatten(treedef, moved),
                    model_state,
                    normalize(pixels, images.mean, images.std),
                    train=False,
                )
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return jnp.vdot(losses, weights)

            return jax.vmap(loss)(points)

        self._losses = losses

    def row(
        self, params: Any, model_state: Any, alpha: float, betas: Sequence[float]
    ) -> list[float]:
        """Return the mean loss at alpha of the first direction and betas of the second.

        Args:
          params: Parameters in the middle of the plane.
          model_state: Running statistics.
          alpha: Along the first direction.
          betas: Along the second.
        """
        first, second = self._directions
        middle = np.asarray(jax.tree.leaves(params)[self._layer.leaf], np.float64)
        count = len(betas)
        # Filled up with the last one, so that one executable does for all.
        padded = [*betas, *[betas[-1]] * (-count % _POINTS)]
        points = np.stack(
            [middle + alpha * first + beta * second for beta in padded]
        ).astype(np.float32)
        groups = points.reshape(-1, _POINTS, *middle.shape)
        totals = np.zeros(len(padded))
        for chunk in self._images.chunks:
            sums = [self._losses(group, params, model_state, chunk) for group in groups]
            totals += np.concatenate(jax.device_get(sums)).astype(np.float64)
        return (totals[:count] / self._images.count).tolist()


def norm(layer: Layer, params: Any) -> float:
    """Return the norm of a layer's weights."""
    weights = np.asarray(jax.tree.leaves(params)[layer.leaf], np.float64)
    return float(np.linalg.norm(weights))
