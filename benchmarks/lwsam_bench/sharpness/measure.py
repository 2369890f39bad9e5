"""The command `sharpness`: measures the network that a run of `train` has left."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import lwsam_jax as lwsam
from lwsam_bench.sharpness import plot
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.progress import reading
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.rows import output_folder, Row, write_json, write_text
from lwsam_bench.training import earlier, loop, run_folder, tasks
from lwsam_bench.training.config import TrainConfig
from lwsam_bench.training.tasks import Task


NUMBERS, TABLE, PLOT = "sharpness.json", "sharpness.md", "sharpness.png"


@dataclasses.dataclass(frozen=True)
class Extent:
    """What is measured.

    Attributes:
      examples: Of the training set, not augmented.
      m: Examples in a group of m-sharpness; a divisor of the above.
      rho: Radius of the gaps.
      eigenvalues: How many, of the whole and of each layer.
      iterations: Of Lanczos.
      samples: Random directions.
    """

    examples: int = 512
    m: int = 32
    rho: float = 0.05
    eigenvalues: int = 3
    iterations: int = 32
    samples: int = 8


def run(
    folder_name: str, extent: Extent, data_dir: str | None, console: Console
) -> int:
    """Measure, and leave numbers, table and plot in the folder of the run.

    Raises:
      UserError: If it holds no run, or one that cannot be measured so.
    """
    folder = pathlib.Path(folder_name).expanduser()
    config = dataclasses.replace(config_of(folder), augment=False)
    with reading(console, config.dataset) as on_record:
        task = tasks.make(config, data_dir, on_record)
    state = loop.final_state(folder, config_of(folder), task)
    row = measure(task, state, extent)
    row = {**row, "step": int(state.step), "provenance": provenance()}
    output_folder(folder_name)
    write_json(folder / NUMBERS, row)
    write_text(folder / TABLE, plot.markdown(row))
    plot.draw(row, folder / PLOT)
    console.print(plot.markdown(row), highlight=False, soft_wrap=True)
    return 0


def config_of(folder: pathlib.Path) -> TrainConfig:
    """Return the configuration of the run in a folder.

    Raises:
      UserError: If it holds none.
    """
    path = folder / run_folder.CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        config = earlier.config(config)
        return TrainConfig(**{**config, "decay_at": tuple(config["decay_at"])})
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder} holds no run of `train`: {error}") from error


def measure(task: Task, state: lwsam.TrainState, extent: Extent) -> Row:
    """Return what is measured of a network, its layers in order of their depth.

    The loss is the mean cross-entropy, in evaluation mode: the running statistics of
    BatchNorm, no augmentation, no smoothing of labels, no weight decay.

    Raises:
      UserError: If there are fewer examples, or m does not divide them.
    """
    batch = _examples(task, extent.examples)
    given, wanted = ("image", "label") if "image" in batch else ("text", "next")

    def loss(params: Any, batch: Mapping[str, Any], model_state: Any) -> jax.Array:
        logits, _ = task.network.apply(params, model_state, batch[given], train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[wanted])
        return jnp.mean(losses)

    try:
        found = lwsam.sharpness(
            loss,
            state.params,
            batch,
            state.model_state,
            rho=extent.rho,
            m=extent.m,
            eigenvalues=extent.eigenvalues,
            iterations=extent.iterations,
            samples=extent.samples,
            opt_state=state.opt_state,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    layers = lwsam.Layers.of(
        state.params,
        None,
        task.loss_fn,
        state.model_state,
        task.batches(0),
        jax.random.key(0),
    )
    order = sorted(range(len(layers)), key=layers.depth.__getitem__)
    parts = {name: _numbers(found.layers, at) for at, name in enumerate(found.names)}
    return {
        "kind": "sharpness",
        **dataclasses.asdict(extent),
        "value": float(found.value),
        "whole": _numbers(found.whole),
        "layers": {layers.names[at]: parts[layers.names[at]] for at in order},
    }


def _numbers(measures: lwsam.Measures, at: int | None = None) -> Row:
    """Return measures as JSON has them; of one layer, or of all parameters."""
    row = {}
    for name, x in measures._asdict().items():
        if x is not None:
            row[name] = jax.device_get(x if at is None else x[at]).tolist()
    return row


def _examples(task: Task, count: int) -> dict[str, jax.Array]:
    """Return the first examples of the first epoch, as one batch."""
    first = task.batches(0)
    size = len(jax.tree.leaves(first)[0])
    number = -(-count // size)
    if number > task.steps_per_epoch:
        raise UserError(
            f"--examples {count} is more than the {task.steps_per_epoch * size} of an"
            " epoch"
        )
    batches = [task.batches(step) for step in range(number)]
    return {
        name: jnp.concatenate([batch[name] for batch in batches])[:count]
        for name in first
    }
