"""Tables, sentences and a plot of a tuning, from its rows alone."""

import math
import pathlib
from collections.abc import Mapping, Sequence

from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from lwsam_bench.pages import report
from lwsam_bench.pages.docs import replace_generated
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row, write_text
from lwsam_bench.tuning import results
from lwsam_bench.tuning.report.summary import (
    counted,
    Gap,
    gaps,
    HARMLESS,
    hours,
    payable,
    STOPS,
    summarize,
    Tuned,
    worst,
)
from lwsam_bench.tuning.tasks import title


PAGE = "tuning"
PRICES = (1.0, 1.1, 2.0)  # in gradients of the base optimizer, a step
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
    plot(folder, rows)


def write_docs(tunings: pathlib.Path, docs: str) -> None:
    """Bring the page `tuning.md` of the documentation up to date.

    Args:
      tunings: Folder whose folders have the rows of a tuning each.
      docs: Folder of the page, with the folder `images`.

    Raises:
      UserError: If there is no such page with its marks.
    """
    page = pathlib.Path(docs) / f"{PAGE}.md"
    write_text(page, replace_generated(page, PAGE, sections(tunings)))
    for rows in _tunings(tunings):
        plot(page.parent / "images", rows)


def sections(tunings: pathlib.Path) -> str:
    """Return what the page of the documentation has between its marks."""
    made = [section(rows, plot_folder="images/") for rows in _tunings(tunings)]
    return "\n".join(made) or "No rows yet.\n"


def _tunings(folder: pathlib.Path) -> list[list[Row]]:
    found = sorted(folder.glob(f"*/{results.ROWS}"))
    return [rows for path in found if (rows := list(results.read(path)))]


