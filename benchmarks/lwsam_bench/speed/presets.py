"""The mode `cost --presets`: FLOPs of every preset's step over SGD's, model and XLA."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import lwsam_jax as lwsam
from lwsam_bench.models import by_name
from lwsam_bench.models.network import Network
from lwsam_bench.pages.docs import replace_generated
from lwsam_bench.speed import settings
from lwsam_bench.speed.settings import Setting
from lwsam_bench.support.measure import flops
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.rows import read_rows, Row, write_rows, write_text


MARK = "costs of the presets"
PERIOD = 5  # of LookSAM
CLASSES = 10
_LABELS = lambda batch: batch["label"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A preset with its published numbers.

    Attributes:
      make: Makes the method.
      share: Of the steps that take an ascent; None: the gradient decides.
      setting: `(net, batch)` to what it trains.
      turns: Of the loop that is nearly all of its step: XLA counts one.
    """

    make: Callable[[], lwsam.Method]
    share: float | None = 1.0
    setting: Callable[[Network, Any], Setting] = settings.plain
    turns: int = 1


def _none() -> lwsam.Method:
    return lwsam.Method(lwsam.nothing(), rho=0.0)


CASES: Mapping[str, Case] = {
    "sam": Case(lambda: lwsam.sam(0.05)),
    "LayerwiseSAM, last 4": Case(
        lambda: lwsam.LayerwiseSAM(k=4, rho=0.1, alpha=0.8)  # before the first norms
    ),
    "sam_on": Case(lambda: lwsam.sam_on(0.5)),
    "sparse_sam": Case(lambda: lwsam.sparse_sam(0.1)),
    "sl_sam, last 3": Case(
        lambda: lwsam.sl_sam(0.05, 3, select=lwsam.named("dense|block4"))
    ),
    "asam": Case(lambda: lwsam.asam(0.5)),
    "friendly_sam": Case(lambda: lwsam.friendly_sam(0.1)),
    "gcsam": Case(lambda: lwsam.gcsam(0.05)),
    "lightsam": Case(lambda: lwsam.lightsam(1e-3)),
    "mup_perturbation": Case(lambda: lwsam.mup_perturbation(0.01, per="layer")),
    "generalized_sam": Case(lambda: lwsam.generalized_sam(0.1, 0.8)),
    "gsam": Case(lambda: lwsam.gsam(0.1, 0.4)),
    "stable_sam": Case(lambda: lwsam.stable_sam(0.05)),
    "wsam": Case(lambda: lwsam.wsam(0.05, learning_rate=0.1)),
    "gam": Case(lambda: lwsam.gam(0.2)),
    "looksam": Case(lambda: lwsam.looksam(0.05, PERIOD), share=1 / PERIOD),
    "ae_sam": Case(lambda: lwsam.ae_sam(0.05, 1000), share=None),
    "esam": Case(lambda: lwsam.esam(0.05, keep=1.0)),
    "csam": Case(lambda: lwsam.csam(0.05)),
    "focal_sam": Case(lambda: lwsam.focal_sam(0.2, [*range(CLASSES, 0, -1)], _LABELS)),
    "imbsam": Case(lambda: lwsam.imbsam(0.05, [99] * 9 + [1], _LABELS)),
    "m_sam": Case(lambda: lwsam.m_sam(0.05, 4), turns=4),
    "async_sam": Case(lambda: lwsam.async_sam(0.05)),
    "adazo_sam": Case(lambda: lwsam.adazo_sam(0.05)),
    "lorenza": Case(lambda: lwsam.lorenza(0.05)),
    "random_sam": Case(lambda: lwsam.random_sam(0.05)),
    "rwp": Case(lambda: lwsam.rwp(0.01)),
    "m_rwp": Case(lambda: lwsam.m_rwp(0.01)),
    "arwp": Case(lambda: lwsam.arwp(0.01)),
    "m_arwp": Case(lambda: lwsam.m_arwp(0.01)),
    "damp": Case(lambda: lwsam.damp(0.2), turns=8),
    "flat_lora": Case(
        lambda: lwsam.flat_lora(0.05, settings.SCALE), setting=settings.with_adapters
    ),
    "saf": Case(_none, setting=settings.with_saf),
    "mesa": Case(_none, setting=settings.with_mesa),
    "das": Case(_none, setting=settings.with_das),
    "sam, momentum (MSAM)": Case(lambda: lwsam.sam(3.0, ascent=lwsam.momentum())),
    "sam, every second step": Case(
        lambda: lwsam.sam(0.05, when=lwsam.every(2)), share=1 / 2
    ),
    "sam, in a tail of 30 %": Case(
        lambda: lwsam.sam(0.05, when=lwsam.last(0.3, 1)), share=0.3
    ),
    "sam, a tenth of the batch": Case(
        lambda: lwsam.sam(0.05, ascent=lwsam.micro_batch(0.1))
    ),
    "asam, a tenth, last 4": Case(
        lambda: lwsam.asam(
            0.5,
            ascent=lwsam.micro_batch(0.1),
            select=lwsam.top_k(4),
            rule=lwsam.weights,
        )
    ),
}


