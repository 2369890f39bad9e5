"""What a command of the paper is asked for."""

import dataclasses
import pathlib

from rich.console import Console


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments that all tables and figures share.

    Attributes:
      scale: One of `setups.SCALES`.
      out: Output folder: runs, rows and plots come here.
      console: Where to report.
      data_dir: Folder of tensorflow-datasets; None for theirs.
      seeds: Runs of each method; None for as many as the scale has.
      jobs: Runs at one time.
    """

    scale: str
    out: pathlib.Path
    console: Console
    data_dir: str | None = None
    seeds: int | None = None
    jobs: int = 1
