"""The tables and the plot of Theorem 1, from its rows."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt

from lwsam_bench.pages import report
from lwsam_bench.paper.artefact import Artefact, Table, TITLES
from lwsam_bench.support.rows import Row


_NAME = "theorem1"
_HEADER = (
    "k",
    "measured (1/T) Σ ‖∇L(w_t)‖²",
    "bound of Eq. 7",
    "measured / bound",
    "L(w_0)",
    "mean L(w_T)",
    "below the bound",
)
_NOTES = (
    "The paper has no measurement of this kind. On its proof: Lemma A.2 needs the"
    " square root of κ, and Lemmas A.3 and A.4 treat a point that depends on the batch"
    " as if it did not; both can be mended, with the bound as it stands for η ≤ 1/(2β)"
    " and r ≤ 1/(4β). The last line of Lemma A.4 does not hold for every η ≤ 1/(2β) at"
    " r = 1/(2β). At η = r = 1/(2β) the mended proof gives twice the bound; what is"
    " compared here is Eq. 7 itself.",
)


def render(
    rows: Sequence[Row],
    titles: Mapping[str, str],
    scale: str,
    folder: pathlib.Path,
    command: str,
) -> Artefact:
    """Write the plot into a folder and return the artefact.

    Args:
      rows: As `theorem1.measure` yields them: for each setting all k, all seeds of a k.
      titles: What each setting is, by the name that the rows have.
      scale: What `--scale` said.
      folder: For the plot.
      command: What made this.
    """
    settings = {
        title: _Setting([row for row in rows if row["setting"] == name])
        for name, title in titles.items()
    }
    above = [
        f"k = {k} ({title})"
        for title, setting in settings.items()
        for k in setting.above()
    ]
    verdict = (
        f"The measured value is NOT below the bound for {', '.join(above)}."
        if above
        else "The measured value is below the bound for every k, in both settings."
    )
    first = rows[0]
    share = max(row["most_variance"] for row in rows) / first["problem"]["sigma2"]
    setup = (
        f"{first['steps']:,} steps, batches of {first['batch_size']} drawn with"
        f" replacement, {len({row['seed'] for row in rows})} seeds of the batches (± is"
        " the standard error); layer-wise SAM without normalisation, α = 1. L is a"
        " finite sum of bounded, non-convex losses of a linear model in blocks, for"
        f" which β = {first['problem']['beta']:.4g} is the least that holds and σ² ="
        f" {first['problem']['sigma2']:.4g} bounds the variance of a sample's gradient"
        f" everywhere; the largest variance that any run met is {share:.0%} of it."
        " Gradients and losses of the whole sum are measured in float64 at every step."
    )
    plot = f"{_NAME}.png"
    _plot(folder / plot, settings)
    return Artefact(
        name=_NAME,
        title=TITLES[_NAME],
        scale=scale,
        command=command,
        tables=tuple(
            Table(f"{title} = {setting.size:.3g}", _HEADER, setting.cells())
            for title, setting in settings.items()
        ),
        plots=(plot,),
        notes=(verdict, setup, *_NOTES),
        origins=tuple({str(row["origin"]): row["origin"] for row in rows}.values()),
    )


class _Setting:
    """The rows of a choice of step size and radius, by k.

    Args:
      rows: All k, all seeds of a k.
    """

    def __init__(self, rows: Sequence[Row]):
        ks = dict.fromkeys(row["k"] for row in rows)
        self.rows = {k: [row for row in rows if row["k"] == k] for k in ks}
        self.size = rows[0]["eta"]
        self.horizons = np.asarray(rows[0]["horizons"])

    def measured(self, k: int) -> np.ndarray:
        """Return the mean squared gradient norm, f64[seeds, horizons]."""
        return np.asarray([row["mean_squared_norm"] for row in self.rows[k]])

    def bound(self, k: int) -> np.ndarray:
        """Return the right-hand side of Eq. 7 at each horizon."""
        return bound(self.rows[k])

    def above(self) -> list[int]:
        """Return every k whose mean is not below the bound."""
        return [
            k
            for k in self.rows
            if not self.measured(k)[:, -1].mean() < self.bound(k)[-1]
        ]

    def cells(self) -> tuple[tuple[str, ...], ...]:
        """Return the rows of the table."""
        above = self.above()
        cells = []
        for k, rows in self.rows.items():
            mean, error = report.mean_and_error(self.measured(k)[:, -1].tolist())
            limit = self.bound(k)[-1]
            spread = "" if np.isnan(error) else f" ± {error:.1e}"
            cells.append(
                (
                    f"{k} (SGD)" if k == 0 else str(k),
                    f"{mean:.3e}{spread}",
                    f"{limit:.3e}",
                    f"{mean / limit:.3f}",
                    f"{rows[0]['first_loss']:.4f}",
                    f"{np.mean([row['loss'][-1] for row in rows]):.4f}",
                    "no" if k in above else "yes",
                )
            )
        return tuple(cells)


def bound(rows: Sequence[Row]) -> np.ndarray:
    """Return the right-hand side of Eq. 7 at each horizon.

    Args:
      rows: Of one setting and k; the expectation of L(w_T) is their mean.
    """
    first = rows[0]
    eta, r, beta = first["eta"], first["r"], first["problem"]["beta"]
    descent = first["first_loss"] - np.mean([row["loss"] for row in rows], axis=0)
    noise = first["problem"]["sigma2"] / first["batch_size"]
    return (
        4 / (np.asarray(first["horizons"]) * eta) * descent
        + 4 * (eta * beta + beta**2 * r**2) * noise
    )


def _plot(path: pathlib.Path, settings: Mapping[str, _Setting]) -> None:
    """Draw the mean over T of the squared norm, and its bound, for every T and k."""
    figure, (axes,) = plt.subplots(
        1,
        len(settings),
        figsize=(10, 4.2),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, (title, setting) in zip(axes, settings.items(), strict=True):
        bounds = np.asarray([setting.bound(k) for k in setting.rows])
        axis.fill_between(
            setting.horizons,
            bounds.min(axis=0),
            bounds.max(axis=0),
            color=report.COLOURS[3],
            # The bounds differ in E[L(w_T)] alone; a line shows where they are one.
            lw=1.5,
            label="bound of Eq. 7, all k",
        )
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(setting.rows)))
        for k, colour in zip(setting.rows, colours, strict=True):
            mean = setting.measured(k).mean(axis=0)
            label = f"measured, k = {k}"
            axis.plot(setting.horizons, mean, color=colour, label=label)
        axis.set(
            xscale="log", yscale="log", xlabel="steps T, at equal η and r", title=title
        )
    axes[0].set_ylabel("(1/T) Σ ‖∇L(w_t)‖²")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    report._save(figure, axes, path)
