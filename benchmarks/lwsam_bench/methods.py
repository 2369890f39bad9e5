"""The methods that are compared, each a point on the four axes of `LayerwiseSAM`."""

from typing import Any

import lwsam_jax as lwsam
from lwsam_bench.config import TrainConfig


def configure(config: TrainConfig) -> lwsam.LayerwiseSAM:
    """Return the method of a run."""
    # LookSAM with an ascent in every step has a predicate, too: it asks for one.
    periodic = config.every > 1 or config.method == "looksam"
    return make_method(
        config.method,
        k=config.k,
        rho=config.rho,
        alpha=config.alpha,
        normalize=config.normalize,
        seed=config.seed,
        when=lwsam.every(config.every) if periodic else None,
        criterion=config.criterion,
        reuse=config.reuse,
        max_overhead=config.max_overhead,
        mean_overhead=config.mean_overhead,
    )


def make_method(
    method: str,
    *,
    k: int,
    rho: Any,
    alpha: Any,
    normalize: str,
    seed: int = 0,
    when: Any = None,
    criterion: str = "high",
    reuse: float = 0.0,
    max_overhead: float | None = None,
    mean_overhead: float | None = None,
) -> lwsam.LayerwiseSAM:
    """Return the library's configuration of a method.

    SAM, generalised SAM and LookSAM perturb every parameter, so that `k` and `criterion`
    are for `lwsam` alone; they differ in `alpha`, and in what LookSAM does in the steps
    between two ascents.

    Args:
      method: One of `config.METHODS`.
      k: Layers that `lwsam` perturbs.
      rho: Radius, a float or a schedule.
      alpha: Weight of the perturbed gradient, a float or a schedule.
      normalize: As of `lwsam.LayerwiseSAM`.
      seed: Of the layers drawn at random.
      when: Predicate of the steps that ascend.
      criterion: One of `config.CRITERIA`.
      reuse: Weight of the direction that `looksam` keeps for the other steps.
      max_overhead: Bound on the price of a step of `lwsam`.
      mean_overhead: Bound on the price of its mean step.
    """
    common = dict(rho=rho, alpha=alpha, normalize=normalize, seed=seed, when=when)
    everything = dict(select=lwsam.everything(), rule=lwsam.leaves)
    match method:
        case "sgd":
            return lwsam.LayerwiseSAM(k=0, rho=0.0, alpha=1.0)
        case "sam" | "gsam":
            return lwsam.LayerwiseSAM(**everything, **common)
        case "looksam":
            return lwsam.LayerwiseSAM(**everything, **common, reuse=reuse)
        case "lwsam":
            return lwsam.LayerwiseSAM(
                **_selection(criterion, k),
                **common,
                max_overhead=max_overhead,
                mean_overhead=mean_overhead,
            )
    raise ValueError(f"`make_method`: unknown method {method!r}")


def _selection(criterion: str, k: int) -> dict[str, Any]:
    match criterion:
        case "high":
            return {"k": k}
        case "low":
            return {"select": lwsam.bottom_k(k)}
        case "random":
            return {"select": lwsam.random_k(k)}
        case "all":
            return {"select": lwsam.everything()}
    raise ValueError(f"`make_method`: unknown criterion {criterion!r}")
