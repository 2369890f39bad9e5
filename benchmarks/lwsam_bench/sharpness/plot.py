"""The sharpness of a network as a table and a plot; the row is all that they know."""

import pathlib

import numpy as np
from matplotlib import pyplot as plt

from lwsam_bench.pages import report
from lwsam_bench.support.rows import Row


_WHOLE = "all"
# The names of the measures and what a reader is told of them.
GAPS = {
    "m_sharpness": "m-sharpness",
    "gradient": "along the gradient",
    "momentum": "along minus the momentum",
    "random": "random",
}


def markdown(row: Row) -> str:
    """Return the table of the whole and of each layer."""
    gaps = [name for name in GAPS if name in row["whole"]]
    header = ["layer", "largest eigenvalue", *(GAPS[name] for name in gaps)]
    cells = [
        [
            name,
            f"{part['eigenvalues'][0]:.4g} ± {part['residuals'][0]:.1g}",
            *(f"{part[gap]:.4g}" for gap in gaps),
        ]
        for name, part in _parts(row)
    ]
    notes = (
        f"Loss {row['value']:.4g}, the mean cross-entropy of {row['examples']} training"
        " examples in evaluation mode. Eigenvalues of the Hessian, ± the norm of the"
        f" residual; gaps of the loss at a radius of {row['rho']:g}, m-sharpness in"
        f" groups of {row['m']}, random over {row['samples']} directions. A layer alone"
        " moves in its line; all parameters do in the first."
    )
    return report.markdown(header, cells, notes)


def draw(row: Row, path: pathlib.Path) -> None:
    """Plot eigenvalues and gaps, layer by layer from the input on."""
    parts = _parts(row)
    names = [name for name, _ in parts]
    places = np.arange(len(names))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1.5 + 0.28 * len(names)), sharey=True, layout="constrained"
    )
    for number in range(row["eigenvalues"]):
        values = [part["eigenvalues"][number] for _, part in parts]
        left.plot(
            values,
            places,
            "o",
            color=report.COLOURS[2],
            alpha=1 / (1 + number),
            label="largest" if not number else f"{number + 1}.",
        )
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set_xlabel("eigenvalues of the Hessian")
    gaps = [name for name in GAPS if name in row["whole"]]
    for gap, colour in zip(gaps, report.COLOURS[1:], strict=False):
        values = [part[gap] for _, part in parts]
        right.plot(values, places, "o", color=colour, label=GAPS[gap])
    right.set_xlabel(f"gap of the loss at radius {row['rho']:g}")
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=1e-4)
        axes.axvline(0, color="0.8", linewidth=1)
        axes.grid(axis="y", color="0.93")
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _parts(row: Row) -> list[tuple[str, Row]]:
    """Return all parameters first, then each layer."""
    return [(_WHOLE, row["whole"]), *row["layers"].items()]