def section(rows: Sequence[Row], plot_folder: str) -> str:
    """Return the Markdown of one task."""
    found = summarize(rows)
    lines = [f"## {title(rows[0]['task'])}", _facts(rows)]
    for family in ("sgd", "adamw"):
        some = {n: t for n, t in found.items() if t[0].method.family == family}
        if not some:
            continue
        lines += [
            f"![Accuracy over gradients]({plot_folder}{_plot_name(rows, family)})",
            _accuracy_table(some),
            "\n".join(f"- {x}" for x in _sentences(some, family)),
            _survival_table(some),
            _config_table(some),
            _harmless(some),
        ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _facts(rows: Sequence[Row]) -> str:
    task, origin = rows[-1]["task"], rows[-1]["origin"]
    draws = len({row["draws"] for row in rows})
    seeds = len({row["seed"] for row in rows if row["phase"] == "final"})
    return (
        f"{task['train_images']:,} training images, a tenth of them for validation;"
        f" {task['model']}, {task['steps'][0]} to {task['steps'][1]} steps."
        f" {rows[0]['trials']} trials for each method and set of draws, {draws}"
        f" {'sets' if draws > 1 else 'set'} of draws, {seeds} fresh seeds:"
        f" {len(rows):,} runs in {_duration(hours(rows))} of one core."
        f" JAX {origin['packages']['jax']}, {origin['platform']}."
    )


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _accuracy_table(found: Mapping[str, list[Tuned]]) -> str:
    header = ["method", "price", "gradients", "seconds"]
    for name in ("last step", "selected step"):
        header += [name, "over the base"]
    header += ["ECE"]
    cells = []
    for name, tuned in found.items():
        each = lambda text, tuned=tuned: "; ".join(text(t) for t in tuned)
        row = [
            tuned[0].method.label,
            each(lambda t: f"{t.mean('price')[0]:.2f}"),
            each(lambda t: f"{t.mean('gradients')[0]:.0f}"),
            each(lambda t: f"{t.mean('seconds')[0]:.1f}"),
        ]
        for stop in STOPS:
            row += [
                each(lambda t, stop=stop: _percent(*t.mean(stop, "accuracy"))),
                _gap(worst(gaps(found, name, stop)), tuned[0].method.is_base),
            ]
        row += [each(lambda t: f"{100 * t.mean('last', 'ece')[0]:.1f}")]
        cells.append(row)
    notes = (
        "Test accuracy in %, mean ± standard error over the seeds, one number for each"
        " set of draws. *Over the base* is the difference, paired by seed, in the set of"
        " draws where it is smaller; in brackets if it is within two standard errors."
        " Price is in gradients a step. ECE, in %, is at the last step."
    )
    return report.markdown(header, cells, notes).rstrip()


def _survival_table(found: Mapping[str, list[Tuned]]) -> str:
    names = list(next(iter(found.values()))[0].one["last"]["survival"])
    cells = []
    for tuned in found.values():
        row = [
            tuned[0].method.label,
            "; ".join(_percent(*t.mean("last", "accuracy")) for t in tuned),
        ]
        for name in names:
            numbers = [t.mean("last", "survival", name) for t in tuned]
            row.append("; ".join(_percent(*x) for x in numbers))
        cells.append(row)
    notes = (
        "Test accuracy in % of the last step: as trained, with the weights rounded to so"
        " many bits, with noise of a share of each layer's norm on the weights, and with"
        " noise of half a standard deviation on the pixels."
    )
    return report.markdown(["method", "as trained", *names], cells, notes).rstrip()


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
            some = payable(found, family, price)
            ahead = [
                (gap, tuned)
                for tuned in some
                if (gap := worst(gaps(found, tuned[0].method.name, stop))) is not None
            ]
            where = f"Up to {price:.2f}, at the {meaning}"
            better = [x for x in ahead if x[0].verdict == "better"]
            if not better:
                lines.append(f"{where}: no difference to {base}.")
                continue
            gap, tuned = max(better, key=lambda x: x[0].mean)
            accuracy = counted(tuned, stop).mean(stop, "accuracy")
            lines.append(
                f"{where}: **{tuned[0].method.label}**, {_percent(*accuracy)} %,"
                f" {_signed(gap)} points over {base}."
            )
    return lines


def _percent(mean: float, error: float) -> str:
    spread = "" if math.isnan(error) else f" ± {100 * error:.1f}"
    return f"{100 * mean:.1f}{spread}"


def _gap(gap: Gap | None, is_base: bool) -> str:
    if gap is None or is_base:
        return "–"
    text = _signed(gap)
    return f"({text})" if gap.verdict == "no difference" else text


def _signed(gap: Gap) -> str:
    error = "" if math.isnan(gap.error) else f" ± {100 * gap.error:.1f}"
    return f"{100 * gap.mean:+.1f}{error}"


def _plot_name(rows: Sequence[Row], family: str) -> str:
    task = rows[0]["task"]
    noise = f"noise{task['noise'] * 100:g}"
    return f"tuning-{task['name']}-{noise}-batch{task['batch_size']}-{family}.png"


def plot(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """Draw accuracy over total gradients, with the base's curve of fewer and more steps.

    Of a method's sets of draws it has the one that counts, of the base both.
    """
    found = summarize(rows)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from error
    for family in ("sgd", "adamw"):
        some = [t for t in found.values() if t[0].method.family == family]
        if not some:
            continue
        figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
        _draw_lengths(axis, rows, family)
        for number, tuned in enumerate(some):
            again, place = divmod(number, len(report.COLOURS))
            one = counted(tuned, "last")
            mean, error = one.mean("last", "accuracy")
            axis.errorbar(
                one.mean("gradients")[0],
                mean,
                yerr=0.0 if math.isnan(error) else error,
                color=report.COLOURS[place],
                marker="os^Dv"[again % 5],
                ls="",
                elinewidth=0.7,
                capsize=2,
                label=tuned[0].method.label,
            )
        axis.set(
            xscale="log",
            xlabel="gradients of the whole run",
            title=f"{title(rows[0]['task'])}: test accuracy, last step",
        )
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(ScalarFormatter())
        figure.legend(loc="outside right upper", frameon=False, fontsize=7)
        report._save(figure, [axis], folder / _plot_name(rows, family))


def _draw_lengths(axis: object, rows: Sequence[Row], family: str) -> None:
    """Draw what the base optimizer has with half, the same and twice the steps."""
    mine = [r for r in rows if r["method"] == family and r["phase"] == "final"]
    for draws in sorted({row["draws"] for row in mine}):
        points = []
        for length in sorted({row["length"] for row in mine}):
            some = [r for r in mine if (r["draws"], r["length"]) == (draws, length)]
            if some:
                accuracy = [row["last"]["accuracy"] for row in some]
                points.append(
                    (some[0]["gradients"], report.mean_and_error(accuracy)[0])
                )
        axis.plot(*zip(*points, strict=True), color=report.COLOURS[0], lw=1.5)  # type: ignore
