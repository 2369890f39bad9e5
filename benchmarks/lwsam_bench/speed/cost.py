"""The command `cost`: what the steps of a network cost, by one trace of its loss.

Nothing runs, so a network for GPUs can be looked at on any machine.
"""

import dataclasses
import pathlib
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import lwsam_jax as lwsam
from lwsam_bench.models import by_name, names as model_names
from lwsam_bench.models.network import Network as Parts
from lwsam_bench.pages import report
from lwsam_bench.speed.race import memory
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.measure import flops
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.rows import write_text
from lwsam_bench.training import recipe
from lwsam_bench.training.config import TrainConfig


BUDGETS = (0.05, 0.10, 0.25, 0.50)
DEEPEST = (1, 2, 4, 8)  # layers from the output on
COMPILED = 4  # of them, in the program that is compiled

_SUMMARY = ("step", "FLOPs", "Eq. 8")
_LAYERS = ("layer", "forward", "input", "weight", "alone", "cover", "Eq. 8, alone")


@dataclasses.dataclass(frozen=True)
class Network:
    """Which network, on what.

    Attributes:
      model: A name that `by_name.build` knows, of a network for images.
      batch_size: Images in a batch.
      image_size: Sides of an image in pixels.
      classes: Number of outputs.
    """

    model: str
    batch_size: int
    image_size: int
    classes: int


def run(network: Network, out: str | None, console: Console, *, compiling: bool) -> int:
    """Write the page, or print it.

    Args:
      network: What is looked at.
      out: File for the page; None prints it.
      console: Where to report.
      compiling: Whether to compile some of the steps.
    """
    text = page(network, console, compiling=compiling)
    if out is None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)
        return 0
    path = pathlib.Path(out).expanduser()
    if not path.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {path.parent}")
    write_text(path, text)
    console.print(f"{path}", soft_wrap=True, highlight=False)
    return 0


