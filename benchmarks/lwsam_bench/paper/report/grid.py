"""A table as a page lays it out: rows under a common heading, classes for columns."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from lwsam_bench.paper.artefact import Table


# A sign, then a digit: such cells read best one below the other, to the right.
_NUMBER = re.compile(r"^[-−–+±<≤>≥~ ]*\d")
_PUBLISHED = re.compile(r"\b(published|paper)\b", re.IGNORECASE)
_EMPTY = ("", "–")


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that have the first cell of the table in common.

    Attributes:
      title: That cell; None if the table has no groups.
      rows: Without it, if there are groups.
    """

    title: str | None
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table laid out.

    Attributes:
      header: Titles of the columns that are left.
      classes: Of each of them: `number`, `published`, both or none.
      groups: The rows.
    """

    header: tuple[str, ...]
    classes: tuple[str, ...]
    groups: tuple[Group, ...]


def lay_out(table: Table) -> Grid:
    """Return the layout of a table.

    A first column that repeats itself, or leaves cells empty below the first of their
    kind, becomes headings within the table: a phone has no room for it.
    """
    header, rows = table.header, table.rows
    names = _filled_down([row[0] for row in rows]) if header else []
    grouped = len(header) > 2 and len(set(names)) < len(names)
    if not grouped:
        groups = (Group(None, rows),)
    else:
        header = header[1:]
        pairs = zip(names, rows, strict=True)
        groups = tuple(
            Group(name, tuple(row[1:] for _, row in some))
            for name, some in itertools.groupby(pairs, key=lambda pair: pair[0])
        )
    rows = tuple(row for group in groups for row in group.rows)
    classes = tuple(
        _classes(title, [row[place] for row in rows], first=place == 0)
        for place, title in enumerate(header)
    )
    return Grid(header, classes, groups)


def _filled_down(cells: Sequence[str]) -> list[str]:
    """Return cells with those that are empty as the ones above."""
    return list(itertools.accumulate(cells, lambda above, cell: cell or above))


def _is_number(cell: str) -> bool:
    return _NUMBER.match(cell) is not None


def _classes(title: str, column: Sequence[str], *, first: bool) -> str:
    cells = [cell for cell in column if cell not in _EMPTY]
    found = []
    # A word among numbers says why there is none; an empty column waits for numbers.
    if not first and 2 * sum(map(_is_number, cells)) >= len(cells):
        found.append("number")
    if _PUBLISHED.search(title):
        found.append("published")
    return " ".join(found)
