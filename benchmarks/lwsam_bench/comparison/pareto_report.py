"""Tables, plots and plain sentences of `pareto`, from its rows alone."""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

from lwsam_bench.comparison.pareto_methods import METHODS, SAM
from lwsam_bench.pages import report
from lwsam_bench.pages.docs import replace_generated
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row, write_text


TITLES = {"digits": "Digits", "fashion_mnist": "Fashion-MNIST"}
BANDS = (1.1, 1.3, 1.7, 2.0)  # prices, in gradients of SGD


@dataclasses.dataclass(frozen=True)
class Summary:
    """A method over its evaluation seeds."""

    label: str
    family: str
    rho: float | None
    accuracy: Mapping[int, float]  # by seed
    price: float  # mean FLOPs of a step over a plain gradient
    diverged: int

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.mean(self.accuracy.values())

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for one seed."""
        return report.mean_and_error([*self.accuracy.values()])[1]


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Return a summary of each method that has been evaluated."""
    found = []
    for name in [method.name for method in METHODS]:
        mine = [row for row in rows if row["method"] == name]
        runs = [row for row in mine if row["phase"] == "evaluation"]
        if not runs:
            continue
        # Another choice of radii may have left runs at another one: the last holds.
        rho = runs[-1]["rho"]
        runs = [row for row in runs if row["rho"] == rho]
        found.append(
            Summary(
                label=mine[0]["label"],
                family=mine[0]["family"],
                rho=rho,
                accuracy={row["seed"]: row["test_accuracy"] for row in runs},
                price=1.0 + statistics.mean(row["overhead"] for row in runs),
                diverged=sum(row["diverged"] for row in runs),
            )
        )
    return found


def render(
    rows: Mapping[str, Sequence[Row]], folder: pathlib.Path, docs: str | None
) -> None:
    """Write tables and plots to a folder, or into the documentation if that is given.

    Raises:
      UserError: If `docs` has no page `pareto.md` with the marks that enclose what is
        generated.
    """
    text = "\n".join(section(name, some) for name, some in rows.items())
    page, images = folder / "pareto.md", folder / "images"
    if docs is not None:
        page, images = pathlib.Path(docs) / "pareto.md", pathlib.Path(docs) / "images"
        text = replace_generated(page, "pareto", text)
    try:
        images.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {images}: {error}") from error
    write_text(page, text)
    for name, some in rows.items():
        plot(images / f"pareto-{name}.png", _title(name), summarize(some))


def section(dataset: str, rows: Sequence[Row]) -> str:
    """Return the Markdown of one dataset: picture, table, what wins at each price."""
    summaries = summarize(rows)
    header = ["method", "ρ", "test accuracy", "FLOPs per step", "seeds"]
    cells = [
        [
            s.label,
            "–" if s.rho is None else f"{s.rho:g}",
            _accuracy(s) + (f" ({s.diverged} diverged)" if s.diverged else ""),
            f"{s.price:.2f} ×",
            str(len(s.accuracy)),
        ]
        for s in summaries
    ]
    title = _title(dataset)
    lines = [
        f"## {title}",
        f"![Test accuracy over FLOPs on {title}](images/pareto-{dataset}.png)",
        report.markdown(header, cells, _notes(rows)).rstrip(),
        "What a price buys:",
        "\n".join(f"- {winner(summaries, price)}" for price in BANDS),
    ]
    return "\n\n".join(lines) + "\n"


def winner(summaries: Sequence[Summary], price: float) -> str:
    """Return a sentence: who is best at a price, and how far ahead of whom."""
    # The price is compared as it is printed, with two decimals.
    payable = [s for s in summaries if round(s.price, 2) <= price]
    if not payable:
        return f"Up to {price:g} ×: nothing."
    best = max(payable, key=lambda s: s.mean)
    text = (
        f"Up to {price:g} ×: **{best.label}**, {_accuracy(best)} at {best.price:.2f} ×"
    )
    # The rival is of the other camp: SAM (or SGD) for layer-wise SAM and vice versa.
    ours = _is_layerwise(best)
    rivals = [s for s in payable if _is_layerwise(s) != ours]
    if not rivals:
        return text + "."
    rival = max(rivals, key=lambda s: s.mean)
    camp = "SAM or SGD" if ours else "layer-wise SAM"
    difference, error = _difference(best, rival)
    verdict = (  # none of a single seed
        ", which is within twice its standard error" if difference <= 2 * error else ""
    )
    spread = "" if math.isnan(error) else f" ± {100 * error:.1f}"
    return (
        f"{text}. The best of {camp} is {rival.label}, {_accuracy(rival)} at"
        f" {rival.price:.2f} ×: {100 * difference:.1f}{spread} points less{verdict}."
    )


def _difference(best: Summary, rival: Summary) -> tuple[float, float]:
    """Return mean and standard error of the difference, seed by seed."""
    seeds = [seed for seed in best.accuracy if seed in rival.accuracy]
    pairs = [best.accuracy[seed] - rival.accuracy[seed] for seed in seeds]
    return report.mean_and_error(pairs or [best.mean - rival.mean])


def _is_layerwise(summary: Summary) -> bool:
    return summary.family not in (SAM, "SGD")


def _accuracy(summary: Summary) -> str:
    spread = "" if math.isnan(summary.error) else f" ± {100 * summary.error:.1f}"
    return f"{100 * summary.mean:.1f}{spread} %"


def _title(dataset: str) -> str:
    return TITLES.get(dataset, dataset)


def _notes(rows: Sequence[Row]) -> str:
    task, origin = rows[-1]["task"], rows[-1]["origin"]
    pooled = (
        f", {task['pool']} x {task['pool']} pixels averaged into one"
        if task["pool"] > 1
        else ""
    )
    tuning = len({row["seed"] for row in rows if row["phase"] == "tuning"})
    return (
        f"{task['train_images']:,} training images{pooled},"
        f" {task['label_noise']:.0%} of their labels replaced at random; the small CNN"
        f" of 10 layers, batch {task['batch_size']}, {task['steps']} steps. Accuracy is"
        " mean ± standard error over the seeds, on half of the test images. The other"
        " half chose ρ: each method climbed the same ladder of radii to where a step up"
        f" and a step down are worse, on {tuning} other seed{'s' if tuning > 1 else ''}."
        " FLOPs are over SGD's: the mean over"
        " all steps of the executable that ran, by the cost model."
        f" JAX {origin['packages']['jax']}, {origin['platform']}."
    )


def plot(path: pathlib.Path, title: str, summaries: Sequence[Summary]) -> None:
    """Draw accuracy over price, one colour for each family."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    families = [*dict.fromkeys(s.family for s in summaries)]
    for number, family in enumerate(families):
        # More families than colours: then the mark tells them apart.
        again, place = divmod(number, len(report.COLOURS))
        mine = sorted(
            (s for s in summaries if s.family == family), key=lambda s: s.price
        )
        axis.errorbar(
            [s.price for s in mine],
            [s.mean for s in mine],
            yerr=[0.0 if math.isnan(s.error) else s.error for s in mine],
            color=report.COLOURS[place],
            marker="os^"[again],
            lw=1.2,
            capsize=3,
            label=family,
        )
    axis.set(xlabel="FLOPs of a step over SGD's", title=f"{title}: test accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.legend(loc="lower right", frameon=False, fontsize=8)
    report._save(figure, [axis], path)
