"""What a trained net is judged by: accuracy, loss, calibration, and what it survives."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lwsam_bench.support.rows import Row


BINS = 15  # of confidence, as in Guo et al. (2017)
BITS = (4, 3)
WEIGHT_NOISE = (0.2, 0.4)  # of each layer's norm
NOISE_DRAWS = 4
INPUT_NOISE = 0.5  # standard deviations of a pixel


def judge(logits: np.ndarray, labels: np.ndarray) -> Row:
    """Return accuracy, mean cross-entropy and expected calibration error.

    Args:
      logits: f32[N, K].
      labels: i32[N].
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    hits = log_p.argmax(axis=1) == labels
    loss = -log_p[np.arange(len(labels)), labels].mean()
    return {
        "accuracy": float(hits.mean()),
        "loss": float(loss) if np.isfinite(loss) else None,
        "ece": _calibration_error(np.exp(log_p.max(axis=1)), hits),
    }


def _calibration_error(confidence: np.ndarray, hits: np.ndarray) -> float | None:
    """Return the mean gap between confidence and accuracy over bins of equal width."""
    if not np.isfinite(confidence).all():
        return None
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - hits, minlength=BINS)
    return float(np.abs(gaps).sum() / len(hits))


def survival(
    params: Any,
    images: Array,
    labels: np.ndarray,
    logits: Callable[[Any, Array], np.ndarray],
    seed: int,
) -> Mapping[str, float]:
    """Return the accuracy after rounding, with noise on the weights and on the images.

    Statistics of BatchNorm stay as they are: they are those of the net as trained.

    Args:
      params: Parameters as trained.
      images: f32[N, H, W, C], normalised.
      labels: i32[N].
      logits: Logits f32[N, K] of parameters and images.
      seed: Of the noise.
    """

    def accuracy(params: Any, images: Array) -> float:
        return float(np.mean(logits(params, images).argmax(axis=1) == labels))

    found = {f"{bits} bits": accuracy(rounded(params, bits), images) for bits in BITS}
    # NumPy's: a draw of each new shape would take XLA a second to compile.
    rng = np.random.default_rng(seed)
    for share in WEIGHT_NOISE:
        drawn = [
            accuracy(shaken(params, share, rng), images) for _ in range(NOISE_DRAWS)
        ]
        found[f"weight noise {share:g}"] = float(np.mean(drawn))
    noise = INPUT_NOISE * rng.standard_normal(images.shape, np.float32)
    found[f"input noise {INPUT_NOISE:g}"] = accuracy(params, images + noise)
    return found


def rounded(params: Any, bits: int) -> Any:
    """Return weights rounded to the nearest of 2^bits - 1 levels, symmetric, per layer.

    Biases and the parameters of BatchNorm stay.
    """
    levels = 2 ** (bits - 1) - 1

    def change(w: np.ndarray) -> np.ndarray:
        scale = np.abs(w).max() / levels
        return np.rint(w / scale) * scale if scale > 0 else w

    return _of_weights(change, params)


def shaken(params: Any, share: float, rng: np.random.Generator) -> Any:
    """Return weights with Gaussian noise of a share of each layer's norm."""

    def change(w: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal(w.shape, w.dtype)
        return w + np.float32(share * np.linalg.norm(w) / np.linalg.norm(noise)) * noise

    return _of_weights(change, params)


def _of_weights(change: Callable[[np.ndarray], np.ndarray], params: Any) -> Any:
    return jax.tree.map(
        lambda w: jnp.asarray(change(np.asarray(w)), w.dtype) if w.ndim >= 2 else w,
        params,
    )
