"""The options of a run in several processes: what they are, and what goes together."""

import argparse
import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable

from lwsam_bench.commands.options import arguments as parse
from lwsam_bench.support.errors import UserError


# What is said where a message does not reach another process; JAX has no type for it.
_LOST = re.compile("gloo|nccl|rccl|coordination|connection|heartbeat|barrier", re.I)
_LEFT_ALONE = (
    "it cannot go on, most likely since another one has ended; start all of them again,"
    " and they go on from the last checkpoint"
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Where the processes of a run find each other; what is None the cluster says."""

    coordinator: str | None = None
    index: int | None = None
    count: int | None = None


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add(
        "--distributed",
        action="store_true",
        help="be one of several processes; what the next three leave out the cluster"
        " says (Slurm, Open MPI, Kubernetes, TPU)",
    )
    add(
        "--coordinator",
        type=_address,
        metavar="HOST:PORT",
        help="at which process 0 listens",
    )
    add("--process-id", type=_index, metavar="I", help="of this process, from 0 on")
    add("--num-processes", type=parse.count, metavar="N", help="of all")


def read(arguments: argparse.Namespace) -> Group | None:
    """Return where the processes find each other; None: there is one alone.

    Raises:
      UserError: If the options do not go together.
    """
    group = Group(arguments.coordinator, arguments.process_id, arguments.num_processes)
    given = {
        "--coordinator": group.coordinator,
        "--process-id": group.index,
        "--num-processes": group.count,
    }
    there = [name for name, value in given.items() if value is not None]
    missing = [name for name, value in given.items() if value is None]
    if there and missing and not arguments.distributed:
        raise UserError(
            f"{' and '.join(there)} without {' and '.join(missing)}: give all three, or"
            " --distributed to take the others from the cluster (Slurm, Open MPI,"
            " Kubernetes, TPU)"
        )
    if group.index is not None and group.count is not None:
        if group.index >= group.count:
            raise UserError(
                f"--process-id {group.index} with --num-processes {group.count}: ids are"
                f" from 0 to {group.count - 1}, each once"
            )
    return group if there or arguments.distributed else None


def alike(run: Callable[[], int], index: int) -> int:
    """Run one of several processes; where it fails, end it at once.

    One that waited for the others at its end, as JAX has it, would keep them waiting
    for what it will never send.

    Args:
      run: Returns the exit code.
      index: Of this process; the first one says what all of them raise.
    """
    import jax

    from lwsam_bench.support.processes import SharedError

    try:
        code = run()
        jax.distributed.shutdown()
        return code
    except UserError as error:
        said = None if isinstance(error, SharedError) and index else str(error)
        code = 2
    except KeyboardInterrupt:
        said, code = "interrupted", 130
    except Exception as error:
        said, code = traceback.format_exc(), 1
        if _LOST.search(str(error)):
            reason = str(error).strip().splitlines()[0][:500]
            said = f"{_LEFT_ALONE} ({reason})"
    if said is not None:
        print(f"lwsam-bench: process {index}: {said}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise argparse.ArgumentTypeError(
            f"expected HOST:PORT, such as 10.0.0.1:1234, got {text!r}"
        )
    return text


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text!r}")
    return int(text)
