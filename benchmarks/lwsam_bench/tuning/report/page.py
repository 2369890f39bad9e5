"""Tables, sentences and a plot of a tuning, from its rows alone."""

import pathlib
from collections.abc import Mapping, Sequence

from lwsam_bench.pages import report
from lwsam_bench.pages.docs import replace_generated
from lwsam_bench.support.rows import Row, write_text
from lwsam_bench.tuning import results
from lwsam_bench.tuning.report import pareto, plot, verdicts
from lwsam_bench.tuning.report.summary import (
    ACCURACY,
    BITS,
    counted,
    cpu_hours,
    Gap,
    gaps,
    HARMLESS,
    leader,
    PRICES,
    STOPS,
    summarize,
    Tuned,
    wall_hours,
    worst,
)
from lwsam_bench.tuning.tasks import TEXT, title


PAGE = "tuning"
_CHANGES = (
    "with images changed: noise of half a standard deviation on the pixels, a blur over"
    " 3 x 3 pixels, half the contrast, half a standard deviation brighter, a fifth of the"
    " pixels grey"
)
_NUMBERS = {
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "steps": "steps",
    "rho": "ρ",
}


def write(folder: pathlib.Path) -> None:
    """Write `tuning.md` and the plots of the rows in a folder."""
    rows = list(results.read(folder / results.ROWS))
    if not rows:
        return
    write_text(folder / f"{PAGE}.md", section(rows, plot_folder=""))
    plot.draw(folder, rows)


def write_docs(tunings: pathlib.Path, docs: str) -> None:
    """Bring the pages of the documentation up to date that are made of tunings.

    Args:
      tunings: Folder whose folders have the rows of a tuning each.
      docs: Folder of the pages, with the folder `images`.

    Raises:
      UserError: If a page is not there, or has not its marks.
    """
    page = pathlib.Path(docs) / f"{PAGE}.md"
    found = all_rows(tunings)
    write_text(page, replace_generated(page, PAGE, sections(found)))
    pareto.write_docs(found, docs)
    verdicts.write_docs(found, docs)
    for rows in found:
        plot.draw(page.parent / "images", rows)


def sections(tunings: Sequence[Sequence[Row]]) -> str:
    """Return what the page `tuning.md` has between its marks, of such rows."""
    made = [section(rows, plot_folder="images/") for rows in tunings]
    return "\n".join(made) or "No rows yet.\n"


def all_rows(folder: pathlib.Path) -> list[list[Row]]:
    """Return the rows of each tuning whose folder is in a folder."""
    found = sorted(folder.glob(f"*/{results.ROWS}"))
    return [rows for path in found if (rows := list(results.read(path)))]


def section(rows: Sequence[Row], plot_folder: str) -> str:
    """Return the Markdown of one task."""
    found = summarize(rows)
    lines = [f"## {title(rows[0]['task'])}", facts(rows)]
    for family in ("sgd", "adamw"):
        some = {n: t for n, t in found.items() if t[0].method.family == family}
        if not some:
            continue
        lines += [
            f"![Accuracy over gradients]({plot_folder}{plot.name(rows, family)})",
            _accuracy_table(some),
            "\n".join(f"- {x}" for x in _sentences(some, family)),
            _parts_table(some),
            _survival_table(some),
            _config_table(some),
            _harmless(some),
        ]
    return "\n\n".join(line for line in lines if line) + "\n"


def facts(rows: Sequence[Row]) -> str:
    """Return how much was tried, in a sentence or two."""
    task, origin = rows[-1]["task"], rows[-1]["origin"]
    items = "characters" if task["dataset"] == TEXT else "images"
    draws = len({row["draws"] for row in rows})
    seeds = len({row["seed"] for row in rows if row["phase"] == "final"})
    took = cpu_hours(rows)
    of = "of one core's time" if took is not None else "by the clock"
    return (
        f"{task['train_images']:,} training {items}, a tenth of them for validation;"
        f" {task['model']}, {task['steps'][0]} to {task['steps'][1]} steps."
        f" {rows[0]['trials']} trials for each method and set of draws, {draws}"
        f" {'sets' if draws > 1 else 'set'} of draws, {seeds} fresh seeds:"
        f" {len(rows):,} runs in {_duration(took or wall_hours(rows))} {of}."
        f" JAX {origin['packages']['jax']}, {origin['platform']}."
    )


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _accuracy_table(found: Mapping[str, list[Tuned]]) -> str:
    header = ["method", "price", "gradients", "CPU seconds"]
    for name in ("last step", "selected step"):
        header += [name, "from the base"]
    header += ["ECE"]
    cells = []
    for name, tuned in found.items():
        each = lambda text, tuned=tuned: "; ".join(text(t) for t in tuned)
        row = [
            tuned[0].method.label,
            each(lambda t: f"{t.mean('price')[0]:.2f}"),
            each(lambda t: f"{t.mean('gradients')[0]:.0f}"),
            each(lambda t: f"{t.mean('cpu_seconds')[0]:.1f}".replace("nan", "–")),
        ]
        for stop in STOPS:
            row += [
                each(lambda t, stop=stop: _score(t, stop)),
                _gap(worst(gaps(found, name, stop)), tuned[0].method.is_base),
            ]
        row += [each(lambda t: f"{100 * t.mean('last', 'ece')[0]:.1f}")]
        cells.append(row)
    notes = (
        f"{_named(found)}, mean ± standard error over the seeds, one number for each"
        " set of draws. *From the base* is the difference, paired by seed, in the set of"
        " draws where it is worse; in brackets if it is within two standard errors."
        " Price is in gradients a step. CPU seconds are of the steps alone, without"
        " compiling. ECE, in %, is at the last step."
    )
    return report.markdown(header, cells, notes).rstrip()


