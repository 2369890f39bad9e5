"""What a user sees while a run goes on; nothing here touches the results."""

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


MOST_LAYERS = 6  # to be named one by one


def name_layers(names: Sequence[str], total: int) -> str:
    """Return the names of the layers being perturbed, in short."""
    if not names:
        return "none"
    if len(names) == total:
        return "all"
    if len(names) > MOST_LAYERS:
        return f"{len(names)} of {total}"
    return " ".join(names)


class Rate:
    """Images a second over the last few reports."""

    def __init__(self, window: int = 20):
        self._window = window
        self._marks: list[tuple[float, int]] = []

    def __call__(self, images: int) -> float:
        """Return the rate, given the images seen so far."""
        self._marks.append((time.perf_counter(), images))
        del self._marks[: -self._window]
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if end > start else 0.0


class TrainProgress:
    """One line that follows a training run, on a terminal; rows of text elsewhere."""

    def __init__(self, console: Console, total_steps: int, done: int):
        self._console = console
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "train", total=total_steps, completed=done, numbers=""
        )

    def __enter__(self) -> "TrainProgress":
        """Start to draw."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self._bar.stop()

    def step(self, step: int, numbers: str | None = None) -> None:
        """Show the number of steps done and, if given, what was measured."""
        self._bar.update(self._task, completed=step)
        if numbers is not None:
            self._bar.update(self._task, numbers=numbers)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def reading(console: Console, name: str) -> Iterator:
    """Show how far decoding a dataset is; yields `on_record` for `sources.load`."""
    if not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"decoding {name}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
