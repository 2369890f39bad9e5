"""Which method for which task and price: the verdicts of all tunings on one page."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence

from lwsam_bench.pages import report
from lwsam_bench.pages.docs import replace_generated
from lwsam_bench.support.rows import Row, write_text
from lwsam_bench.tuning.methods import METHODS
from lwsam_bench.tuning.report.summary import (
    gaps,
    HARMLESS,
    leader,
    PRICES,
    STOPS,
    summarize,
    Tuned,
    worst,
)
from lwsam_bench.tuning.tasks import title


PAGE = "choose"
NOBODY = "no difference"
_BASES = {"sgd": "SGD", "adamw": "AdamW"}

Found = tuple[str, str, Mapping[str, list[Tuned]]]  # title, base, methods


def write_docs(tunings: Sequence[Sequence[Row]], docs: str) -> None:
    """Bring the page `choose.md` of the documentation up to date.

    Args:
      tunings: The rows of each tuning.
      docs: Folder of the page.

    Raises:
      UserError: If there is no such page with its marks.
    """
    page = pathlib.Path(docs) / f"{PAGE}.md"
    write_text(page, replace_generated(page, PAGE, sections(tunings)))


def sections(tunings: Sequence[Sequence[Row]]) -> str:
    """Return what the page has between its marks."""
    some = [
        (title(rows[0]["task"]), base, {n: t for n, t in every.items() if of(t, base)})
        for rows in tunings
        for every in [summarize(rows)]
        for base in _BASES
        if base in every
    ]
    if not some:
        return "No rows yet.\n"
    return "\n".join(
        [
            "### Accuracy\n",
            _verdicts(some),
            "### After training\n",
            _survivals(some),
            "### The radius\n",
            _radii(some),
        ]
    )


def of(tuned: Sequence[Tuned], base: str) -> bool:
    """Whether a method is compared with a base optimizer."""
    return tuned[0].method.family == base


def _verdicts(some: Sequence[Found]) -> str:
    cells = []
    for name, base, found in some:
        for what, meaning in STOPS.items():
            leaders = [_leader(found, base, price, what) for price in PRICES]
            cells.append([name, meaning, *leaders, _behind(found, what)])
    header = ["task", "at the", *_prices(), "behind the base"]
    notes = (
        "What is furthest ahead of SGD (of AdamW on the text) at a price in gradients a"
        " step, in points of test accuracy (in bits), in the worse of the two tunings, if"
        " that is by more than two standard errors over the seeds. *Behind the base* are"
        " so many of the methods that were tuned by as much, in the worse of their"
        " tunings."
    )
    return report.markdown(header, cells, notes)


def _survivals(some: Sequence[Found]) -> str:
    cells, without = [], []
    for name, base, found in some:
        even = []
        for what in found[base][0].one["last"].get("survival", ()):
            leaders = [_leader(found, base, price, what) for price in PRICES]
            if any(x != NOBODY for x in leaders):
                cells.append([name, what, *leaders])
            else:
                even.append(what)
        if even:
            without.append(f"- {name}: {', '.join(even)}.\n")
    rest = f"No difference at any price:\n\n{''.join(without)}" if without else ""
    if not cells:
        return rest
    notes = (
        "The same, judged after the weights were rounded or shaken, or the images"
        " changed. [Tuned alike](tuning.md) has the accuracies, and what was paid in"
        " accuracy as trained."
    )
    return f"{report.markdown(['task', 'after', *_prices()], cells, notes)}\n{rest}"


def _radii(some: Sequence[Found]) -> str:
    cells = []
    for method in METHODS:
        if method.radius is None:
            continue
        tuned = [t for _, _, found in some for t in found.get(method.name, [])]
        if not tuned:
            continue
        best = sorted(t.one["config"]["rho"] for t in tuned)
        near = sum((t.radius_place or 0.0) <= HARMLESS for t in tuned)
        cells.append(
            [
                method.label,
                f"{method.radius.low:g} to {method.radius.high:g}",
                f"{best[0]:.2g} to {best[-1]:.2g}",
                f"{statistics.median(best):.2g}",
                f"{near} of {len(tuned)}",
            ]
        )
    header = ["method", "first range", "best", "median", "harmless"]
    notes = (
        "The range that is searched first, and the best radii of all tunings above, two"
        f" for each task. *Harmless*: in the lowest {HARMLESS:.0%} of the range, where a"
        " radius does next to nothing, so that the tuning all but chose the base."
    )
    return report.markdown(header, cells, notes)


def _leader(
    found: Mapping[str, list[Tuned]], base: str, price: float, what: str
) -> str:
    best = leader(found, base, price, what)
    if best is None:
        return NOBODY
    (tuned, *_), gap = best
    return f"**{tuned.method.label}**, {gap}"


def _behind(found: Mapping[str, list[Tuned]], what: str) -> str:
    others = [name for name, tuned in found.items() if not tuned[0].method.is_base]
    behind = [
        name
        for name in others
        if (gap := worst(gaps(found, name, what))) is not None
        and gap.verdict == "worse"
    ]
    return f"{len(behind)} of {len(others)}"


def _prices() -> list[str]:
    return [f"up to {price:.2f}" for price in PRICES]
