"""What a price buys: each method beside the base optimizer that may cost as much."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from lwsam_bench.pages import report
from lwsam_bench.pages.docs import replace_generated
from lwsam_bench.support.rows import Row, write_text
from lwsam_bench.tuning.methods import BY_NAME, METHODS
from lwsam_bench.tuning.protocol import LENGTHS, merit
from lwsam_bench.tuning.report import plot
from lwsam_bench.tuning.report.summary import (
    counted,
    Gap,
    gap,
    length_of,
    Measure,
    summarize,
    Tuned,
    worst,
)
from lwsam_bench.tuning.tasks import TASKS, title, TITLES


PAGE = "pareto"
_NAMES = {"sgd": "SGD", "adamw": "AdamW"}
_STEPS = {0.5: "half the steps", 1.0: "as tuned", 2.0: "twice the steps"}
_SLACK = 1.005  # of a price: a number of steps is whole


@dataclasses.dataclass(frozen=True)
class Point:
    """A method over what all of its steps cost.

    Attributes:
      label: What it is called.
      gradients: Of the whole run.
      tuned: The set of draws that counts.
      rival: The base optimizer that may cost as much, in the same set of draws.
      lead: The difference of both in the set of draws where it is worse.
      every: All sets of draws.
    """

    label: str
    gradients: float
    tuned: Tuned
    rival: Tuned | None = None
    lead: Gap | None = None
    every: Sequence[Tuned] = ()

    @property
    def score(self) -> float:
        """What counts, the higher the better."""
        return self.tuned.measure.sign * self.tuned.score("last")[0]


def write_docs(tunings: Sequence[Sequence[Row]], docs: str) -> None:
    """Bring the page `pareto.md` of the documentation up to date.

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
    there = {str(rows[0]["task"]["name"]) for rows in tunings}
    absent = [TITLES[name] for name in TASKS if name not in there]
    lines = [section(rows) for rows in tunings]
    if absent:
        lines.append(f"No rows yet of: {'; '.join(absent)}.\n")
    return "\n".join(lines)


def section(rows: Sequence[Row]) -> str:
    """Return the Markdown of one task."""
    lines = [f"## {title(rows[0]['task'])}"]
    for family in _NAMES:
        some = points(rows, family)
        if not some:
            continue
        measure = some[0].tuned.measure
        lines += [
            f"![{measure.name} over gradients](images/{plot.name(rows, family)})",
            _table(some, front(some), family),
            _sentence(some, family),
        ]
        begun = {row["method"] for row in rows}
        absent = [
            m.label for m in METHODS if m.family == family and m.name not in begun
        ]
        if absent:
            lines.append(f"Not run: {'; '.join(absent)}.")
    halves = unfinished(rows)
    if halves:
        lines.append(f"Not finished: {'; '.join(halves)}.")
    return "\n\n".join(lines) + "\n"


def points(rows: Sequence[Row], family: str) -> list[Point]:
    """Return the methods of a family, and the base optimizer's lengths, by their cost."""
    found = {
        name: tuned
        for name, tuned in summarize(rows).items()
        if tuned[0].method.family == family
    }
    base = {length: length_of(rows, family, length) for length in LENGTHS}
    made = []
    for length, tuned in base.items():
        if tuned:
            one = counted(tuned, "last")
            label = f"{one.method.label}, {_STEPS[length]}"
            made.append(Point(label, one.cost, one, every=tuned))
    for name, tuned in found.items():
        if name == family:
            continue
        one = counted(tuned, "last")
        rivals = {t.draws: _rival(base, t) for t in tuned}
        leads = [
            lead
            for t in tuned
            if (rival := rivals[t.draws]) is not None
            and (lead := gap(t, rival, "last")) is not None
        ]
        made.append(
            Point(
                one.method.label,
                one.cost,
                one,
                rivals[one.draws],
                worst(leads),
                every=tuned,
            )
        )
    return sorted(made, key=lambda point: point.gradients)


def front(some: Sequence[Point]) -> list[Point]:
    """Return the points that none is better than, nor as good at a lower cost."""

    def beats(other: Point, point: Point) -> bool:
        cost, score = other.gradients, other.score
        no_worse = cost <= point.gradients and score >= point.score
        return no_worse and (cost, score) != (point.gradients, point.score)

    return [p for p in some if not any(beats(other, p) for other in some)]


def _rival(base: Mapping[float, list[Tuned]], tuned: Tuned) -> Tuned | None:
    """Return the base optimizer that may cost as much, the best of these by validation.

    It was run at three lengths: the first that costs no less may be spent, and all below.
    """
    mine = [t for some in base.values() for t in some if t.draws == tuned.draws]
    mine.sort(key=lambda t: t.cost)
    below = sum(_SLACK * t.cost < tuned.cost for t in mine)
    allowed = mine[: below + 1]
    return max(allowed, key=lambda t: merit(list(t.rows.values())), default=None)


def _table(some: Sequence[Point], best: Sequence[Point], family: str) -> str:
    measure = some[0].tuned.measure
    cells = []
    for point in some:
        rival = point.rival
        lead = "–" if point.lead is None else str(point.lead)
        if point.lead is not None and point.lead.verdict == "no difference":
            lead = f"({lead})"
        cells.append(
            [
                f"**{point.label}**" if point in best else point.label,
                f"{point.gradients:.0f}",
                measure.text(*point.tuned.score("last")),
                "–" if rival is None else f"{rival.cost:.0f}",
                "–" if rival is None else measure.text(*rival.score("last")),
                lead,
            ]
        )
    name = _NAMES[family]
    header = [
        "method",
        "gradients",
        measure.name,
        f"{name}'s gradients",
        name,
        "difference",
    ]
    return report.markdown(header, cells, _notes(name, measure)).rstrip()


def _notes(name: str, measure: Measure) -> str:
    return (
        f"Gradients of the whole run, and {measure.name} at the last step, mean ±"
        f" standard error, of the worse set of draws. Beside it {name} that may cost as"
        " much: the best by validation of half, the same and twice the steps, up to the"
        " first of them that costs no less. The difference is paired by seed, in the set"
        " of draws where it is worse; in brackets if it is within two standard errors. In"
        " bold: nothing has a better mean for as little, nor the same for less."
    )


def _sentence(some: Sequence[Point], family: str) -> str:
    name = _NAMES[family]
    compared = [point for point in some if point.lead is not None]
    ahead = [p.label for p in compared if p.lead and p.lead.verdict == "better"]
    if not compared:
        return f"Nothing is there to compare with {name}."
    if not ahead:
        return f"No method is ahead of {name} that may cost as much: no difference."
    return f"Ahead of {name} that may cost as much: {'; '.join(ahead)}."


def unfinished(rows: Sequence[Row]) -> list[str]:
    """Return the methods that lack final runs in some set of draws."""
    final = {
        (r["method"], r["draws"], r["seed"]) for r in rows if r["phase"] == "final"
    }
    seeds = {seed for _, _, seed in final}
    draws = range(1 + max(row["draws"] for row in rows))
    return [
        BY_NAME[name].label
        for name in dict.fromkeys(row["method"] for row in rows)
        if any((name, draw, seed) not in final for draw in draws for seed in seeds)
        or not seeds
    ]
