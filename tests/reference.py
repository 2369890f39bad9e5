"""The paper's equations in float64 NumPy, straight from its text.

Algorithm 1 (layer-wise SAM), Eq. 2, Eq. 3 and Eq. 6, on a small network whose gradient
is written out by hand and on a quadratic. Parameters are flat dictionaries from leaf
names to arrays. Nothing here knows JAX or the library.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np


Leaves = dict[str, np.ndarray]
# (params, batch) -> (value, gradient)
ValueAndGrad = Callable[[Leaves, Any], tuple[float, Leaves]]
# Layer name -> the names of its leaves, from the input to the output.
LayersByDepth = Mapping[str, tuple[str, ...]]


# A tanh network with a softmax at its end. The order of the names in the alphabet is
# the reverse of the order from the input to the output, so that no test can pass with
# one taken for the other.
MLP_LAYERS = ("z_in", "m_mid", "a_out")
MLP_SIZES = (4, 6, 5, 3)
WEIGHTS = {name: (f"{name}/kernel",) for name in MLP_LAYERS}
LEAVES = {
    leaf: (leaf,) for name in MLP_LAYERS for leaf in (f"{name}/kernel", f"{name}/bias")
}


def mlp_params(seed: int = 0) -> Leaves:
    """Random weights of the network."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, fan_in, fan_out in zip(
        MLP_LAYERS, MLP_SIZES[:-1], MLP_SIZES[1:], strict=True
    ):
        params[f"{name}/kernel"] = rng.normal(size=(fan_in, fan_out)) / fan_in**0.5
        params[f"{name}/bias"] = 0.1 * rng.normal(size=fan_out)
    return params


def mlp_batches(steps: int, size: int = 8, seed: int = 1) -> list:
    """Random inputs and labels, one pair a step."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(MLP_SIZES[-1], MLP_SIZES[0]))
    batches = []
    for _ in range(steps):
        labels = rng.integers(MLP_SIZES[-1], size=size)
        inputs = centres[labels] + rng.normal(size=(size, MLP_SIZES[0]))
        batches.append((inputs, labels))
    return batches


def mlp_value_and_grad(params: Leaves, batch) -> tuple[float, Leaves]:
    """Mean cross-entropy of the network and its gradient, by hand."""
    inputs, labels = batch
    activations = [inputs]
    for name in MLP_LAYERS[:-1]:
        hidden = activations[-1] @ params[f"{name}/kernel"] + params[f"{name}/bias"]
        activations.append(np.tanh(hidden))
    last = MLP_LAYERS[-1]
    logits = activations[-1] @ params[f"{last}/kernel"] + params[f"{last}/bias"]
    logits = logits - logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    value = -log_probs[rows, labels].mean()

    cotangent = np.exp(log_probs)
    cotangent[rows, labels] -= 1.0
    cotangent /= len(labels)
    grads = {}
    for name, below in zip(reversed(MLP_LAYERS), reversed(activations), strict=True):
        grads[f"{name}/kernel"] = below.T @ cotangent
        grads[f"{name}/bias"] = cotangent.sum(axis=0)
        cotangent = (cotangent @ params[f"{name}/kernel"].T) * (1.0 - below**2)
    return value, grads


def quadratic(matrix: np.ndarray) -> ValueAndGrad:
    """L(w) = 1/2 w.T A w over the leaves laid end to end; its gradient is A w."""

    def value_and_grad(params, batch):
        del batch
        flat = np.concatenate([leaf.ravel() for leaf in params.values()])
        grad = matrix @ flat
        split = np.cumsum([leaf.size for leaf in params.values()])[:-1]
        pieces = np.split(grad, split)
        grads = {
            name: piece.reshape(leaf.shape)
            for (name, leaf), piece in zip(params.items(), pieces, strict=True)
        }
        return 0.5 * float(flat @ grad), grads

    return value_and_grad


class Step(NamedTuple):
    """What one step of Algorithm 1 did."""

    selected: tuple[str, ...]
    value: float
    perturbed_value: float
    grads: Leaves
    norms: dict[str, float]
    params: Leaves
    # The k-th largest norm over the one after it: near 1 the selection is a toss-up.
    gap: float


def norm_of(leaves: Iterable[np.ndarray]) -> float:
    """Euclidean norm of several arrays together."""
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)))


def top_k(norms: Mapping[str, float], k: int) -> tuple[str, ...]:
    """Line 4. `norms` runs from the input to the output; ties go to the deepest."""
    order = list(norms)
    ranked = sorted(order, key=lambda name: (-norms[name], -order.index(name)))
    return tuple(name for name in order if name in ranked[:k])


def _gap(norms: Mapping[str, float], k: int) -> float:
    ranked = sorted(norms.values(), reverse=True)
    if not 0 < k < len(ranked) or ranked[k] == 0.0:
        return np.inf
    return ranked[k - 1] / ranked[k]


def penalized_gradient(
    value_and_grad: ValueAndGrad,
    params: Leaves,
    batch,
    perturbed_leaves: Iterable[str],
    *,
    r: float,
    alpha: float,
    normalize: str = "none",
) -> tuple[float, float, Leaves, Leaves]:
    """Lines 5 to 7: both values, the gradient of Eq. 6, the descent gradient."""
    perturbed_leaves = set(perturbed_leaves)
    value, ascent = value_and_grad(params, batch)
    if normalize == "none":  # Eq. 3
        radius = r
    elif normalize == "selected":  # Eq. 2, over the perturbed leaves
        norm = norm_of(ascent[name] for name in perturbed_leaves)
        radius = r / norm if norm else 0.0
    elif normalize == "full":  # Eq. 2, over all leaves
        norm = norm_of(ascent.values())
        radius = r / norm if norm else 0.0
    else:
        raise ValueError(normalize)
    moved = {
        name: leaf + radius * ascent[name] if name in perturbed_leaves else leaf
        for name, leaf in params.items()
    }
    perturbed_value, descent = value_and_grad(moved, batch)
    mixed = {
        name: (1.0 - alpha) * ascent[name] + alpha * descent[name]
        if name in perturbed_leaves
        else descent[name]
        for name in params
    }
    return value, perturbed_value, mixed, descent


def algorithm_1(
    value_and_grad: ValueAndGrad,
    params: Leaves,
    batches: Iterable,
    layers: LayersByDepth,
    *,
    k: int,
    r: float | Callable[[int], float],
    alpha: float | Callable[[int], float],
    normalize: str = "none",
    learning_rate: float = 0.1,
    momentum: float = 0.0,
    when: Callable[[int], bool] = lambda step: True,
) -> list[Step]:
    """Algorithm 1 with momentum SGD as the base optimizer."""
    norms = dict.fromkeys(layers, 0.0)  # line 2
    velocity = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    steps = []
    for step, batch in enumerate(batches):
        count = k if when(step) else 0
        selected = top_k(norms, count)  # line 4
        gap = _gap(norms, count)
        value, perturbed_value, grads, descent = penalized_gradient(
            value_and_grad,
            params,
            batch,
            [leaf for name in selected for leaf in layers[name]],
            r=r(step) if callable(r) else r,
            alpha=alpha(step) if callable(alpha) else alpha,
            normalize=normalize,
        )
        velocity = {name: momentum * velocity[name] + grads[name] for name in params}
        params = {
            name: leaf - learning_rate * velocity[name] for name, leaf in params.items()
        }
        norms = {  # line 9
            name: norm_of(descent[leaf] for leaf in leaves)
            for name, leaves in layers.items()
        }
        steps.append(Step(selected, value, perturbed_value, grads, norms, params, gap))
    return steps
