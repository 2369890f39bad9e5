"""Training runs on CIFAR-10: each is a folder that goes on where it was stopped."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from lwsam_bench.support.rows import read_rows, Row
from lwsam_bench.training import loop, run_folder
from lwsam_bench.training.config import METHOD_DEFAULTS, RunOptions, TrainConfig


RUNS = "runs"  # their folder
METHODS: Mapping[str, str] = {
    "sgd": "SGD",
    "sam": "SAM",
    "momentum_sam": "momentum_sam",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all runs share: that of wide networks, with published radii."""

    dataset: str = "cifar10"
    model: str = "wrn16-4"
    epochs: int = 40
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    augment: bool = True
    train_images: int | None = None
    test_images: int | None = None


FULL = Recipe()
SMOKE = Recipe(
    dataset="digits",
    model="tinycnn",
    epochs=2,
    batch_size=20,
    augment=False,
    train_images=40,
    test_images=40,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run."""

    method: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """Of its folder, and in messages."""
        return f"{self.config.dataset}-{self.method}-{self.seed}"


def runs(recipe: Recipe, seeds: int) -> Iterator[Run]:
    """Yield the runs, seed by seed: after the first three there is something to see."""
    for seed in range(seeds):
        for method in METHODS:
            defaults = METHOD_DEFAULTS[method]
            config = TrainConfig(
                method=method,
                k=defaults.k,
                rho=defaults.rho,
                alpha=defaults.alpha,
                normalize=defaults.normalize,
                ascent=defaults.ascent,
                steps=None,
                seed=seed,
                **dataclasses.asdict(recipe),
            )
            yield Run(method, seed, config)


def config(run: Run) -> dict[str, Any]:
    """What decides the result of a run, for a row."""
    return {**dataclasses.asdict(run.config), "decay_at": list(run.config.decay_at)}


def train(
    run: Run,
    folder: pathlib.Path,
    data_dir: str | None,
    console: Console,
    seconds: float | None,
) -> tuple[Row | None, int]:
    """Train, or go on; return the row, None if it has not ended, and the exit code.

    Args:
      run: The run.
      folder: Holds the folders of all runs.
      data_dir: Folder of tensorflow-datasets.
      console: Where to report.
      seconds: The run stops after so many and can go on; None lets it end.
    """
    out = folder / RUNS / run.name
    options = RunOptions(
        out=str(out),
        data_dir=data_dir,
        log_every=500,
        checkpoint_every=None,
        seconds=seconds,
    )
    code = loop.train(run.config, options, console)
    for row in read_rows(out / run_folder.METRICS):
        if row["kind"] == "end":
            record = json.loads((out / run_folder.CONFIG).read_text(encoding="utf-8"))
            found = {"method": run.method, "data": record["data"], **_result(row)}
            return found, code
    return None, code


def _result(end: Row) -> Row:
    kept = (
        "accuracy",
        "loss",
        "overhead",
        "diverged",
        "executables",
        "compile_seconds",
        "seconds",
        "step",
        "epoch",
    )
    return {name: end[name] for name in kept}
