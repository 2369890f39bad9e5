"""All that the pages have of rows: one command writes it, one test compares it.

python -m lwsam_bench.front.pages     # or: make pages
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator

from lwsam_bench.accelerator import evidence, report as accelerator
from lwsam_bench.comparison import precision
from lwsam_bench.faults import suite, table as faults
from lwsam_bench.front import committed, demo, first
from lwsam_bench.pages import docs
from lwsam_bench.radius import run as radius
from lwsam_bench.scaling import run as scale, table as scaling
from lwsam_bench.speed import presets, prices
from lwsam_bench.support.rows import read_rows, write_text
from lwsam_bench.tuning.report import family, page as tuning, pareto, verdicts


@dataclasses.dataclass(frozen=True)
class Block:
    """What stands between two marks of a page.

    Attributes:
      page: Path of the page in the repository.
      name: Of the marks.
      text: What stands there, given the folder of the committed rows.
    """

    page: str
    name: str
    text: Callable[[pathlib.Path], str]


def _rows(make: Callable, *place: str) -> Callable[[pathlib.Path], str]:
    return lambda folder: make(list(read_rows(folder.joinpath(*place))))


def _tunings(make: Callable, place: str = "tune") -> Callable[[pathlib.Path], str]:
    return lambda folder: make(tuning.all_rows(folder / place))


def shown_demo(folder: pathlib.Path) -> str:
    """Return the table of the committed demo."""
    made = list(read_rows(folder / "demo" / demo.ROWS))
    return demo.markdown(made, committed.tuned_rows(folder / committed.TUNING))


BLOCKS: tuple[Block, ...] = (
    Block("README.md", first.PRICES, first.prices),
    Block("README.md", first.TUNED, first.tuned),
    Block("README.md", first.LIBRARIES, first.libraries),
    Block("docs/index.md", first.LAYERS, first.layers),
    Block("docs/benchmarks.md", demo.MARK, shown_demo),
    Block("docs/choose.md", verdicts.PAGE, _tunings(verdicts.sections)),
    Block("docs/pareto.md", pareto.PAGE, _tunings(pareto.sections)),
    Block("docs/tuning.md", tuning.PAGE, _tunings(tuning.sections)),
    Block("docs/family.md", family.PAGE, _tunings(family.sections, "family")),
    *(
        Block(
            "docs/cost.md",
            name,
            _rows(functools.partial(prices.published, name), "speed", f"{name}.jsonl"),
        )
        for name in (prices.CHECK, prices.ALL)
    ),
    Block(
        "docs/presets.md", presets.MARK, _rows(presets.table, "cost", "presets.jsonl")
    ),
    Block(
        "docs/precision.md",
        precision.MARK,
        _rows(precision.markdown, "precision", precision.ROWS),
    ),
    Block(
        "docs/helps.md", radius.PLACE, _rows(radius.markdown, "find-rho", radius.ROWS)
    ),
    Block("docs/faults.md", faults.MARK, _rows(faults.markdown, "faults", suite.ROWS)),
    Block(
        "docs/parallel.md",
        scaling.MARK,
        _rows(scaling.markdown, "scaling", scale.ROWS),
    ),
    Block(
        "docs/accelerator.md",
        accelerator.NAME,
        _rows(accelerator.published, "accelerator", evidence.FILE),
    ),
)


def updated(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, Block, str]]:
    """Yield each page of a repository and a block, with the page as it should be."""
    for block in BLOCKS:
        path = root / block.page
        text = block.text(root / "benchmarks" / "results")
        yield path, block, docs.replace_generated(path, block.name, text)


def write(root: pathlib.Path) -> None:
    """Bring all pages of a repository up to date, and the plots of its tunings.

    Raises:
      UserError: If rows or marks are missing.
    """
    for path, _, text in updated(root):
        write_text(path, text)
    results, docs_folder = root / "benchmarks" / "results", str(root / "docs")
    tuning.write_docs(results / "tune", docs_folder)
    family.write_docs(results / "family", docs_folder)


if __name__ == "__main__":
    write(pathlib.Path())