def run(
    model: str,
    batch_size: int,
    image_size: int,
    console: Console,
    *,
    rows: str,
    page: str | None,
    only: Sequence[str] | None = None,
) -> int:
    """Measure what has no row yet; write the rows, and the table on its page.

    Args:
      model: A name that `by_name.build` knows.
      batch_size: Images in a batch.
      image_size: Sides of an image in pixels.
      console: Where to report.
      rows: The JSONL file.
      page: Page with the marks of the table, or None.
      only: Names of `CASES`; None: all.
    """
    path = pathlib.Path(rows).expanduser()
    setting = {"model": model, "batch_size": batch_size, "image_size": image_size}
    is_ours = lambda row: row.items() >= setting.items()
    there = list(read_rows(path))
    others = [row for row in there if not is_ours(row)]
    found = {row["preset"]: row for row in there if is_ours(row)}
    origin = provenance()
    for name in only or CASES:
        if name in found:
            continue
        row = {"preset": name, **setting, **measured(CASES[name], **setting)}
        found[name] = {**row, "provenance": origin}
        console.print(
            f"{name}: {row['by_model']:.3f} by the model, {row['by_xla']:.3f} by XLA",
            highlight=False,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, [*others, *(found[n] for n in CASES if n in found)])
    if page is not None:
        where = pathlib.Path(page).expanduser()
        text = table([found[n] for n in CASES if n in found])
        write_text(where, replace_generated(where, MARK, text))
    return 0


def measured(case: Case, model: str, batch_size: int, image_size: int) -> Row:
    """Return the FLOPs of a preset's step over those of a plain one."""
    shape = (image_size, image_size, 1)
    net = by_name.build(model, image_shape=shape, num_classes=CLASSES, seed=0)
    parts = Network.of(net, by_name.trainable(model))
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(batch_size, *shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, CLASSES, batch_size), jnp.int32),
    }
    setting = case.setting(parts, batch)
    step, state = _made(setting, case.make())
    base, before = step, state
    if not setting.is_plain:
        base, before = _made(settings.plain(parts, batch), _none())
    seen = setting.batch if setting.is_plain else batch
    plain = flops(base.lower(before, seen, ()).compile())
    perturbed = flops(step.lower(state, setting.batch).compile())
    _, info = step(state, setting.batch)
    if not bool(info.finite):
        raise ValueError("the step is not finite")
    return {
        "by_model": (1 + float(info.overhead)) * step.cost.plain / base.cost.plain,
        "by_xla": case.turns * perturbed / plain,
        "share": case.share,
        "layers": int(info.mask.sum()),
    }


def _made(setting: Setting, method: lwsam.Method) -> tuple[Any, Any]:
    """Return the train step of a method, and its first state."""
    step = lwsam.TrainStep(setting.loss_fn, setting.optimizer, method)
    state = step.init(
        setting.params, setting.model_state, setting.batch, key=jax.random.key(0)
    )
    return step, state


def table(rows: Sequence[Row]) -> str:
    """Return the table as Markdown."""
    first = rows[0]
    lines = [
        "| preset | layers | a step with ascent, by the model | by XLA | the mean step |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        mean = "1 to " + f"{row['by_model']:.2f}"
        if row["share"] is not None:
            mean = f"{1 + row['share'] * (row['by_model'] - 1):.2f}"
        lines.append(
            f"| {row['preset']} | {row['layers']} | {row['by_model']:.2f}"
            f" | {row['by_xla']:.2f} | {mean} |"
        )
    packages: Any = first["provenance"]["packages"]
    notes = (
        f"FLOPs over a plain step: {first['model']} on images of {first['image_size']} x"
        f" {first['image_size']}, batch {first['batch_size']}, SGD with momentum; XLA of"
        f" JAX {packages['jax']}, {first['provenance']['platform']}. The model counts the"
        " passes; XLA counts the whole compiled step, so also the perturbation, the"
        " combination and the optimizer, which weigh more in a net as small as this. Of"
        " AE-SAM's step XLA counts the branch that costs more. Flat-LoRA is over the same"
        " adapters without noise. Of m_sam and DAMP XLA counts one of their parts of the"
        " batch, which is multiplied. MSAM is `momentum_sam`, too, and AdaSAM is `sam`."
    )
    return "\n".join(lines) + f"\n\n{notes}\n"
