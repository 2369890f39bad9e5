"""What became of a run: its folder, whether it ended, and its rows."""

import dataclasses
import hashlib
import json
import pathlib
import traceback
from typing import Any

from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import read_rows, Row, write_json
from lwsam_bench.training import earlier, run_folder
from lwsam_bench.training.config import TrainConfig


DONE, FAILED, MISSING, PENDING = "done", "failed", "missing data", "pending"
FAILURE = "failed.json"
RUNS = "runs"

_TAIL = 64 * 1024  # bytes, more than any row
_TRACEBACK_LINES = 20
_MOST_LOSS = 700.0  # a perplexity, its exponential, is still a number


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
      folder: Of the run.
      status: `done`, `failed`, or `missing data`.
      reason: Why it is not done.
    """

    folder: pathlib.Path
    status: str
    reason: str = ""

    def rows(self, kind: str | None = None) -> list[Row]:
        """Return the rows of the run, all or those of a kind."""
        rows = read_rows(self.folder / run_folder.METRICS)
        return [row for row in rows if kind in (None, row.get("kind"))]

    @property
    def end(self) -> Row | None:
        """The row that a run ends with, if it has ended."""
        return last_row(self.folder)

    def record(self) -> dict[str, Any]:
        """Return what the run says about itself; nothing if it never began."""
        try:
            text = (self.folder / run_folder.CONFIG).read_text(encoding="utf-8")
            return dict(json.loads(text))
        except (OSError, ValueError):
            return {}


def run_id(config: TrainConfig) -> str:
    """Return the name of a run's folder: what is nice to read, and a short hash.

    The hash is over what departs from the defaults, so that a field which is added to
    the configuration later does not rename the runs that there are.
    """
    values = dataclasses.asdict(config)
    # The path of a file; what it holds does not change with where it lies.
    values.pop("weights", None)
    method = earlier.NAMES_OF_FOLDERS.get(config.method, config.method)
    values["method"] = method
    for field in dataclasses.fields(TrainConfig):
        if field.name in values and values[field.name] == field.default:
            del values[field.name]
    text = json.dumps(values, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    parts = [pathlib.PurePath(config.dataset).stem, config.model, method]
    if config.method == "lwsam":
        parts += [] if config.criterion == "all" else [f"k{config.k}"]
        if config.criterion != "high":
            parts.append(config.criterion)
        if config.max_overhead is not None:
            parts.append(f"max{config.max_overhead:g}")
        if config.mean_overhead is not None:
            parts.append(f"mean{config.mean_overhead:g}")
    if config.optimizer != "sgd":
        parts.append(config.optimizer)
    return "-".join([*parts, f"s{config.seed}", digest])


def judge(folder: pathlib.Path) -> Outcome:
    """Return what became of the run in a folder, `pending` if it has not ended."""
    try:
        failure = json.loads((folder / FAILURE).read_text(encoding="utf-8"))
        return Outcome(folder, FAILED, str(failure["reason"]))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError) as error:
        return Outcome(folder, FAILED, f"{FAILURE} cannot be read: {error}")
    end = last_row(folder)
    if end is None:
        return Outcome(folder, PENDING)
    # JSON has no name for what is not finite: such a loss is null.
    if end["diverged"] or end["loss"] is None:
        return Outcome(folder, FAILED, "diverged: a loss or a gradient is not finite")
    if end["loss"] > _MOST_LOSS:
        return Outcome(folder, FAILED, f"diverged: its loss is {end['loss']:.3g}")
    return Outcome(folder, DONE)


def last_row(folder: pathlib.Path) -> Row | None:
    """Return the last row of a run if it is of kind `end`, without reading them all."""
    try:
        with (folder / run_folder.METRICS).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    try:
        row = json.loads(lines[-2])  # what follows the last line break is not whole
    except (IndexError, ValueError):
        return None
    return row if isinstance(row, dict) and row.get("kind") == "end" else None


def record_failure(
    folder: pathlib.Path, reason: str, error: BaseException | None = None
) -> None:
    """Leave the reason, and the end of the traceback, in the folder of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = traceback.format_exception(error) if error else []
    tail = "".join(lines).splitlines()[-_TRACEBACK_LINES:]
    # What is in the folder is to blame: it would fail again.
    start_over = isinstance(error, UserError)
    failure = {"reason": reason, "traceback": tail, "start_over": start_over}
    write_json(folder / FAILURE, failure)


def forget_failures(out: pathlib.Path) -> int:
    """Make all failed runs of an output folder pending again; return how many.

    A run that diverged would do so again from its last checkpoint, and one that could not
    go on with what is in its folder still cannot: they start over.
    """
    count = 0
    for folder in sorted((out / RUNS).glob("*")):
        found = judge(folder)
        if found.status != FAILED:
            continue
        if found.end is not None or _must_start_over(folder):
            run_folder.start_over(folder)
        (folder / FAILURE).unlink(missing_ok=True)
        count += 1
    return count


def _must_start_over(folder: pathlib.Path) -> bool:
    try:
        failure = json.loads((folder / FAILURE).read_text(encoding="utf-8"))
        return bool(failure.get("start_over"))
    except (OSError, ValueError, AttributeError):
        return False
