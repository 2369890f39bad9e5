"""What travels between devices, read from the text of a compiled program."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any


KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT\s+)?%?[\w.\-]+\s*=\s*")
_OPERATION = re.compile(rf"\s*({'|'.join(KINDS)})(-start)?\(")
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_BITS = re.compile(r"[a-z]+(\d+)")
_LIST_OF_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_SHAPE_OF_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")

# The bytes of an array, or of each part of a tuple.
_Bytes = float | list[Any]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program, as one device sees it.

    Attributes:
      kind: One of `KINDS`.
      bytes: Of what it leaves on the device, once it is done; of a `reduce-scatter` of
        what it takes, which is the larger one.
    """

    kind: str
    bytes: int


def collectives(text: str) -> list[Collective]:
    """Return the collective operations of a compiled program, in order of the text.

    One that runs in the background, as `start` and `done`, counts once. The body of a
    loop is in the text once, however often it runs.

    Args:
      text: What `compiled.as_text()` returns.
    """
    return list(_found(text))


def bytes_by_kind(text: str) -> Mapping[str, int]:
    """Return the bytes of all collectives of a program by their kind."""
    total: collections.Counter[str] = collections.Counter()
    for found in collectives(text):
        total[found.kind] += found.bytes
    return dict(total)


def _found(text: str) -> Iterator[Collective]:
    for line in text.splitlines():
        if not any(kind in line for kind in KINDS):
            continue
        line = _COMMENT.sub("", line)
        begin = _INSTRUCTION.match(line)
        if begin is None:
            continue
        shape, end = _shape(line, begin.end())
        operation = _OPERATION.match(line, end)
        if operation is None:
            continue
        kind, start = operation[1], operation[2]
        # What is started has its operands beside its results, but for an all-reduce,
        # and may have other things behind them.
        if (
            start
            and kind != "all-reduce"
            and isinstance(shape, list)
            and len(shape) > 1
        ):
            shape = shape[1]
        size = _total(shape)
        if kind == "reduce-scatter":
            size *= _group(line)
        yield Collective(kind, round(size))


def _shape(line: str, at: int) -> tuple[_Bytes, int]:
    """Read a shape; return its bytes and where it ends."""
    if line[at] == "(":
        parts: list[Any] = []
        at += 1
        while line[at] != ")":
            part, at = _shape(line, at)
            parts.append(part)
            while line[at] in ", ":
                at += 1
        return parts, at + 1
    array = _ARRAY.match(line, at)
    if array is None:  # a token, or what stands for no array
        end = re.compile(r"[^\s,()]*").match(line, at)
        assert end is not None
        return 0.0, max(end.end(), at + 1)
    at = array.end()
    if line[at : at + 1] == "{":  # the layout
        at = line.index("}", at) + 1
    sizes = [int(size.lstrip("<=")) for size in array[2].split(",") if size.strip()]
    return math.prod(sizes) * _bits(array[1]) / 8, at


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    found = _BITS.match(dtype)
    return int(found[1]) if found else 0


def _total(shape: _Bytes) -> float:
    return sum(map(_total, shape)) if isinstance(shape, list) else shape


def _group(line: str) -> int:
    """Return how many devices take part together; 1 if the line does not say."""
    if found := _LIST_OF_GROUPS.search(line):
        return len(found[1].split(","))
    found = _SHAPE_OF_GROUPS.search(line)
    return int(found[1]) if found else 1
