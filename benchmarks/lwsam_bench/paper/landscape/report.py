"""The plots and tables of Figures 2 and 6, from the rows of their landscapes."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from lwsam_bench.pages import report
from lwsam_bench.paper import setups
from lwsam_bench.paper.artefact import Artefact, command_line, Table, TITLES
from lwsam_bench.support.rows import Row


TOP = 4.5  # of the z-axis, as in A.2

_HOW = (
    "After Appendix A.2: one layer at a time is moved in the plane of two random"
    " directions of its shape, orthonormal over all its entries; the same directions and"
    " images for all networks. The loss is the mean cross-entropy, in evaluation mode:"
    " the running statistics of BatchNorm, no augmentation, no smoothing of labels, no"
    " weight decay. The directions are not scaled to the weights (no filter"
    " normalisation), as in the paper."
)
_TABLE_NOTE = (
    "Increase: the mean loss over the grid less the loss of the network as trained. In"
    f" the plot: the same with losses above {TOP:g} counted as {TOP:g}. ‖w‖: norm of the"
    " layer's weights, which a point (α, β) of the grid is √(α² + β²) away from."
)


@dataclasses.dataclass(frozen=True)
class Surface:
    """The landscape of a layer.

    Attributes:
      layer: Its name, number of parameters and norm.
      steps: The places along both directions.
      losses: f64[alpha, beta].
    """

    layer: Mapping[str, Any]
    steps: tuple[int, ...]
    losses: np.ndarray

    @property
    def middle(self) -> float:
        """The loss of the network as it was trained."""
        at = self.steps.index(0)
        return float(self.losses[at, at])

    def increase(self, top: float = np.inf) -> float:
        """Return how far the mean loss is above the middle; losses end at `top`."""
        capped = np.minimum(self.losses, top).mean() - min(self.middle, top)
        return float(capped)


def surfaces(rows: Sequence[Row]) -> list[Surface]:
    """Return the landscapes of a network, from its rows."""
    steps = tuple(rows[0]["extent"]["steps"])
    grids = {(r["layer"], r["alpha"]): r["losses"] for r in rows if r["kind"] == "grid"}
    return [
        Surface(
            layer,
            steps,
            # What is not finite is null in a file: beyond any axis.
            np.array(
                [
                    [np.inf if x is None else x for x in grids[layer["name"], alpha]]
                    for alpha in steps
                ]
            ),
        )
        for layer in rows[0]["layers"]
    ]


def render(
    name: str,
    methods: Sequence[str],
    found: Mapping[str, Sequence[Row]],
    troubles: Sequence[str],
    scale: str,
    folder: pathlib.Path,
) -> Artefact:
    """Write the plot into a folder and return the artefact.

    Args:
      name: `figure2` or `figure6`.
      methods: Whose networks are in the table; that of the last one is in the plot.
      found: Rows by method, as far as there are any.
      troubles: Why there are no others.
      scale: One of `setups.SCALES`.
      folder: For the plot.
    """
    by_method = {method: surfaces(rows) for method, rows in found.items()}
    plots = ()
    if methods[-1] in by_method:
        plots = (f"{name}.png",)
        _plot(folder / plots[0], by_method[methods[-1]])
    heads = [row for rows in found.values() for row in rows if "origin" in row]
    return Artefact(
        name=name,
        title=TITLES[name],
        scale=scale,
        command=command_line(),
        tables=tuple(_tables(methods, by_method, scale)),
        plots=plots,
        notes=tuple(
            dict.fromkeys(
                [
                    *troubles,
                    _HOW,
                    *(_extent(head) for head in heads),
                    *(head["note"] for head in heads if head["note"]),
                    *setups.notes(("flowers",), scale),
                ]
            )
        ),
        origins=tuple(head["origin"] for head in heads),
    )


def _extent(head: Row) -> str:
    steps, images = head["extent"]["steps"], head["images"]
    fewer = "" if images == 1_024 else " (A.2 has 1,024)"
    smaller = "" if len(steps) == 40 else " (A.2 has 40 x 40 from -20 to 19)"
    return (
        f"Each loss is over the same {images:,} training images{fewer}; the grid is"
        f" {len(steps)} x {len(steps)} from {steps[0]} to {steps[-1]}{smaller}. Where the"
        f" loss is above {TOP:g}, the end of the z-axis, the surface is cut off."
    )


def _tables(
    methods: Sequence[str], by_method: Mapping[str, Sequence[Surface]], scale: str
) -> list[Table]:
    if not by_method:
        return []
    header, notes = ["layer"], [_TABLE_NOTE]
    for method in methods:
        title = setups.METHODS[method]
        header += [f"{title}: ‖w‖", f"{title}: increase", f"{title}: in the plot"]
        if method in by_method:
            middle = by_method[method][0].middle
            notes.append(
                f"{title}: the loss of the network as trained is {middle:.3f}."
            )
    rows = []
    for place, surface in enumerate(next(iter(by_method.values()))):
        cells = [surface.layer["name"]]
        for method in methods:
            cells += (
                _cells(by_method[method][place]) if method in by_method else [""] * 3
            )
        rows.append(tuple(cells))
    setup = setups.setup("flowers", scale)
    title = f"Sharpness of each layer, {setup.model}, from the input on"
    return [Table(title, tuple(header), tuple(rows), tuple(notes))]


def _cells(surface: Surface) -> list[str]:
    increase = surface.increase()
    return [
        f"{surface.layer['norm']:.2f}",
        f"{increase:.3f}" if np.isfinite(increase) else "not finite",
        f"{surface.increase(TOP):.3f}",
    ]


def _plot(path: pathlib.Path, found: Sequence[Surface]) -> None:
    """Draw a surface for each layer, all on the same axes."""
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = plt.figure(figsize=(4.2 * columns, 3.9 * lines), layout="constrained")
    for place, surface in enumerate(found):
        axis: Any = figure.add_subplot(lines, columns, place + 1, projection="3d")
        beta, alpha = np.meshgrid(surface.steps, surface.steps)
        axis.plot_surface(
            alpha,
            beta,
            np.minimum(surface.losses, TOP),
            cmap="viridis",
            vmin=0.0,
            vmax=TOP,
            rstride=1,
            cstride=1,
            linewidth=0.15,
            edgecolor=(0, 0, 0, 0.25),
            antialiased=True,
        )
        axis.set(zlim=(0.0, TOP), xlabel="α", ylabel="β", title=surface.layer["name"])
        axis.set_zlabel("loss", labelpad=-2)
        axis.set_box_aspect(None, zoom=0.88)  # room for the label of the z-axis
        axis.view_init(elev=28, azim=-52)
        axis.tick_params(labelsize=7, pad=0)
    report._save(figure, [], path)
