"""Rows of FLOPs and bytes as a table of the documentation."""

import pathlib
from collections.abc import Sequence

from lwsam_bench.pages import docs, report
from lwsam_bench.support.rows import Row, write_text


PAGE, MARK = "parallel.md", "scaling"


def markdown(rows: Sequence[Row]) -> str:
    """Return the table, with a note on what was compiled."""
    (config,) = [row for row in rows if row["kind"] == "config"]
    found = [row for row in rows if row["kind"] == "program"]
    alone = [row for row in found if row["processes"] == 1]
    counts = sorted({row["devices"] for row in alone})
    header = ["weights", "method"]
    header += [f"MFLOP, {_devices(n)}" for n in counts]
    header += [f"KiB, {_devices(n)}" for n in counts if n > 1]
    names = dict.fromkeys((row["layout"], row["method"]) for row in alone)
    cells = []
    for layout, method in names:
        by_count = {
            row["devices"]: row
            for row in alone
            if (row["layout"], row["method"]) == (layout, method)
        }
        line = [layout, method]
        line += [f"{by_count[n]['flops'] / 1e6:,.1f}" for n in counts]
        line += [f"{total(by_count[n]) / 1024:,.0f}" for n in counts if n > 1]
        cells.append(line)
    packages = config["packages"]
    notes = (
        f"For each device, from the compiled step: {config['network']}; JAX"
        f" {packages['jax']} on {config['platform']}. {_processes(found, alone)}"
    )
    return report.markdown(header, cells, notes)


def total(row: Row) -> int:
    """Return the bytes of all kinds."""
    return sum(row["bytes"].values())


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _processes(found: Sequence[Row], alone: Sequence[Row]) -> str:
    """Say what several processes with a device each have, beside one with all."""
    key = lambda row: (row["layout"], row["method"], row["devices"])
    expected = {key(row): (row["flops"], row["bytes"]) for row in alone}
    several = [row for row in found if row["processes"] > 1]
    if not several:
        return "Of one process."
    counts = " and ".join(str(n) for n in sorted({row["processes"] for row in several}))
    others = [
        f"{row['layout']}, {row['method']}, {row['processes']}"
        for row in several
        if expected[key(row)] != (row["flops"], row["bytes"])
    ]
    if not others:
        return f"With {counts} processes of one device each, the same to the byte."
    return f"With {counts} processes of one device each, other: {'; '.join(others)}."


def update_page(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """Bring the page of the documentation up to date."""
    page = folder / PAGE
    write_text(page, docs.replace_generated(page, MARK, markdown(rows)))
