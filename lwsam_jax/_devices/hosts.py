"""Many processes that run one program: arrays of all, and agreement.

What differs between processes would make them wait for each other without end. So they
compare what they are about to run, and raise together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from .. import _checks


# What processes compare before they run it.
PARTS = ("selection", "batch", "constants", "state")
RAISES = "raises "
_LONGEST = 2000  # characters of what one process says, in a message


def are_many() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def is_local(x: Any) -> bool:
    """Whether an array is of this process alone: NumPy, or on its devices."""
    if isinstance(x, (jax.ShapeDtypeStruct, Tracer)):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def shares(mesh: Any, axes: Any) -> int:
    """Returns how many times the share of one process makes the whole."""
    cut = NamedSharding(mesh, PartitionSpec(axes))
    count = mesh.size
    own = cut.addressable_devices_indices_map((count,))
    all_of = cut.devices_indices_map((count,))
    distinct = lambda found: len({str(index) for index in found.values()})
    return distinct(all_of) // distinct(own)


def from_share(x: Any, sharding: NamedSharding) -> jax.Array:
    """Returns the array of which each process has its share."""
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))


def from_copy(x: Any, sharding: NamedSharding) -> jax.Array:
    """Returns the array of which each process has all."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = from_copy(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


def agree(who: str, said: Sequence[str]) -> None:
    """Raises in every process unless all are about to run the same.

    Args:
      who: Who asks, for the message.
      said: What this process says of each of `PARTS`, as text.
    """
    digest = lambda text: hashlib.sha256(text.encode()).digest()[:8]
    own = np.frombuffer(b"".join(map(digest, said)), np.uint32).reshape(len(PARTS), -1)
    found = np.asarray(multihost_utils.process_allgather(own))
    differs = (found != found[0]).any(axis=(0, 2))
    if not differs.any():
        return
    at = int(differs.argmax())  # the same one in every process
    letters = np.zeros(_LONGEST, np.uint8)
    short = np.frombuffer(said[at].encode()[:_LONGEST], np.uint8)
    letters[: len(short)] = short
    texts = np.asarray(multihost_utils.process_allgather(letters))
    lines = [bytes(row[row > 0]).decode(errors="replace") for row in texts]
    got = "; ".join(f"process {i}: {line}" for i, line in enumerate(lines))
    remedy = "Feed every process a share of the same shape, and restore the same state."
    expected = "the same in every process"
    part = "arguments" if any(x.startswith(RAISES) for x in lines) else PARTS[at]
    raise _checks.value_error(who, part, expected, got, remedy)
