"""Checkpoints of a whole training run, with Orbax.

Orbax writes into a temporary folder and renames it, so a checkpoint is either whole or
not there. The state is stored as a flat mapping from path to array, for the state of a
train step holds a static node (the names of the layers) that is no array. Reading it
into the state of a freshly made run also checks that the two have one structure.
"""

import contextlib
import functools
import hashlib
import logging
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from lwsam_bench.support.errors import UserError
from lwsam_bench.support.processes import ALONE, Processes


KEEP = 2
# Raised when a train step has another kind of state.
_LAYOUT = 2


class Damaged(UserError):
    """A checkpoint that cannot be read; `what` says so without a remedy."""

    def __init__(self, message: str, what: str):
        super().__init__(message)
        self.what = what


class Checkpoints:
    """The checkpoints of one run, in one folder; the newest `KEEP` are kept.

    All processes of the run save together, and each reads the whole state. Replicated
    states alone are written: how many processes and devices there are may change.
    """

    def __init__(self, folder: pathlib.Path, processes: Processes = ALONE):
        self.folder = folder.absolute()
        self._processes = processes
        try:
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEEP,
                    create=True,
                    cleanup_tmp_directories=True,  # of a run that was killed
                    # The next step donates the state, so nothing may read it later.
                    enable_async_checkpointing=False,
                ),
            )
            self._reader = self._manager
            if processes.count > 1:
                self._reader = _of_one_process(self.folder, processes.index)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error}") from error

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Write a checkpoint, unless the newest one is of this step.

        Args:
          step: Steps done so far.
          state: Any pytree of arrays and PRNG keys.
          position: What else the run needs to go on, as JSON.
        """
        if self.latest() == step:
            return
        arrays = _arrays(state)
        position = {**position, "layout": _LAYOUT, "step": step}
        position["sha256"] = _digest(arrays)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), position=ocp.args.JsonSave(position)
        )
        _silence_late_ends()
        try:
            with _no_reports():
                self._manager.save(step, args=args, force=True)
                self._manager.wait_until_finished()
        except (OSError, ValueError) as error:  # ValueError: from TensorStore
            reason = str(error).splitlines()[0][:500]
            raise UserError(
                f"cannot write a checkpoint to {self.folder}: {reason}"
            ) from error

    def restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint.

        Args:
          step: Which one.
          template: A state of the same structure, shapes and dtypes; not modified.

        Returns:
          The state, and the position as it was saved.

        Raises:
          UserError: If it is damaged, of another structure or of an earlier version.
        """
        position = dict(self._read(step, position=ocp.args.JsonRestore()))
        if position.get("layout") != _LAYOUT:
            raise UserError(
                f"{self.folder} holds a run of an earlier version, which this one cannot"
                " go on with. Use another --out, or --no-resume to replace it"
            )
        expected = ocp.args.StandardRestore(_like(_arrays(template)))
        read = self._read(step, state=expected)
        arrays = {name: np.asarray(x) for name, x in read.items()}
        if position.get("sha256") != _digest(arrays):
            raise self._damaged(step, "its arrays are not those that were written")
        return _rebuild(template, arrays), position

    def restore_newest(
        self, template: Any, say: Callable[[str], None]
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Read the newest checkpoint that can be read.

        Those after it, which a disk has damaged, are moved out of the way.

        Args:
          template: As for `restore`.
          say: Is told of each that is damaged.

        Returns:
          Its step, its state and its position; None if there is no checkpoint.

        Raises:
          UserError: If there are some, and none can be read; as `restore`.
        """
        damaged: dict[int, Damaged] = {}
        first = self._processes.first
        for step in first(lambda: sorted(self._manager.all_steps(), reverse=True)):
            found, error = None, None
            try:
                found = self.restore(step, template)
            except Damaged as raised:
                error = raised
            if self._is_damaged(error):
                damaged[step] = error or self._damaged(step, "process 0 cannot read it")
                continue
            assert found is not None  # what one process cannot read all refuse
            for other, error in damaged.items():
                place = first(lambda other=other: str(self._set_aside(other)))
                say(f"{error.what}; it is in {place} now")
            if damaged:
                self._manager.reload()
            return step, *found
        with self._processes.together():
            for error in damaged.values():
                raise error
        return None

    def _is_damaged(self, error: Damaged | None) -> bool:
        """Return what the first process says; raise where only others cannot read it."""
        said = self._processes.gather("" if error is None else str(error))
        if said[0]:
            return True
        with self._processes.together():
            if error is not None:
                raise UserError(
                    f"{error.what}, though process 0 can read it. Give all processes the"
                    " same file system, and start them again: nothing was changed"
                )
        return False

    def _set_aside(self, step: int) -> pathlib.Path:
        place = self.folder.with_name(f"damaged-{step}")
        try:
            shutil.rmtree(place, ignore_errors=True)
            (self.folder / str(step)).rename(place)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error}") from error
        self._manager.reload()
        return place

    def _read(self, step: int, **item: Any) -> Any:
        """Return an item of a checkpoint, given by its name and how to restore it."""
        (name,) = item
        try:
            return self._reader.restore(step, args=ocp.args.Composite(**item))[name]
        except Exception as error:  # Orbax and TensorStore raise many kinds
            _silence_late_ends()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise self._damaged(step, reason) from error

    def close(self) -> None:
        """Finish what is being written."""
        self._manager.close()
        if self._reader is not self._manager:
            self._reader.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close; not after an error of one of several processes, which would wait."""
        if kind is None or self._processes.count == 1:
            self.close()

    def _damaged(self, step: int, reason: str) -> "Damaged":
        folder = self.folder / str(step)
        others = [s for s in self._manager.all_steps() if s != step]
        remedy = (
            f"Delete that folder to go on from step {max(others)}"
            if others
            else "Start again with --no-resume"
        )
        what = f"the checkpoint {folder} cannot be read ({reason[:300]})"
        return Damaged(f"{what}. {remedy}, or choose another --out", what)


def _of_one_process(folder: pathlib.Path, index: int) -> ocp.CheckpointManager:
    """Return what reads without the other processes, which may fail elsewhere."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f"process{index}",
    )
    options = ocp.CheckpointManagerOptions(
        create=False,
        read_only=True,
        enable_async_checkpointing=False,
        multiprocessing_options=alone,
    )
    return ocp.CheckpointManager(folder, options=options)


@contextlib.contextmanager
def _no_reports() -> Iterator[None]:
    """Keep Orbax's threads from printing what is raised to the caller as well."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@functools.cache
def _silence_late_ends() -> None:
    """Keep Python from reporting reads and writes that end after Orbax has given up.

    It gives up at the first array that fails; the others then find nobody to report to.
    """
    report = sys.unraisablehook

    def hook(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            report(what)

    sys.unraisablehook = hook


def _arrays(state: Any) -> dict[str, np.ndarray]:
    """Return the leaves of a state by their path, on the host.

    Leaves of size zero hold nothing to keep, and Orbax refuses them.
    """
    leaves = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf.size
    ]
    host = jax.device_get([_raw(leaf) for _, leaf in leaves])
    # The number keeps the order, and names apart that print alike.
    names = [
        f"{number:04d} {jax.tree_util.keystr(path, simple=True, separator='.')}"
        for number, (path, _) in enumerate(leaves)
    ]
    return dict(zip(names, map(np.asarray, host), strict=True))


def _rebuild(template: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return the template's structure with the leaves of `_arrays`."""
    ordered = iter([arrays[name] for name in sorted(arrays)])
    return jax.tree.map(
        lambda leaf: _as_leaf(leaf, next(ordered)) if leaf.size else leaf, template
    )


def _as_leaf(leaf: Any, array: np.ndarray) -> Array:
    # A copy: the state will be donated, so it must own its memory.
    if leaf.committed:  # maybe on devices of other processes, too
        new = jax.make_array_from_callback(
            array.shape, leaf.sharding, lambda at: jnp.array(array[at])
        )
    else:
        new = jnp.array(array)
    if _is_key(leaf):
        new = jax.random.wrap_key_data(new, impl=jax.random.key_impl(leaf))
    return new


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _like(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.zeros_like(array) for name, array in arrays.items()}


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """Return the SHA-256 of names, shapes, dtypes and contents, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
