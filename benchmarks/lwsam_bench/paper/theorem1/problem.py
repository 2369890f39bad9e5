"""A smooth, non-convex finite sum whose constants are known, for Theorem 1.

The model is linear in D = L d parameters, the blocks w_1 .. w_L of a vector w, and its
loss is robust regression with outliers among the labels:

    L(w) = (1/N) sum_i l_i(w),   l_i(w) = phi(sum_l <a_il, w_l> - y_i),
    phi(t) = t^2 / (1 + t^2).

**beta.** With a_i = (a_i1 .. a_iL) the Hessian of l_i is phi''(t_i) a_i a_i^T, of norm
|phi''(t_i)| |a_i|^2. Here phi''(t) = 2 (1 - 3 t^2) / (1 + t^2)^3 falls from 2 at t = 0 to
-1/2 at t = 1, its minimum (phi''' vanishes at 0 and +-1), and then rises to 0. So
|phi''| <= 2, and

    beta = 2 max_i |a_i|^2

makes every l_i beta-smooth, as Assumption 2 asks. It is the least such number: the
residual of one sample can be made 0. Where |t| > 1 / sqrt(3) a sample is concave: the
problem is not convex.

**sigma^2.** The gradient of l_i is phi'(t_i) a_i with phi'(t) = 2 t / (1 + t^2)^2, which
is largest at t = 1 / sqrt(3): |phi'| <= 3 sqrt(3) / 8. As a variance is at most the mean
square,

    E_i |grad l_i - grad L|^2 <= E_i |grad l_i|^2 <= (27/64) mean_i |a_i|^2 = sigma^2

for every w. This is a rigorous bound of Assumption 1, not the exact supremum. A batch of
b samples drawn with replacement has a gradient of variance at most sigma^2 / b.

The rows have norm 1, so beta = 2 and sigma^2 = 27/64, up to how float32 rounds them.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array


SAMPLES = 256
LAYERS = 6
WIDTH = 4  # parameters of a layer

_CURVATURE = 2.0  # sup |phi''|
_SLOPE_SQUARED = 27.0 / 64.0  # sup |phi'|^2
_OUTLIERS = 0.3  # share of the labels that have nothing to do with the model
_SHARED = 2.0  # weight of the direction that all rows share
_SEED = 20240825


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The finite sum: its data, and where training starts.

    Attributes:
      features: f32[N, L, d], the a_il.
      labels: f32[N], the y_i.
      start: f32[L, d], the parameters before the first step.
    """

    features: np.ndarray
    labels: np.ndarray
    start: np.ndarray

    @classmethod
    def make(cls) -> "Problem":
        """Return the problem that all runs share."""
        rng = np.random.default_rng(_SEED)
        shape = (LAYERS, WIDTH)
        # A common direction makes the sum almost as curved as its terms, so that a
        # perturbation matters; layers that differ in scale differ in gradient norm.
        scale = np.linspace(1.0, 0.5, LAYERS)[:, None]
        shared = _SHARED * rng.standard_normal(shape)
        features = scale * (shared + rng.standard_normal((SAMPLES, *shape)))
        features /= np.linalg.norm(features, axis=(1, 2), keepdims=True)
        truth, offset = rng.standard_normal((2, *shape))
        labels = np.einsum("nld,ld->n", features, truth)
        outliers = rng.random(SAMPLES) < _OUTLIERS
        labels[outliers] = rng.uniform(-3.0, 3.0, outliers.sum())
        # Not so far from the solution that all gradients vanish.
        start = truth + offset
        return cls(*(x.astype(np.float32) for x in (features, labels, start)))

    @property
    def beta(self) -> float:
        """The smoothness of every l_i; the least number that holds."""
        return _CURVATURE * float(self._squared_rows().max())

    @property
    def sigma2(self) -> float:
        """A bound of the variance of a sample's gradient, at any parameters."""
        return _SLOPE_SQUARED * float(self._squared_rows().mean())

    @property
    def params(self) -> dict[str, Array]:
        """The parameters before the first step, a leaf for each layer."""
        return {f"layer{i + 1}": jnp.asarray(w) for i, w in enumerate(self.start)}

    def measure(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """Measure the whole sum in float64, by the formulas above and not by JAX.

        Args:
          points: [..., L d], parameters.

        Returns:
          `loss`, `squared_norm` (of the gradient of L) and `variance` (of a sample's
          gradient), each f64[...].
        """
        features = self._flat()
        t = np.asarray(points, np.float64) @ features.T - self.labels
        slope = 2.0 * t / (1.0 + t * t) ** 2
        gradient = slope @ features / len(features)
        squared_norm = np.sum(gradient**2, axis=-1)
        squares = slope**2 @ self._squared_rows() / len(features)
        return {
            "loss": np.mean(t * t / (1.0 + t * t), axis=-1),
            "squared_norm": squared_norm,
            "variance": squares - squared_norm,
        }

    def hessian(self, point: np.ndarray, sample: int) -> np.ndarray:
        """Return the Hessian f64[L d, L d] of l_i at parameters [L d]."""
        row = self._flat()[sample]
        t = float(row @ point - self.labels[sample])
        return 2.0 * (1.0 - 3.0 * t * t) / (1.0 + t * t) ** 3 * np.outer(row, row)

    def _flat(self) -> np.ndarray:
        return self.features.reshape(len(self.features), -1).astype(np.float64)

    def _squared_rows(self) -> np.ndarray:
        return np.sum(self._flat() ** 2, axis=1)


def batch_loss(params: dict[str, Array], features: Array, labels: Array) -> Array:
    """Return the mean loss of a batch: features f32[b, L, d], labels f32[b]."""
    t = -labels
    for i, w in enumerate(params.values()):
        t += features[:, i] @ w
    return jnp.mean(t * t / (1.0 + t * t))
