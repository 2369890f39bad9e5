"""The presets side by side: accuracy over cost, and which of them are dominated."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from lwsam_bench.pages import report
from lwsam_bench.pages.docs import replace_generated
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row, write_text
from lwsam_bench.tuning import results
from lwsam_bench.tuning.family import NAMES
from lwsam_bench.tuning.method import Method
from lwsam_bench.tuning.methods import choose
from lwsam_bench.tuning.report import page, pareto
from lwsam_bench.tuning.report.pareto import Point
from lwsam_bench.tuning.report.summary import Gap, gap, Tuned, worst
from lwsam_bench.tuning.tasks import title


PAGE = "family"
_BASES = {"sgd": "SGD", "adamw": "AdamW"}
_SLACK = 1.005  # of a cost: a number of steps is whole


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method, or a base optimizer with other steps, in all sets of draws.

    Attributes:
      point: As `pareto` has it: of the set of draws that counts.
      tuned: Of each set of draws.
      by: The entry that dominates it by most, and by how much; None if there is none.
    """

    point: Point
    tuned: Mapping[int, Tuned]
    by: tuple[str, Gap] | None = None


def is_of_family(methods: Sequence[Method]) -> bool:
    """Whether there are presets among the methods, which have a page of their own."""
    return any(method.name in NAMES for method in methods)


def write(folder: pathlib.Path) -> None:
    """Write `family.md` and the plots of the rows in a folder."""
    rows = list(results.read(folder / results.ROWS))
    if rows:
        write_text(folder / f"{PAGE}.md", section(rows, plot_folder=""))
        draw(folder, rows)


def write_docs(tunings: pathlib.Path, docs: str) -> None:
    """Bring the page `family.md` of the documentation up to date.

    Args:
      tunings: Folder whose folders have the rows of a tuning each.
      docs: Folder of the page, with the folder `images`.

    Raises:
      UserError: If the page is not there, or has not its marks.
    """
    target = pathlib.Path(docs) / f"{PAGE}.md"
    found = page.all_rows(tunings)
    write_text(target, replace_generated(target, PAGE, sections(found)))
    for rows in found:
        draw(target.parent / "images", rows)


def sections(tunings: Sequence[Sequence[Row]]) -> str:
    """Return what the page has between its marks."""
    made = [section(rows, plot_folder="images/") for rows in tunings]
    return "\n".join(made) or "No rows yet.\n"


def section(rows: Sequence[Row], plot_folder: str) -> str:
    """Return the Markdown of one task."""
    lines = [f"## {title(rows[0]['task'])}", page.facts(rows)]
    for base in _BASES:
        some = entries(rows, base)
        if not some:
            continue
        lines += [
            f"![Accuracy over gradients]({plot_folder}{_name(rows, base)})",
            _table(some, base),
            "\n".join(_sentences(some, base)),
        ]
    begun = {row["method"] for row in rows}
    absent = [m.label for m in choose([PAGE]) if m.name not in begun]
    if absent:
        lines.append(f"Not run: {'; '.join(absent)}.")
    unfinished = pareto.unfinished(rows)
    if unfinished:
        lines.append(f"Not finished: {'; '.join(unfinished)}.")
    return "\n\n".join(lines) + "\n"


def entries(rows: Sequence[Row], base: str) -> list[Entry]:
    """Return the methods beside a base optimizer by their cost, and who dominates them.

    One dominates another if in each set of draws it costs no more and is better by more
    than two standard errors of the difference, paired by seed.
    """
    some = [Entry(p, {t.draws: t for t in p.every}) for p in pareto.points(rows, base)]
    return [
        dataclasses.replace(entry, by=_dominating(entry, some))
        if entry.point.lead is not None
        else entry
        for entry in some
    ]


