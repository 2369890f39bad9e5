"""What commands beside those of the paper left in a folder, to be shown in a report."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence

from markdown_it import MarkdownIt
from markdown_it.token import Token

from lwsam_bench.paper.artefact import Table
from lwsam_bench.support.errors import UserError


_PICTURE = re.compile(r"^!\[.*\]\(.*\)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A command that leaves a page of Markdown and pictures.

    Attributes:
      title: Heading.
      page: Pattern of the page's name.
      plots: Patterns of the pictures, relative to the page.
    """

    title: str
    page: str
    plots: tuple[str, ...]


KINDS = (
    Kind(
        "The demo: tuned methods on digits",
        "demo-table.md",
        ("tuning-*.png",),
    ),
    Kind("Time and memory of a step", "speed-table.md", ("speed-*.png",)),
    Kind("Methods that are tuned alike", "tuning.md", ("tuning-*.png",)),
)


@dataclasses.dataclass(frozen=True)
class Extra:
    """A page found in a folder.

    Attributes:
      title: Heading.
      page: The file.
      blocks: Its tables, and what stands between them as HTML.
      plots: Its pictures.
    """

    title: str
    page: pathlib.Path
    blocks: tuple[Table | str, ...]
    plots: tuple[pathlib.Path, ...]


def find(folder: pathlib.Path) -> list[Extra]:
    """Return what is in a folder or in one of its subfolders.

    Raises:
      UserError: If a page cannot be read.
    """
    found = []
    for kind in KINDS:
        for page in [*_match(folder, kind.page), *_match(folder, f"*/{kind.page}")]:
            try:
                text = page.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read {page}: {error}") from error
            plots = [p for plot in kind.plots for p in _match(page.parent, plot)]
            found.append(Extra(kind.title, page, tuple(blocks(text)), tuple(plots)))
    return found


def blocks(text: str, title: str = "Results") -> Iterator[Table | str]:
    """Yield the tables of a Markdown page, and the HTML of what is between them.

    Raw HTML is shown as text. Pictures that stand alone are left out.

    Args:
      text: The page.
      title: Of tables above which there is no heading.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    # A report reaches out to nothing, not even by a link.
    parser.disable(["link", "autolink", "image"])
    tokens: list[Token] = parser.parse(_PICTURE.sub("", text))
    between: list[Token] = []
    table: list[Token] | None = None
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            title = _plain(tokens[place + 1])
        if token.type in ("heading_open", "heading_close"):
            token.tag = "h4"  # below the heading of the report
        if token.type == "table_open":
            if between and between[-1].type == "heading_close":
                between = between[:-3]  # it will stand above the table as its title
            if between:
                yield parser.renderer.render(between, parser.options, {})
            between, table = [], []
        elif token.type == "table_close":
            yield _table(title, table or [])
            table = None
        elif table is not None:
            table.append(token)
        else:
            between.append(token)
    if between:
        yield parser.renderer.render(between, parser.options, {})


def _table(title: str, tokens: Sequence[Token]) -> Table:
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(_plain(token))
    header, *body = rows
    return Table(title, tuple(header), tuple(map(tuple, body)))


def _plain(token: Token) -> str:
    """Return the text of a line without its markup."""
    return "".join(child.content for child in token.children or ())


def _match(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file())
