"""What was lost, as a table; the rows are all that it knows."""

import pathlib
from collections.abc import Sequence

from lwsam_bench.pages import docs, report
from lwsam_bench.support.rows import Row, write_text


PAGE, MARK = "faults.md", "faults"
_METHODS = {"lwsam": "Layer-wise SAM", "sam": "SAM"}
_HEADER = ("fault", "how", "restarts", "steps lost", "steps repeated", "the end")


def faults(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of faults."""
    return [row for row in rows if row.get("kind") == "fault"]


def holds(row: Row) -> bool:
    """Return whether nothing was lost, and the run ended as the unbroken one."""
    return row["lost"] == 0 and not row["differences"]


def line(row: Row) -> str:
    """Return a row as one line of text."""
    lost = f"{row['restarts']} restarts, {row['lost']} steps lost"
    return f"{row['fault']}: {lost}, {_end(row)}"


def markdown(rows: Sequence[Row]) -> str:
    """Return the table, with a note on the run."""
    found = faults(rows)
    cells = [
        [
            row["fault"],
            row["how"],
            str(row["restarts"]),
            str(row["lost"]),
            str(row["repeated"]),
            _end(row),
        ]
        for row in found
    ]
    (config,) = [row for row in rows if row.get("kind") == "config"]
    method = _METHODS[config["method"][0]]
    notes = (
        f"{method} on digits, {config['steps']} steps, a checkpoint every"
        f" {config['every']}; {sum(row['restarts'] for row in found)} restarts in all,"
        f" {sum(row['lost'] for row in found)} steps lost beyond the last checkpoint."
    )
    return report.markdown(_HEADER, cells, notes)


def _end(row: Row) -> str:
    if row["differences"]:
        return f"**differs**: {row['differences'][0]}"
    if "largest" in row:
        return f"equal within {row['largest']:.0e}"
    return "equal, bit by bit"


def update_page(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """Bring the page of the documentation up to date."""
    page = folder / PAGE
    write_text(page, docs.replace_generated(page, MARK, markdown(rows)))
