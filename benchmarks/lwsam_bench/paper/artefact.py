"""What a command of the paper leaves behind: tables, plots and where they come from."""

import dataclasses
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

from lwsam_bench.pages import report
from lwsam_bench.paper import setups
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import write_json, write_text


# In the order of a report. What has not run has no title of its own yet.
TITLES: Mapping[str, str] = {
    "table1": "Table 1: accuracy",
    "table2": "Table 2: training throughput",
    "table3": "Table 3: which layers are perturbed",
    "table4": "Table 4: how many layers are perturbed",
    "figure1": "Figure 1: gradient norm of each layer over the epochs",
    "figure2": "Figure 2: loss landscape of each layer, trained with SGD",
    "figure3": "Figure 3: learning curves",
    "figure4": "Figure 4: gradient norm of the full model",
    "figure5": "Figure 5: perturbations of each layer",
    "figure6": "Figure 6: loss landscape of each layer, trained with layer-wise SAM",
    "lm": "Language model: perplexity",
    "theorem1": "Theorem 1: the measured gradient norm and its bound",
}
NAMES = tuple(TITLES)

# What the names of files abbreviate.
_WORDS = {**setups.TITLES, **setups.METHODS}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of plain text.

    Attributes:
      title: What is in it.
      header: Titles of the columns; the first column names the rows.
      rows: Cells, as many in each row as the header has; empty where nothing ran.
      notes: Paragraphs to stand below it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"table {self.title!r} has {len(self.header)} columns, but a row of"
                    f" {len(row)} cells: {row}"
                )


@dataclasses.dataclass(frozen=True)
class Artefact:
    """One table or figure of the paper as a command rendered it.

    Attributes:
      name: One of `NAMES`.
      title: Heading.
      scale: What `--scale` said.
      command: The command that rendered it, to be typed again.
      tables: Ours beside the published numbers.
      plots: PNG files, relative to the folder.
      notes: Paragraphs about all of it.
      origins: What `provenance` returned where the rows were made.
    """

    name: str
    title: str
    scale: str
    command: str
    tables: tuple[Table, ...] = ()
    plots: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origins: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in TITLES:
            raise ValueError(f"name is {self.name!r}: expected one of {NAMES}")
        for plot in self.plots:
            path = pathlib.PurePosixPath(plot)
            # A report shows what is in its folder, whoever wrote the artefact.
            if path.is_absolute() or ".." in path.parts or path.suffix != ".png":
                raise ValueError(f"plot {plot!r} is no PNG file inside the folder")

    def save(self, folder: pathlib.Path) -> pathlib.Path:
        """Write `<name>.json` and `<name>.md`; return the path of the latter."""
        write_json(folder / f"{self.name}.json", dataclasses.asdict(self))
        page = folder / f"{self.name}.md"
        write_text(page, self.markdown())
        return page

    def markdown(self, level: int = 1) -> str:
        """Return it as Markdown with a heading of this level."""
        parts = [f"{'#' * level} {escape(self.title)}", f"Scale: {self.scale}."]
        for plot in self.plots:
            parts.append(f"![{escape(self.plot_title(plot))}]({plot})")
        for table in self.tables:
            parts.append(f"{'#' * (level + 1)} {escape(table.title)}")
            parts.append(_markdown_table(table))
        parts += map(escape, self.notes)
        parts.append(f"```bash\n{self.command}\n```")
        parts += [f"Made with {escape(line)}." for line in origin_lines(self.origins)]
        return "\n\n".join(parts) + "\n"

    def plot_title(self, plot: str) -> str:
        """Return what a plot shows in words, for those who cannot see it."""
        stem = pathlib.PurePosixPath(plot).stem.removeprefix(self.name)
        words = [_WORDS.get(word, word) for word in re.split(r"[-_]+", stem) if word]
        return ", ".join([self.title, " ".join(words)]) if words else self.title

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Return what `save` wrote as JSON.

        Raises:
          TypeError, KeyError, ValueError: If the value is of no such form.
        """
        return cls(
            name=_text(value["name"]),
            title=_text(value["title"]),
            scale=_text(value["scale"]),
            command=_text(value["command"]),
            tables=tuple(
                Table(
                    title=_text(table["title"]),
                    header=_texts(table["header"]),
                    rows=tuple(map(_texts, table["rows"])),
                    notes=_texts(table["notes"]),
                )
                for table in value["tables"]
            ),
            plots=_texts(value["plots"]),
            notes=_texts(value["notes"]),
            origins=tuple(map(dict, value["origins"])),
        )


def load(folder: pathlib.Path) -> list[Artefact]:
    """Return the artefacts that are in a folder, in the order of `NAMES`.

    Raises:
      UserError: If one of them is damaged.
    """
    found = []
    for name in NAMES:
        path = folder / f"{name}.json"
        try:
            artefact = Artefact.from_json(json.loads(path.read_text(encoding="utf-8")))
            if artefact.name != name:
                raise ValueError(f"it holds {artefact.name}")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is no artefact ({type(error).__name__}: {error});"
                f" `lwsam-bench {name}` writes it again"
            ) from error
        found.append(artefact)
    return found


def command_line() -> str:
    """Return the command of this process as a shell reads it."""
    return shlex.join(["lwsam-bench", *sys.argv[1:]])


def origin_lines(origins: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe where rows were made, in a line for each kind of origin.

    Origins that differ in nothing but the time share a line with the days between.
    """
    days: dict[str, list[str]] = {}
    for origin in origins:
        day = str(origin.get("time") or "")[:10]
        days.setdefault(_origin(origin), []).append(day)
    lines = []
    for text, found in days.items():
        first, last = min(found), max(found)
        when = first if first == last else f"{first} to {last}"
        lines.append(f"{text}, {when}" if when else text)
    return lines


def escape(text: str) -> str:
    """Return plain text as Markdown shows it, on one line, in a table or out of it."""
    return " ".join(re.sub(r"([\\`*<|])", r"\\\1", text).split())


def _markdown_table(table: Table) -> str:
    cells = [[escape(cell) for cell in row] for row in table.rows]
    notes = "\n\n".join(map(escape, table.notes))
    header = [escape(cell) for cell in table.header]
    return report.markdown(header, cells, notes).rstrip()


def _origin(origin: Mapping[str, Any]) -> str:
    commit = origin.get("commit")
    code = "code in no repository"
    if commit:
        code = f"commit {commit[:10]}"
        code += " with changes on top" if origin.get("dirty") else ""
    packages = origin.get("packages") or {}
    versions = [
        f"{name} {packages[name]}"
        for name in ("jax", "flax", "optax")
        if packages.get(name)
    ]
    device = str(origin.get("device") or "unknown device")
    if origin.get("platform") == "cpu":
        # XLA makes a CPU of several cores one device, or as many as it is told to.
        device = f"CPU ({origin.get('machine')}, {origin.get('cpu_count')} cores)"
    elif (origin.get("device_count") or 1) > 1:
        device = f"{origin['device_count']} x {device}"
    return ", ".join([code, *versions, device])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"expected a list of texts, got {values!r}")
    return tuple(map(_text, values))