def _parts_table(found: Mapping[str, list[Tuned]]) -> str:
    """Return what is left of each turn; nothing where there is one."""
    if "parts" not in next(iter(found.values()))[0].one["last"]:
        return ""
    cells = []
    for tuned in found.values():
        row = [tuned[0].method.label]
        for number in range(2):
            pairs = [t.part(number) for t in tuned]
            row.append("; ".join(ACCURACY.text(*x) for x in pairs))
        cells.append(row)
    notes = "Test accuracy in % of the last step, after both turns."
    return report.markdown(
        ["method", "first turn", "second turn"], cells, notes
    ).rstrip()


def _survival_table(found: Mapping[str, list[Tuned]]) -> str:
    every = [t for tuned in found.values() for t in tuned]
    # Older rows have fewer of them.
    names = list(dict.fromkeys(n for t in every for n in t.one["last"]["survival"]))
    cells = []
    for tuned in found.values():
        row = [tuned[0].method.label, "; ".join(_score(t, "last") for t in tuned)]
        for name in names:
            numbers = [t.mean("last", "survival", name) for t in tuned]
            row.append("; ".join(tuned[0].measure.text(*x) for x in numbers))
        cells.append([x.replace("nan", "–") for x in row])
    notes = (
        f"{_named(found)}, of the last step: as trained, with the weights rounded to so"
        " many bits, with noise of a share of each layer's norm on the weights"
    )
    notes += "." if every[0].measure is BITS else f", and {_CHANGES}."
    return report.markdown(["method", "as trained", *names], cells, notes).rstrip()


def _named(found: Mapping[str, list[Tuned]]) -> str:
    measure = next(iter(found.values()))[0].measure
    name = measure.name[:1].upper() + measure.name[1:]
    return f"{name} in %" if measure is ACCURACY else f"{name} (fewer are better)"


def _config_table(found: Mapping[str, list[Tuned]]) -> str:
    cells = []
    for tuned in found.values():
        for t in tuned:
            own = [n for n in t.config if n not in _NUMBERS]
            cells.append(
                [
                    t.method.label,
                    str(t.draws + 1),
                    *(
                        f"{t.config[name]:.3g}" if name in t.config else "–"
                        for name in _NUMBERS
                    ),
                    ", ".join(f"{n} {t.config[n]:.3g}" for n in own) or "–",
                ]
            )
    header = ["method", "draws", *_NUMBERS.values(), "its own"]
    return report.markdown(header, cells, "What was chosen.").rstrip()


def _harmless(found: Mapping[str, list[Tuned]]) -> str:
    """Return a sentence that names the methods whose best radius does next to nothing."""
    near = [
        f"{t.method.label} (draws {t.draws + 1}: ρ = {t.config['rho']:.2g})"
        for tuned in found.values()
        for t in tuned
        if t.radius_place is not None and t.radius_place <= HARMLESS
    ]
    if not near:
        return (
            "No best radius is in the lowest fifth of its range, where it is harmless."
        )
    return (
        "The best radius is in the lowest fifth of its range, where it does next to"
        f" nothing: {', '.join(near)}."
    )


def _sentences(found: Mapping[str, list[Tuned]], family: str) -> list[str]:
    """Return who wins at each price under each stopping rule, or that nobody does."""
    if family not in found:
        return []
    base = found[family][0].method.label
    lines = []
    for price in PRICES:
        for stop, meaning in STOPS.items():
            where = f"Up to {price:.2f}, at the {meaning}"
            best = leader(found, family, price, stop)
            if best is None:
                lines.append(f"{where}: no difference to {base}.")
                continue
            tuned, gap = best
            score, measure = _score(counted(tuned, stop), stop), tuned[0].measure
            lines.append(
                f"{where}: **{tuned[0].method.label}**, {score} {measure.unit},"
                f" {gap} {measure.points} from {base}."
            )
    return lines


def _score(tuned: Tuned, stop: str) -> str:
    return tuned.measure.text(*tuned.score(stop))


def _gap(gap: Gap | None, is_base: bool) -> str:
    if gap is None or is_base:
        return "–"
    text = str(gap)
    return f"({text})" if gap.verdict == "no difference" else text
