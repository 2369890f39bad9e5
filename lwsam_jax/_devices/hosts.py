"""Many processes that run one program: arrays of all, and agreement.

What differs between processes would make them wait for each other without end. So they
compare what they are about to run, and raise together.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import _checks


_MOST = 4  # arguments that are compared at once
_LONGEST = 2000  # characters of what one process says, in a message
_RAISES = "raises "


def are_many() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def are_spanned(mesh: Mesh) -> bool:
    """Whether a mesh has devices of several processes, which then run together."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def is_local(x: Any) -> bool:
    """Whether an array is of this process alone: NumPy, or on its devices."""
    if isinstance(x, (jax.ShapeDtypeStruct, Tracer)):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def shares(mesh: Mesh, axes: Any) -> int:
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
    if _is_key(x):
        data = from_copy(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


def agree(who: str, said: dict[str, str]) -> None:
    """Raises in every process unless all say the same.

    Args:
      who: Who asks, for the message.
      said: What this process says of each argument, as text; four at most.
    """
    texts = [*said.values(), *[""] * (_MOST - len(said))]
    digest = lambda text: hashlib.sha256(text.encode()).digest()[:8]
    own = np.frombuffer(b"".join(map(digest, texts)), np.uint32).reshape(_MOST, -1)
    found = np.asarray(multihost_utils.process_allgather(own))
    differs = (found != found[0]).any(axis=(0, 2))
    if not differs.any():
        return
    at = int(differs.argmax())  # the same one in every process
    letters = np.zeros(_LONGEST, np.uint8)
    short = np.frombuffer(texts[at].encode()[:_LONGEST], np.uint8)
    letters[: len(short)] = short
    rows = np.asarray(multihost_utils.process_allgather(letters))
    lines = [bytes(row[row > 0]).decode(errors="replace") for row in rows]
    got = "; ".join(f"process {i}: {line}" for i, line in enumerate(lines))
    fell = any(line.startswith(_RAISES) for line in lines)
    name = "arguments" if fell or at >= len(said) else list(said)[at]
    remedy = "Give every process the same, and a share of the batch of the same shape."
    raise _checks.value_error(who, name, "the same in every process", got, remedy)


def disagree(who: str, error: Exception) -> None:
    """Raises in every process because this one does."""
    agree(who, {str(i): f"{_RAISES}{error!r}" for i in range(_MOST)})


def values(tree: Any) -> str:
    """Returns path, dtype, shape and a checksum of every array that is local, as text."""
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if is_local(x):
            host = np.ascontiguousarray(jax.random.key_data(x) if _is_key(x) else x)
            kind = f"{host.dtype}{list(host.shape)}"
            checksum = f"{zlib.crc32(host.tobytes()):08x}"
            found.append(f"{jax.tree_util.keystr(path)}: {kind} {checksum}")
    return ", ".join(found)


def _is_key(x: Any) -> bool:
    dtype = x.dtype if isinstance(x, jax.Array) else np.dtype(np.uint32)
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)
