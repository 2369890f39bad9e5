"""The command `report`: all tables and figures of a folder on one page."""

import base64
import collections
import dataclasses
import pathlib
import shlex
import struct
from collections.abc import Sequence

import jinja2
from rich.console import Console

from lwsam_bench.paper import artefact, published
from lwsam_bench.paper.artefact import Artefact, escape, Table
from lwsam_bench.paper.report import absent, extras
from lwsam_bench.paper.report.grid import lay_out
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import write_text


TITLE = "Layer-wise sharpness-aware minimization: the paper's evaluation, run again"
PAPER = (
    "S. Lee, Layer-wise Adaptive Gradient Norm Penalizing Method for Efficient and"
    " Accurate Deep Learning, KDD 2024, doi:10.1145/3637528.3671728"
)

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A plot inside the page.

    Attributes:
      name: File in the folder.
      alt: What it shows in words.
      caption: What tells it from the others of its section.
      source: The file as a data URI; None where it is missing.
      width: In pixels.
      height: In pixels.
    """

    name: str
    alt: str
    caption: str
    source: str | None
    width: int = 0
    height: int = 0


@dataclasses.dataclass(frozen=True)
class Section:
    """A table or figure of the paper, run or not.

    Attributes:
      name: One of `artefact.NAMES`.
      title: Heading.
      claim: What the paper says it shows.
      scale: None where it has not run.
      command: What rendered it, or would.
      pictures: Plots.
      tables: Ours beside the published numbers.
      notes: Ours, then on the paper's own numbers.
      origins: A line for each machine and version that the rows are from.
    """

    name: str
    title: str
    claim: str
    scale: str | None
    command: str
    pictures: tuple[Picture, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    origins: tuple[str, ...] = ()


def render(folder: pathlib.Path, console: Console) -> pathlib.Path:
    """Write `report.html` and `report.md` from the artefacts in a folder.

    Args:
      folder: Where the commands wrote to.
      console: Where to report.

    Returns:
      The path of the HTML page.

    Raises:
      UserError: If there is no such folder, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder: expected the --out of the paper's commands, such as"
            f" `lwsam-bench table1 --out {shlex.quote(str(folder))}`"
        )
    found = {a.name: a for a in artefact.load(folder)}
    others = extras.find(folder)
    scales = collections.Counter(made.scale for made in found.values())
    scale = scales.most_common(1)[0][0] if scales else "small"
    sections = [
        _ours(found[name], folder) if name in found else _missing(name, folder, scale)
        for name in artefact.NAMES
    ]
    path = folder / "report.html"
    write_text(path, _html(sections, others))
    write_text(folder / "report.md", _markdown(sections, found, others, folder))
    console.print(
        f"{len(found)} of {len(sections)} tables and figures are in {path}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return path


def _ours(made: Artefact, folder: pathlib.Path) -> Section:
    """Return the section of what has run."""
    remarks = published.NOTES.get(made.name, ())
    told = {*made.notes, *(note for table in made.tables for note in table.notes)}
    return Section(
        name=made.name,
        title=made.title,
        claim=published.CLAIMS[made.name],
        scale=made.scale,
        command=made.command,
        pictures=tuple(
            _picture(folder / plot, made.plot_title(plot), made.title)
            for plot in made.plots
        ),
        tables=made.tables,
        notes=(*made.notes, *(note for note in remarks if note not in told)),
        origins=tuple(artefact.origin_lines(made.origins)),
    )


def _missing(name: str, folder: pathlib.Path, scale: str) -> Section:
    """Return the section of what has not run: what is published, and the command."""
    command = ["lwsam-bench", name, "--scale", scale, "--out", str(folder)]
    return Section(
        name=name,
        title=artefact.TITLES[name],
        claim=published.CLAIMS[name],
        scale=None,
        command=shlex.join(command),
        pictures=(),
        tables=absent.tables(name),
        notes=published.NOTES.get(name, ()),
    )


def _picture(path: pathlib.Path, alt: str, title: str) -> Picture:
    caption = alt.removeprefix(title).lstrip(", ")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Picture(path.name, alt, caption, None)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not data.startswith(_PNG) or len(data) < 24:
        raise UserError(f"{path} is no PNG file; the command that drew it mends it")
    width, height = struct.unpack(">II", data[16:24])
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return Picture(path.name, alt, caption, source, width, height)


def _html(sections: Sequence[Section], others: Sequence[extras.Extra]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lwsam_bench.paper.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["lay_out"] = lay_out
    beyond = [
        {
            "title": extra.title,
            "pictures": [
                _picture(plot, f"{extra.title}, {plot.stem}", extra.title)
                for plot in extra.plots
            ],
            "blocks": [
                {"table": block, "html": None}
                if isinstance(block, Table)
                else {"table": None, "html": block}
                for block in extra.blocks
            ],
        }
        for extra in others
    ]
    return environment.get_template("page.html.jinja").render(
        title=TITLE, paper=PAPER, sections=sections, beyond=beyond
    )


def _markdown(
    sections: Sequence[Section],
    found: dict[str, Artefact],
    others: Sequence[extras.Extra],
    folder: pathlib.Path,
) -> str:
    contents = [
        f"- {escape(section.title)}"
        + (f" ({section.scale})" if section.scale else ": not run here")
        for section in sections
    ]
    parts = [f"# {TITLE}", escape(f"The paper: {PAPER}."), "\n".join(contents)]
    for section in sections:
        made = found.get(section.name)
        if made is None:
            made = Artefact(
                name=section.name,
                title=section.title,
                scale="not run here",
                command=section.command,
                tables=section.tables,
            )
        made = dataclasses.replace(
            made, notes=(*section.notes, f"In the paper: {section.claim}")
        )
        parts.append(made.markdown(level=2).rstrip())
    if others:
        links = "\n".join(
            f"- [{escape(extra.title)}]({extra.page.relative_to(folder).as_posix()})"
            for extra in others
        )
        parts.append(f"## Beyond the paper\n\n{links}")
    return "\n\n".join(parts) + "\n"
