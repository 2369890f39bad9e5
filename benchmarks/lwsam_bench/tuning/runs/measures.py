"""What a trained net is judged by: accuracy, loss, calibration, and what it survives."""

from collections.abc import Callable, Sequence
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
CONTRAST = 0.5  # of what it was
BRIGHTNESS = 0.5  # more, in standard deviations of a pixel
DROPPED = 0.2  # of the pixels


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


def mean(judged: Sequence[Row]) -> Row:
    """Return the mean of what `judge` found of several tasks, and each accuracy.

    Of one task that is what was found.
    """
    if len(judged) == 1:
        return judged[0]

    def of(name: str) -> float | None:
        values = [row[name] for row in judged]
        return None if None in values else float(np.mean(values))

    return {
        **{name: of(name) for name in judged[0]},
        "parts": [row["accuracy"] for row in judged],
    }


def of_weights(
    params: Any, score: Callable[[Any], float | None], rng: np.random.Generator
) -> dict[str, float | None]:
    """Return the score after rounding, and with noise on the weights.

    Statistics of BatchNorm stay as they are: they are those of the net as trained.

    Args:
      params: Parameters as trained.
      score: Of parameters: accuracy, or whatever counts.
      rng: Of the noise. NumPy's: a draw of each new shape would take XLA a second to
        compile.
    """
    found = {f"{bits} bits": score(rounded(params, bits)) for bits in BITS}
    for share in WEIGHT_NOISE:
        drawn = [score(shaken(params, share, rng)) for _ in range(NOISE_DRAWS)]
        some = [x for x in drawn if x is not None]
        found[f"weight noise {share:g}"] = (
            float(np.mean(some)) if len(some) == len(drawn) else None
        )
    return found


def changed(images: Array, rng: np.random.Generator) -> dict[str, Array]:
    """Return the images with noise, blurred, paler, brighter, with pixels dropped.

    As in Hendrycks and Dietterich (2019), made simple enough for 8 x 8 pixels: Gaussian
    noise; the mean of 3 x 3 pixels with binomial weights; half the contrast about the
    mean of each image; all pixels brighter; a share of the pixels at the mean of all
    images.

    Args:
      images: f32[N, H, W, C], normalised.
      rng: Of noise and pixels.
    """
    x = np.asarray(images)
    noise = INPUT_NOISE * rng.standard_normal(x.shape, np.float32)
    kept = rng.random((*x.shape[:3], 1)) >= DROPPED
    middle = x.mean(axis=(1, 2), keepdims=True)
    made = {
        f"input noise {INPUT_NOISE:g}": x + noise,
        "blur": _blurred(_blurred(x, axis=1), axis=2),
        f"contrast {CONTRAST:g}": middle + CONTRAST * (x - middle),
        f"brightness {BRIGHTNESS:g}": x + np.float32(BRIGHTNESS),
        f"{DROPPED:.0%} of the pixels": x * kept,
    }
    return {name: jnp.asarray(y, images.dtype) for name, y in made.items()}


def _blurred(x: np.ndarray, axis: int) -> np.ndarray:
    """Return pixels and their neighbours along an axis, with weights 1/4, 1/2, 1/4."""
    width = [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)]
    padded = np.moveaxis(np.pad(x, width, mode="edge"), axis, 0)
    blurred = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return np.moveaxis(blurred, 0, axis)


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
