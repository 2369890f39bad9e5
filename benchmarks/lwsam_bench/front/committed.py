"""The committed rows that a newcomer meets: where they are, and one table of them."""

import pathlib
from collections.abc import Sequence

import lwsam_bench
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row
from lwsam_bench.tuning import results
from lwsam_bench.tuning.report.summary import gaps, summarize, worst


RESULTS = pathlib.Path(lwsam_bench.__file__).parents[1] / "results"
TUNING = pathlib.Path("tune") / "digits-noise40-batch100" / results.ROWS


def tuned_rows(path: pathlib.Path) -> list[Row]:
    """Return the rows of a tuning.

    Raises:
      UserError: If there are none.
    """
    rows = list(results.read(path))
    if not rows:
        raise UserError(
            f"{path} has no rows of a tuning: run this from a clone of the repository, or"
            " make some by `lwsam-bench tune digits --noise 0.4`"
        )
    return rows


def table(rows: Sequence[Row], names: Sequence[str]) -> list[list[str]]:
    """Return header and lines: accuracy in each set of draws, and what counts.

    Args:
      rows: Of a tuning.
      names: Of the methods that are shown, as far as they have final rows.
    """
    found = {name: t for name, t in summarize(rows).items() if name in names}
    draws = max(len(each) for each in found.values())
    header = ["method", "gradients a step"]
    header += [f"tuning {number + 1}" for number in range(draws)]
    header += ["the worse, over SGD"]
    lines = [header]
    for name, each in found.items():
        gap = worst(gaps(found, name, "last"))
        over = "–"
        if gap is not None and not each[0].method.is_base:
            over = str(gap)
            over += ", no difference" if gap.verdict == "no difference" else ""
        numbers = [t.measure.text(*t.score("last")) for t in each]
        price = f"{each[0].mean('price')[0]:.2f}"
        lines.append([each[0].method.label, price, *numbers, over])
    return lines


def verdict(rows: Sequence[Row]) -> str:
    """Return who is ahead of the base, of all that the rows have."""
    found = summarize(rows)
    ahead = [
        each[0].method.label
        for name, each in found.items()
        if (gap := worst(gaps(found, name, "last"))) is not None
        and gap.verdict == "better"
    ]
    if ahead:
        return f"Ahead of tuned SGD in both tunings: **{', '.join(ahead)}**."
    return "**No method is ahead of tuned SGD in both tunings: no difference.**"
