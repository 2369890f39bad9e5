"""The processes of a run: how they find each other, and how they agree.

One that goes another way would make the others wait for it without end. So what they
decide they decide together, and what only one of them can see is said to all.
"""

import contextlib
import json
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lwsam_bench.support.errors import UserError


AXIS = "data"
_VISIBLE_AFTER = 30.0  # seconds, in which a network file system shows a new file


class SharedError(UserError):
    """What every process raises because one did; the first of them says it."""


class Processes:
    """The processes of a run, of which this is one; alone it asks nobody.

    Attributes:
      index: Of this process.
      count: Of all.
      mesh: The devices of all, over which a batch is cut; None: one device is used.
    """

    def __init__(self, index: int = 0, count: int = 1, mesh: Mesh | None = None):
        self.index, self.count, self.mesh = index, count, mesh

    @property
    def is_first(self) -> bool:
        """Whether it is this one that writes and prints."""
        return self.index == 0

    def rows(self, batch_size: int) -> np.ndarray | None:
        """Return the places i64[b] in a batch that this process feeds; None: all.

        Raises:
          UserError: If a batch cannot be cut evenly over the devices.
        """
        if self.mesh is None:
            return None
        devices = self.mesh.size
        if batch_size % devices:
            raise UserError(
                f"--batch-size {batch_size} cannot be cut evenly over {devices} devices:"
                f" take a multiple of {devices}"
            )
        if self.count == 1:
            return None
        cut = NamedSharding(self.mesh, PartitionSpec(AXIS))
        own = cut.addressable_devices_indices_map((batch_size,)).values()
        places = [np.arange(batch_size)[index] for index in own if index is not None]
        return np.sort(np.concatenate(places))

    def gather(self, text: str) -> list[str]:
        """Return what each process says, in their order."""
        if self.count == 1:
            return [text]
        said = text.encode()
        longest = int(self.most(len(said)))
        # Few sizes, so that few programs are compiled.
        letters = np.zeros(1 << max(6, longest.bit_length()), np.uint8)
        letters[: len(said)] = np.frombuffer(said, np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(letters))
        return [bytes(row[row > 0]).decode() for row in rows]

    def most(self, number: int) -> int:
        """Return the largest of the numbers that the processes say."""
        if self.count == 1:
            return number
        return int(multihost_utils.process_allgather(np.int32(number)).max())

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over the processes; exact where all but one have zeros."""
        if self.count == 1:
            return values
        return np.asarray(multihost_utils.process_allgather(values)).sum(axis=0)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Where one process raises a UserError inside, all do."""
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        if self.count == 1:
            if error is not None:
                raise error
            return
        said = self.gather("" if error is None else str(error))
        for index, text in enumerate(said):
            if text:
                who = "" if index == 0 else f"process {index}: "
                raise SharedError(f"{who}{text}") from error

    def first(self, do: Callable[[], Any]) -> Any:
        """Let the first process do something, and tell all what it returned, as JSON."""
        found = None
        with self.together():
            if self.is_first:
                found = do()
        if self.count == 1:
            return found
        return json.loads(self.gather(json.dumps(found) if self.is_first else "")[0])

    def same(self, facts: Mapping[str, Any]) -> None:
        """Raise in every process unless all say the same.

        Args:
          facts: What this process says, as JSON has it, by name.
        """
        said = [json.loads(text) for text in self.gather(json.dumps(facts))]
        for index, other in enumerate(said):
            for name, value in said[0].items():
                if other.get(name) != value:
                    raise SharedError(
                        f"{name} differs between processes: {value} in process 0,"
                        f" {other.get(name)} in process {index}. Start all of them with"
                        " the same command and the same data"
                    )

    def share_folder(self, folder: pathlib.Path) -> None:
        """Raise unless all processes see the files of the first in a folder."""
        if self.count == 1:
            return
        path = folder / f".shared.{self.first(lambda: secrets.token_hex(8))}"
        self.first(path.touch)
        with self.together():
            deadline = time.monotonic() + _VISIBLE_AFTER
            while not path.exists():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"--out {folder} does not hold what process 0 wrote there: name"
                        " a folder on a file system that all processes share"
                    )
                time.sleep(0.2)
        self.first(path.unlink)


ALONE = Processes()


def join(coordinator: str | None, index: int | None, count: int | None) -> Processes:
    """Join the other processes of a run; before anything else is done with JAX.

    Args:
      coordinator: Host and port at which the first process listens.
      index: Of this process.
      count: Of all. What is None is found out from the cluster.

    Raises:
      UserError: If the cluster does not say, or the others do not come.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    with contextlib.suppress(AttributeError):  # JAX 0.7 has no such switch
        # The run notes signals itself; see `stopping`.
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, count, index)
    except Exception as error:  # each kind of cluster has its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        missing = (
            ""
            if None not in (coordinator, index, count)
            else (
                ", or say what the cluster does not: --coordinator HOST:PORT,"
                " --process-id I and --num-processes N"
            )
        )
        raise UserError(
            f"the processes do not find each other ({reason}). Start all of them, with"
            f" one --coordinator and ids from 0 on{missing}"
        ) from error
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    return Processes(jax.process_index(), jax.process_count(), mesh)


def own(tree: Any) -> Any:
    """Return replicated arrays as they lie on one device of this process."""
    is_spread = lambda x: isinstance(x, jax.Array) and len(x.devices()) > 1
    return jax.tree.map(lambda x: x.addressable_data(0) if is_spread(x) else x, tree)