def page(network: Network, console: Console, *, compiling: bool) -> str:
    """Return the cost of a network's steps as Markdown."""
    if model_names.parse(network.model).reads_text:
        raise UserError(
            f"--model {network.model} reads text; `cost` is for networks that read images"
        )
    shape = (network.image_size, network.image_size, 3)
    model = by_name.build(
        network.model, image_shape=shape, num_classes=network.classes, seed=0
    )
    parts = Parts.of(model, by_name.trainable(network.model))
    loss_fn = recipe.make_loss_fn(
        parts,
        weight_decay=TrainConfig.weight_decay,
        label_smoothing=TrainConfig.label_smoothing,
    )
    batch = {
        "image": jax.ShapeDtypeStruct((network.batch_size, *shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((network.batch_size,), jnp.int32),
    }
    cost = lwsam.step_cost(
        loss_fn, parts.params, parts.model_state, batch, jax.random.key(0)
    )
    size = sum(x.size for x in jax.tree.leaves(parts.params))
    sections = [
        f"# Cost of a step: {network.model}, batch {network.batch_size}",
        f"Images of {network.image_size} x {network.image_size}, {network.classes}"
        f" classes, {size:,} parameters that are trained in {len(cost.layers)} layers."
        f" A plain gradient is {cost.plain / 1e9:,.2f} GFLOPs. From one trace of the"
        " loss: nothing was run.",
        _summary(cost),
        _by_layer(cost),
    ]
    if compiling:
        sections.append(_compiled(loss_fn, parts, batch, cost, console))
    command = shlex.join(["lwsam-bench", *sys.argv[1:]])
    sections.append(f"```console\n{command}\n```")
    return "\n\n".join(section.strip() for section in sections) + "\n"


def by_depth(layers: lwsam.Layers) -> list[str]:
    """Return the names of layers from the input to the output."""
    return [name for _, name in sorted(zip(layers.depth, layers.names, strict=True))]


def _summary(cost: lwsam.StepCost) -> str:
    names = by_depth(cost.layers)
    selections: dict[str, tuple[str, ...]] = {"plain (SGD)": ()}
    for count in DEEPEST:
        if count < len(names):
            what = "the last layer" if count == 1 else f"the last {count} layers"
            selections[what] = tuple(names[-count:])
    selections["the first layer alone"] = (names[0],)
    selections["all layers"] = tuple(names)
    cells = [
        [what, f"{cost.ratio(selection):.3f}", f"{cost.eq8(selection):.3f}"]
        for what, selection in selections.items()
    ]
    prices = dict(zip(cost.layers.names, cost.prices(), strict=True))
    told = []
    for budget in BUDGETS:
        within = [name for name in names if prices[name] <= budget]
        where = f" (from {within[0]} on)" if within else ""
        told.append(f"{len(within)} within {1 + budget:.2f}{where}")
    notes = (
        "FLOPs over those of a plain gradient; Eq. 8 is the paper's cost, without a"
        " forward pass that both gradients share. How many of the"
        f" {len(names)} layers a budget admits: {'; '.join(told)}."
    )
    return report.markdown(_SUMMARY, cells, notes)


def _by_layer(cost: lwsam.StepCost) -> str:
    cells = []
    for name in by_depth(cost.layers):
        i = cost.layers.names.index(name)
        cover = lwsam.Cover(cost.layers.from_depth(cost.layers.depth[i]))
        gflops = [cost.forward[i], cost.input_grad[i], cost.weight_grad[i]]
        ratios = [cost.ratio((name,)), cost.ratio(cover), cost.eq8((name,))]
        cells.append(
            [name, *(f"{x / 1e9:.3g}" for x in gflops), *(f"{x:.3f}" for x in ratios)]
        )
    notes = (
        "From the input on. In GFLOPs: the forward pass, the gradient by the input, the"
        " gradient by the weights. Over a plain gradient: a step that perturbs this layer"
        " alone, and one compiled for all layers from this one on."
    )
    return report.markdown(_LAYERS, cells, notes)


def _compiled(
    loss_fn: recipe.LossFn,
    parts: Parts,
    batch: Any,
    cost: lwsam.StepCost,
    console: Console,
) -> str:
    """Compile steps with SGD and momentum; return what XLA says of them."""
    method = lwsam.LayerwiseSAM(k=COMPILED, rho=0.1, alpha=0.8)
    step = lwsam.TrainStep(loss_fn, optax.sgd(0.1, momentum=0.9), method)
    state = step.init(parts.params, parts.model_state, batch, key=jax.random.key(0))
    cells, plain = [], None
    for title, selection in _programs(cost.layers):
        began = time.perf_counter()
        compiled = step.lower(state, batch, selection).compile()
        seconds = time.perf_counter() - began
        console.print(f"{title}: compiled in {seconds:.0f} s", highlight=False)
        counted = flops(compiled)
        plain = plain or counted
        cells.append(
            [
                title,
                f"{seconds:.0f}",
                f"{counted / 1e9:,.2f}",
                f"{counted / plain:.3f}",
                f"{cost.ratio(selection):.3f}",
                f"{memory(compiled) / 2**30:.2f}",
            ]
        )
    origin = provenance()
    cores = f", {origin['cpu_count']} cores" if origin["platform"] == "cpu" else ""
    notes = (
        "Compiled, not run: whole training steps with SGD and momentum. Memory:"
        f" arguments, results and temporaries. JAX {origin['packages']['jax']},"
        f" {origin['device']}{cores}."
    )
    header = (
        "program",
        "compiling, s",
        "GFLOPs by XLA",
        "over plain, by XLA",
        "over plain, by the trace",
        "memory, GiB",
    )
    return report.markdown(header, cells, notes)


def _programs(layers: lwsam.Layers) -> Iterator[tuple[str, Any]]:
    names = by_depth(layers)
    yield "plain (SGD)", ()
    yield f"cover of the last {COMPILED} layers", lwsam.Cover(tuple(names[-COMPILED:]))
    yield "cover of all layers", lwsam.Cover(tuple(names))
