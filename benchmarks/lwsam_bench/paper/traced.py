"""Networks of the paper's size, traced: built and applied in shapes alone.

At the scale `smoke` nothing of that size is trained. That its code still fits together
is seen here, in seconds and without memory.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import lwsam_jax as lwsam
from lwsam_bench.models import by_name
from lwsam_bench.models.network import Network
from lwsam_bench.paper import setups


# Shape of an input and number of outputs, as the datasets have them.
_IMAGES = {
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "oxford_flowers102": ((64, 64, 3), 102),
}
_TEXT = ((128,), 65)


def sizes(benchmarks: tuple[str, ...]) -> str:
    """Return a sentence on the networks of some benchmarks at the scale `paper`.

    Args:
      benchmarks: Of `setups.BENCHMARKS`, or `lm`.
    """
    told = [_size(setups.setup(benchmark, "paper")) for benchmark in benchmarks]
    return f"Of the full size only traced: {'; '.join(dict.fromkeys(told))}."


@functools.cache
def _size(setup: setups.Setup) -> str:
    shape, outputs = _IMAGES.get(setup.dataset, _TEXT)
    model = nnx.eval_shape(
        lambda: by_name.build(
            setup.model, image_shape=shape, num_classes=outputs, seed=0
        )
    )
    network = Network.of(model, by_name.trainable(setup.model))
    dtype = jnp.float32 if setup.dataset in _IMAGES else jnp.int32
    batch = jax.ShapeDtypeStruct((setup.batch_size, *shape), dtype)
    logits, _ = jax.eval_shape(
        lambda *arguments: network.apply(*arguments, train=True),
        network.params,
        network.model_state,
        batch,
    )
    assert logits.shape[-1] == outputs
    count = sum(x.size for x in jax.tree.leaves(network.params))
    layers = len(lwsam.Layers.of(network.params))
    return f"{setup.model} with {count:,} trained parameters, {layers} layers"
