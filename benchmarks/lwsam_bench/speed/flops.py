"""The command `flops`: what a compiled gradient step costs over a plain gradient.

This is the claim of layer-wise SAM in numbers: the last layers cost next to nothing,
because neither the backward pass below them nor the forward pass is done twice.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import lwsam_jax as lwsam
from lwsam_bench.models import by_name
from lwsam_bench.models.network import Network
from lwsam_bench.support.measure import flops
from lwsam_bench.training.recipe import make_loss_fn


IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """A set of layers, and the most that perturbing it may cost over a gradient."""

    title: str
    selected: Callable[[str], bool]
    limit: float | None


# Limits are the prices with three decimals, rounded: none may rise.
CASES = (
    Case("last layer (dense)", lambda name: name == "dense", 1.0005),
    Case(
        "dense + last conv",
        lambda name: name in ("dense", "stage3_block3/conv2"),
        1.0355,
    ),
    Case(
        "third stage + dense",
        lambda name: name == "dense" or name.startswith("stage3"),
        1.2845,
    ),
    Case("first conv", lambda name: name == "stem_conv", None),
    Case("all (SAM's cost)", lambda name: True, 2.01),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one case costs: FLOPs over those of a plain gradient."""

    case: Case
    layers: int
    ratio: float

    @property
    def holds(self) -> bool:
        """Whether the cost is within its limit."""
        return self.case.limit is None or self.ratio <= self.case.limit


def measure(batch_size: int, cases: Iterable[Case] = CASES) -> Iterable[Result]:
    """Compile each case for a ResNet-20 with projection shortcuts on the CPU.

    Args:
      batch_size: Images of 32 x 32 pixels in a batch.
      cases: What to perturb.

    Yields:
      One result for each case.
    """
    # XLA counts for the CPU; other backends fuse differently or do not count at all.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        network = Network.of(
            by_name.build(
                "resnet20",
                image_shape=IMAGE_SHAPE,
                num_classes=NUM_CLASSES,
                seed=0,
                projection=True,
            )
        )
        loss_fn = make_loss_fn(network)
        batch = {
            "image": jnp.zeros((batch_size, *IMAGE_SHAPE), jnp.float32),
            "label": jnp.zeros((batch_size,), jnp.int32),
        }
        args = (network.params, network.model_state, batch, jax.random.key(0))
        plain = _flops(jax.value_and_grad(loss_fn, has_aux=True), args)
        names = lwsam.Layers.of(network.params).names
        for case in cases:
            selection = tuple(filter(case.selected, names))
            penalized = lwsam.value_and_grad(
                loss_fn,
                selection,
                rho=0.1,
                alpha=0.8,
                normalize="none",
                has_aux=True,
            )
            ratio = _flops(penalized, args) / plain
            yield Result(case, len(selection), ratio)


def _flops(fn: Callable[..., Any], args: tuple[Any, ...]) -> float:
    return flops(jax.jit(fn).lower(*args).compile())


def run(batch_size: int, console: Console) -> int:
    """Print the table; return 0, or 1 if a limit is broken."""
    title = f"ResNet-20, batch {batch_size}: FLOPs of a step over a plain gradient"
    table = Table(title=title)
    for name, justify in (
        ("perturbed", "left"),
        ("layers", "right"),
        ("FLOPs", "right"),
        ("limit", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    holds = True
    with console.status("compiling") as status:
        for result in measure(batch_size):
            status.update(f"compiled: {result.case.title}")
            limit = result.case.limit
            table.add_row(
                result.case.title,
                str(result.layers),
                f"{result.ratio:.4f}",
                "-" if limit is None else f"{limit:g}",
                "" if limit is None else "ok" if result.holds else "TOO MUCH",
            )
            holds = holds and result.holds
    console.print(table)
    return 0 if holds else 1
