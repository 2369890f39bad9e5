"""Theorem 1: Algorithm 1 on a problem whose beta and sigma^2 are known.

Algorithm 1 runs as the library does it (`lwsam.value_and_grad`, and the selection of
`lwsam.top_k`), not normalised and with alpha = 1, as in the proof, for every
k = 0 .. L. Batches are drawn with replacement. The full gradient at every iterate is then
measured in float64, by NumPy, and its mean square is compared with the right-hand side of
Eq. 7, with L(w_0) - E[L(w_T)] as measured.

What the proof (Appendix A.1) leaves open, and whether it matters here:

* Lemma A.2 applies Lemma A.1 to a step r grad L(w') but an inner product with
  r grad L(w); by Cauchy-Schwarz kappa has to be its square root. The theorem does not
  depend on kappa.
* Lemma A.3 replaces the batch's gradient at the perturbed point by the full one, although
  that point depends on the same batch, and Lemma A.4 bounds its variance there likewise.
  Both can be mended, as Assumption 2 holds for every sample: compare the gradient of the
  batch with its own at points that do not depend on it, w + r grad L(w') and w.
* The last line of Lemma A.4 asks for
  2 r beta (kappa - 2 eta beta (kappa - r beta)) <= 1/2. At r = 1 / (2 beta) and kappa = 1
  the left side is 1 - eta beta, so that this holds only for eta = 1 / (2 beta), not for
  every smaller eta. It does hold for every eta where r <= 1 / (4 beta), and for eta = r.

So mended, the proof gives Eq. 7 as it stands for eta <= 1 / (2 beta), r <= 1 / (4 beta),
which covers the choice of Remark 1 from T = 16 on. With x = r beta and y = eta beta,

    E L(w_t+1) <= E L(w_t) - (eta / 2) (1 - 2 x (1 - y (1 - x))) E |grad L(w_t)|^2
                  + eta (y + x^2) sigma^2 / b.

At eta = r = 1 / (2 beta) the factor of the second term is eta / 8, not the eta / 4 of the
paper: there it gives twice the right-hand side of Eq. 7. Both choices are measured.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console

import lwsam_jax as lwsam
from lwsam_bench.paper.artefact import Artefact, command_line
from lwsam_bench.paper.request import Request
from lwsam_bench.paper.theorem1 import report
from lwsam_bench.paper.theorem1.problem import batch_loss, LAYERS, Problem
from lwsam_bench.support.provenance import provenance
from lwsam_bench.support.row_lock import row_lock
from lwsam_bench.support.rows import MetricsFile, output_folder, read_rows, Row


BATCH_SIZE = 16
HORIZONS = 40  # points of a curve
_CHUNK = 250  # steps whose iterates are kept at a time; they are measured on the host


@dataclasses.dataclass(frozen=True)
class Setting:
    """A choice of step size and radius.

    Attributes:
      name: In the rows.
      title: In the table.
      size: `(beta, steps) -> eta = r`.
    """

    name: str
    title: str
    size: Callable[[float, int], float]


SETTINGS = (
    Setting("edge", "η = r = 1/(2β)", lambda beta, steps: 1 / (2 * beta)),
    Setting(
        "remark1", "η = r = 1/(β√T)", lambda beta, steps: 1 / (beta * math.sqrt(steps))
    ),
)


@dataclasses.dataclass(frozen=True)
class Length:
    """How much is measured at a scale."""

    steps: int
    seeds: int


LENGTHS: Mapping[str, Length] = {
    "smoke": Length(steps=250, seeds=2),
    "small": Length(steps=4_000, seeds=8),
    "paper": Length(steps=40_000, seeds=32),
}


def theorem1(request: Request) -> Artefact:
    """Run what is missing in `out` and return the artefact.

    The folder of data is not read, the problem being made from a fixed seed, nor are
    jobs: the runs of a k are one program.
    """
    scale, out = request.scale, request.out
    length = LENGTHS[scale]
    length = dataclasses.replace(length, seeds=request.seeds or length.seeds)
    path = output_folder(str(out)) / "theorem1.jsonl"
    with row_lock(path):
        rows = list(measure(length, path, request.console))
    return report.render(
        rows, {s.name: s.title for s in SETTINGS}, scale, out, command_line()
    )


def measure(length: Length, path: pathlib.Path, console: Console) -> Iterator[Row]:
    """Yield a row for each setting, k and seed; those in the file are not run again."""
    problem = Problem.make()
    known = {
        "problem": {"beta": problem.beta, "sigma2": problem.sigma2},
        "batch_size": BATCH_SIZE,
        "steps": length.steps,
    }
    found = {
        (row["setting"], row["k"], row["seed"]): row
        for row in read_rows(path)
        if all(row.get(name) == value for name, value in known.items())
    }
    simulation = None
    with MetricsFile(path, keep_until=0) as file:
        for setting in SETTINGS:
            for k in range(LAYERS + 1):
                wanted = [(setting.name, k, seed) for seed in range(length.seeds)]
                if any(key not in found for key in wanted):
                    simulation = simulation or Simulation(problem)
                    size = setting.size(problem.beta, length.steps)
                    # All seeds, also those that are there: they are one program, and
                    # one of another width may round in another way.
                    curves = simulation(k, size, length)
                    for key, curve in zip(wanted, curves, strict=True):
                        if key in found:
                            continue
                        found[key] = {
                            "kind": "theorem1",
                            **dict(zip(("setting", "k", "seed"), key, strict=True)),
                            **known,
                            "eta": size,
                            "r": size,
                            **curve,
                            "origin": provenance(),
                        }
                        file.write(found[key])
                    console.print(f"{setting.title}, k = {k}: done", highlight=False)
                yield from (found[key] for key in wanted)


class Simulation:
    """Algorithm 1 on the problem, all seeds at once; one executable for every k."""

    def __init__(self, problem: Problem):
        self._problem = problem
        self._layers = lwsam.Layers.of(problem.params, lwsam.leaves)
        self._features = jnp.asarray(problem.features)
        self._labels = jnp.asarray(problem.labels)

    def __call__(self, k: int, size: float, length: Length) -> list[Row]:
        """Return for each seed what was measured, at a number of horizons.

        Args:
          k: Layers to perturb.
          size: Step size and radius.
          length: Steps and seeds.
        """
        keys = jax.vmap(jax.random.key)(jnp.arange(length.seeds))
        state = self._start(k, length.seeds)
        parts: list[dict[str, np.ndarray]] = []
        last = None
        for first in range(0, length.steps, _CHUNK):
            steps = jnp.arange(first, first + _CHUNK)
            state, points = self._steps(state, steps, keys, k, size)
            # The last chunk may reach beyond the end.
            here = min(_CHUNK, length.steps - first)
            last = points[here] if here < _CHUNK else _flat(state[0])
            parts.append(self._problem.measure(np.asarray(points[:here])))
        end = self._problem.measure(np.asarray(last))
        whole = {name: np.concatenate([p[name] for p in parts]) for name in end}
        losses = np.concatenate([whole["loss"], end["loss"][None]])
        horizons = _horizons(length.steps)
        squares = np.cumsum(whole["squared_norm"], axis=0)
        return [
            {
                "horizons": horizons,
                "mean_squared_norm": [squares[h - 1, seed] / h for h in horizons],
                "first_loss": losses[0, seed],
                "loss": [losses[h, seed] for h in horizons],
                "most_variance": whole["variance"][:, seed].max(),
            }
            for seed in range(length.seeds)
        ]

    def _start(self, k: int, seeds: int) -> tuple[Any, Any]:
        """Return parameters and the first selection, bool[L], for each seed."""
        no_norms = jnp.zeros(len(self._layers))
        one = (self._problem.params, self._choose(k, no_norms, jnp.int32(0)))
        return jax.tree.map(lambda x: jnp.stack([x] * seeds), one)

    @functools.partial(jax.jit, static_argnums=0)
    def _steps(
        self, state: Any, steps: Array, keys: Array, k: Any, size: Any
    ) -> tuple[Any, Array]:
        """Run steps; return the state, and w_t before each step, f32[T, seeds, L d]."""
        penalized = lwsam.value_and_grad(
            batch_loss,
            lwsam.Cover(self._layers.names),
            rho=size,
            alpha=1.0,
            layers=self._layers,
        )

        def one(state: Any, key: Array, step: Array) -> Any:
            params, mask = state
            rows = jax.random.randint(
                jax.random.fold_in(key, step), (BATCH_SIZE,), 0, len(self._labels)
            )
            out = penalized(params, self._features[rows], self._labels[rows], mask=mask)
            params = jax.tree.map(lambda w, g: w - size * g, params, out.grads)
            return params, self._choose(k, out.norms, step + 1)

        def body(state: Any, step: Array) -> tuple[Any, Array]:
            new = jax.vmap(one, in_axes=(0, 0, None))(state, keys, step)
            return new, _flat(state[0])

        return jax.lax.scan(body, state, steps)

    def _choose(self, k: Any, norms: Array, step: Array) -> Array:
        """Return the k layers of the largest norms, bool[L]; k may be traced."""
        method = lwsam.Method(lwsam.top_k(k), rho=1.0)  # the radius has no part in it
        return method.choose(norms, step, self._layers)


def _flat(params: Mapping[str, Array]) -> Array:
    """Return f32[seeds, L d] of parameters with a first axis of seeds."""
    return jnp.concatenate(list(params.values()), axis=-1)


def _horizons(steps: int) -> list[int]:
    """Return numbers of steps at equal ratios, the last of them all."""
    return sorted({round(h) for h in np.geomspace(1, steps, HORIZONS)})
