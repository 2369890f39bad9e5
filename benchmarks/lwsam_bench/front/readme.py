"""The tables of the README: what methods reach when all are tuned, and what they cost."""

import pathlib
from collections.abc import Sequence

from lwsam_bench.pages import report
from lwsam_bench.pages.docs import replace_generated
from lwsam_bench.speed import racers
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import read_rows, Row, write_text
from lwsam_bench.tuning import results
from lwsam_bench.tuning.report.summary import gaps, summarize, worst


TUNED, PRICES = "tuned", "prices"
TUNING = pathlib.Path("tune") / "digits-noise40-batch100" / results.ROWS
SPEED = pathlib.Path("speed") / "speed-check.jsonl"
# What a reader can choose, from SGD's price upwards.
_SHOWN = (
    racers.SGD,
    racers.MOMENTUM_SAM,
    racers.NOISE,
    racers.TENTH,
    racers.budget(0.10),
    racers.PAPER,
    racers.OPTAX_SAM,
)


def write(readme: pathlib.Path, folder: pathlib.Path) -> None:
    """Bring the tables of a README up to date.

    Args:
      readme: The file, with the marks of both tables.
      folder: Of the committed rows.

    Raises:
      UserError: If rows or marks are missing.
    """
    for name, text in blocks(folder).items():
        write_text(readme, replace_generated(readme, name, text))


def blocks(folder: pathlib.Path) -> dict[str, str]:
    """Return what stands between the marks of each name.

    Raises:
      UserError: If rows are missing.
    """
    made = {}
    for name, place, table in ((TUNED, TUNING, tuned), (PRICES, SPEED, prices)):
        rows = list(read_rows(folder / place))
        if not rows:
            raise UserError(f"{folder / place} has no rows")
        made[name] = table(rows)
    return made


def tuned(rows: Sequence[Row]) -> str:
    """Return the table of a tuning: accuracy of each set of draws, and what counts."""
    found = summarize(rows)
    draws = max(len(each) for each in found.values())
    header = ["method", "gradients a step"]
    header += [f"tuning {number + 1}" for number in range(draws)]
    header += ["the worse, over SGD"]
    cells = []
    for name, each in found.items():
        gap = worst(gaps(found, name, "last"))
        over = "–"
        if gap is not None and not each[0].method.is_base:
            over = f"{100 * gap.mean:+.1f} ± {100 * gap.error:.1f}"
            over += ", no difference" if gap.verdict == "no difference" else ""
        numbers = [t.mean("last", "accuracy") for t in each]
        cells.append(
            [
                each[0].method.label,
                f"{each[0].mean('price')[0]:.2f}",
                *(f"{100 * mean:.1f} ± {100 * error:.1f}" for mean, error in numbers),
                over,
            ]
        )
    task = rows[0]["task"]
    seeds = len({row["seed"] for row in rows if row["phase"] == "final"})
    notes = (
        f"Test accuracy in % on scikit-learn's digits, {task['train_images']:,} training"
        f" images, {100 * task['noise']:g} % of their labels replaced at random. Learning"
        " rate, weight decay, number of steps and radius of each method by"
        f" {rows[0]['trials']} trials on validation images, twice, then {seeds} fresh"
        " seeds (± is the standard error); differences are paired by seed."
    )
    return report.markdown(header, cells, notes)


def prices(rows: Sequence[Row]) -> str:
    """Return the table of what a step costs, over a plain one."""
    found = {row["method"]: row for row in rows if row["kind"] == "speed"}
    cells = [
        [name, *(f"{found[name][x]:.2f}" for x in ("flops_xla", "time", "memory"))]
        for name in _SHOWN
    ]
    origin = found[racers.SGD]["origin"]
    notes = (
        f"ResNet-20 on CIFAR-10, batch {found[racers.SGD]['batch_size']}, over SGD, all"
        f" interleaved in one process. JAX {origin['packages']['jax']},"
        f" {origin['platform']}, {origin['cpu_count']} cores."
    )
    return report.markdown(["method", "FLOPs", "time", "memory"], cells, notes)


if __name__ == "__main__":
    write(pathlib.Path("README.md"), pathlib.Path("benchmarks/results"))
