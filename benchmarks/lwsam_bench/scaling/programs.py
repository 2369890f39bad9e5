"""The steps whose programs are read: a small network, laid out in two ways."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lwsam_jax as lwsam
from lwsam_bench.support import hlo
from lwsam_bench.support.measure import flops
from lwsam_bench.support.processes import AXIS
from lwsam_bench.support.rows import Row


WIDTH, DEPTH, BATCH = 256, 6, 256
NETWORK = (
    f"{DEPTH} dense layers of {WIDTH} x {WIDTH} in float32, a batch of {BATCH} in all,"
    " SGD with momentum"
)
_LAYERS = tuple(f"layer{i}" for i in range(DEPTH))

LAYOUTS: Mapping[str, PartitionSpec] = {
    "replicated": PartitionSpec(),
    "FSDP": PartitionSpec(AXIS),
}
# A method, and which layers it perturbs; None: those of the first step.
METHODS: Mapping[str, tuple[Callable[[], lwsam.Method], Any]] = {
    "SGD": (lambda: lwsam.sam(0.05), ()),
    "SAM": (lambda: lwsam.sam(0.05), None),
    "layer-wise, last 2 of 6": (
        lambda: lwsam.LayerwiseSAM(k=2, rho=0.1, alpha=0.8),
        _LAYERS[-2:],
    ),
    "layer-wise, first 2 of 6": (
        lambda: lwsam.LayerwiseSAM(k=2, rho=0.1, alpha=0.8),
        _LAYERS[:2],
    ),
    "SAM, a quarter of the batch": (
        lambda: lwsam.sam(0.05, ascent=lwsam.micro_batch(0.25)),
        None,
    ),
    "SAM along the momentum": (
        lambda: lwsam.sam(0.05, ascent=lwsam.momentum()),
        None,
    ),
}


def _loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    """The loss as one writes it for sharded weights: activations lie as the batch."""
    del key
    x = batch
    for name in _LAYERS:
        x = jnp.tanh(x @ params[name])
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(AXIS))
    return jnp.mean(x**2), (model_state, {})


def rows(mesh: Mesh, methods: tuple[str, ...] = tuple(METHODS)) -> Iterator[Row]:
    """Return what a device computes and what travels, for each layout and method.

    Nothing runs but what makes the first state.

    Args:
      mesh: All devices, of however many processes.
      methods: Names of `METHODS`.
    """
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(size=(WIDTH, WIDTH), scale=WIDTH**-0.5).astype(np.float32)
        for name in _LAYERS
    }
    cut = NamedSharding(mesh, PartitionSpec(AXIS))
    batch = _put(np.ones((BATCH, WIDTH), np.float32), cut)
    for layout, spec in LAYOUTS.items():
        where = NamedSharding(mesh, spec)
        params = {name: _put(x, where) for name, x in weights.items()}
        for name in methods:
            make, selection = METHODS[name]
            optimizer = optax.sgd(0.1, momentum=0.9)
            step = lwsam.TrainStep(_loss_fn, optimizer, make(), mesh)
            state = step.init(params, {}, batch, key=jax.random.key(0))
            compiled = step.lower(state, batch, selection).compile()
            yield {
                "layout": layout,
                "method": name,
                "flops": flops(compiled),
                "bytes": dict(hlo.bytes_by_kind(compiled.as_text())),
            }


def _put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Return an array on all devices, of other processes too."""
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])
