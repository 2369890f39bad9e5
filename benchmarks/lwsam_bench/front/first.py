"""What the first pages have of rows: what tuned methods reach, and what a step costs."""

import pathlib

from lwsam_bench.front import committed
from lwsam_bench.pages import report
from lwsam_bench.speed import racers
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import read_rows, Row
from lwsam_bench.tuning.methods import FIVE
from lwsam_bench.tuning.report.summary import summarize


TUNED, PRICES, LIBRARIES, LAYERS = "tuned", "prices", "libraries", "prices of layers"
SPEED = pathlib.Path("speed") / "speed-check.jsonl"
# The README is one screen; docs/tuning.md has all of them.
_TUNED_SHOWN = (*FIVE, "momentum", "penalty")
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


def tuned(folder: pathlib.Path) -> str:
    """Return the table of a tuning: accuracy of each set of draws, and what counts.

    Args:
      folder: Of the committed rows.

    Raises:
      UserError: If there are none.
    """
    rows = committed.tuned_rows(folder / committed.TUNING)
    header, *cells = committed.table(rows, _TUNED_SHOWN)
    task = rows[0]["task"]
    seeds = len({row["seed"] for row in rows if row["phase"] == "final"})
    others = len(summarize(rows).keys() - set(_TUNED_SHOWN))
    notes = (
        f"Test accuracy in % on scikit-learn's digits, {task['train_images']:,} training"
        f" images, {100 * task['noise']:g} % of their labels replaced at random. Learning"
        " rate, weight decay, number of steps and radius of each method by"
        f" {rows[0]['trials']} trials on validation images, twice, then {seeds} fresh"
        " seeds (± is the standard error); differences are paired by seed."
        f" {committed.verdict(rows)}"
    )
    if others:
        notes += f" [Tuned alike](docs/tuning.md) has {others} more methods."
    return report.markdown(header, cells, notes)


def prices(folder: pathlib.Path) -> str:
    """Return the table of what a step costs, over a plain one; arguments of `tuned`."""
    found = _speed(folder)
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


def libraries(folder: pathlib.Path) -> str:
    """Return how the comparison was made, and what was measured of it."""
    found = _speed(folder)
    theirs, ours = found[racers.OPTAX_SAM], found[racers.MOMENTUM_SAM]
    versions = theirs["origin"]["packages"]
    return (
        f"Read in Optax {versions['optax']}, davda54/sam of June 2022 and"
        " pytorch_optimizer of February 2026. Measured as above: a step of"
        f" `{racers.OPTAX_SAM}` takes {theirs['flops_xla']:.2f} of SGD's FLOPs and"
        f" {theirs['time']:.2f} of its time, one of `{racers.MOMENTUM_SAM}`"
        f" {ours['flops_xla']:.2f} and {ours['time']:.2f}; the two for PyTorch were not"
        " run.\n"
    )


def layers(folder: pathlib.Path) -> str:
    """Return the table of what sets of layers cost; arguments of `tuned`."""
    rows = list(read_rows(folder / SPEED))
    prices = [row for row in rows if row["kind"] == "price"]
    cells = [[row["case"], f"{row['flops_xla']:.3f}"] for row in prices]
    origin = next(row for row in rows if row["kind"] == "speed")["origin"]
    notes = (
        f"ResNet-20, FLOPs as XLA counts them. JAX {origin['packages']['jax']},"
        f" {origin['platform']}."
    )
    return report.markdown(["perturbed layers", "FLOPs"], cells, notes)


def _speed(folder: pathlib.Path) -> dict[str, Row]:
    """Return the rows of the check of prices, by method."""
    rows = list(read_rows(folder / SPEED))
    if not rows:
        raise UserError(f"{folder / SPEED} has no rows")
    return {row["method"]: row for row in rows if row["kind"] == "speed"}