def _dominating(entry: Entry, others: Sequence[Entry]) -> tuple[str, Gap] | None:
    found = []
    for other in others:
        pairs = [(other.tuned.get(d), mine) for d, mine in entry.tuned.items()]
        if any(
            theirs is None or theirs.cost > _SLACK * mine.cost for theirs, mine in pairs
        ):
            continue
        leads = [gap(theirs, mine, "last") for theirs, mine in pairs if theirs]
        if all(lead is not None and lead.verdict == "better" for lead in leads):
            found.append((other.point.label, worst([x for x in leads if x])))
    known = [(label, lead) for label, lead in found if lead is not None]
    return max(known, key=lambda pair: pair[1].mean, default=None)


def draw(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """Draw accuracy over total gradients, those that are dominated as rings."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from error
    for base in _BASES:
        some = entries(rows, base)
        if not some:
            continue
        figure, axis = plt.subplots(figsize=(9, 6.5), layout="constrained")
        for entry in some:
            x, y = entry.point.gradients, entry.point.tuned.score("last")[0]
            colour = report.COLOURS[0 if entry.point.lead is None else 2]
            full = colour if entry.by is None else "none"
            axis.plot(x, y, "o", color=colour, markerfacecolor=full, markersize=5)
            axis.annotate(
                entry.point.label,
                (x, y),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=6.5,
                color=colour,
            )
        axis.set(
            xscale="log",
            xlabel="gradients of the whole run",
            title=f"{title(rows[0]['task'])}: test accuracy, last step",
        )
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(ScalarFormatter())
        report._save(figure, [axis], folder / _name(rows, base))


def _name(rows: Sequence[Row], base: str) -> str:
    task = rows[0]["task"]
    return f"family-{task['name']}-noise{task['noise'] * 100:g}-{base}.png"


def _table(some: Sequence[Entry], base: str) -> str:
    best = pareto.front([entry.point for entry in some])
    cells = []
    for entry in some:
        point, every = entry.point, entry.tuned.values()
        lead = "–" if point.lead is None else str(point.lead)
        if point.lead is not None and point.lead.verdict == "no difference":
            lead = f"({lead})"
        each = lambda text, every=every: "; ".join(text(t) for t in every)
        own = lambda t: ", ".join(f"{n} {t.config[n]:.2g}" for n in t.method.own)
        cells.append(
            [
                f"**{point.label}**" if point in best else point.label,
                each(lambda t: f"{t.mean('price')[0]:.2f}"),
                each(lambda t: f"{t.cost:.0f}"),
                each(lambda t: t.measure.text(*t.score("last"))),
                lead,
                each(lambda t: f"{t.config['rho']:.2g}" if "rho" in t.config else "–"),
                each(own) if point.tuned.method.own else "–",
                "–" if entry.by is None else entry.by[0],
            ]
        )
    name = _BASES[base]
    header = ["method", "price", "gradients", "test accuracy", f"from {name}"]
    notes = (
        "By the gradients of the set of draws that counts, which is the worse one. Test"
        " accuracy in % at the last step, mean ± standard error over the seeds, one"
        f" number for each set of draws. *From {name}*: the difference to {name} that may"
        " cost as much, paired by seed, in the set of draws where it is worse; in"
        " brackets if it is within two standard errors. In bold: nothing has a better"
        " mean for as little, nor the same for less. *Dominated by*: costs no more and is"
        " better by more than two standard errors, in every set of draws; of several the"
        " one that is ahead by most."
    )
    return report.markdown([*header, "ρ", "its own", "dominated by"], cells, notes)


def _sentences(some: Sequence[Entry], base: str) -> list[str]:
    presets = [entry for entry in some if entry.point.lead is not None]
    beaten = [
        f"{e.point.label} (by {e.by[0]}, {e.by[1]} points)" for e in presets if e.by
    ]
    others = [e.point.label for e in presets if not e.by]
    leads = [(e.point.label, e.point.lead) for e in presets]
    ahead = [label for label, lead in leads if lead and lead.verdict == "better"]
    behind = [label for label, lead in leads if lead and lead.verdict == "worse"]
    said = lambda names: "; ".join(names) if names else "none"
    return [
        f"- Dominated: {said(beaten)}.",
        f"- Not dominated: {said(others)}.",
        f"- Ahead of {_BASES[base]} that may cost as much: {said(ahead)}.",
        f"- Behind it: {said(behind)}.",
    ]
