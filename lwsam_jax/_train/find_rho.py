"""A short sweep that proposes a radius, or none."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks


_WHO = "find_rho"
_WORST = -1e300  # a score below all others, whose differences are finite
_TAME = 9  # times the usual variance
_LADDER = 3  # radii on each side of that of the state, each twice the one before


class Trial(NamedTuple):
    """What a radius came to when the sweep looked at it.

    Attributes:
      rho: The radius.
      steps: Steps that it had been trained for.
      scores: What `validate` returned, one for each repeat.
    """

    rho: float
    steps: int
    scores: tuple[float, ...]


class FoundRho(NamedTuple):
    """What `find_rho` proposes, and what that is worth.

    Attributes:
      rho: The radius; 0 where none was better than 0 by more than the noise.
      gain: Mean score of the best radius over that of 0, over the repeats and the times
        in the second half; above 0 is better, whatever `maximize` says.
      noise: Standard error of that gain: by what is left of the scores of all radii that
        were compared at a time, once the means of each radius and of each repeat are
        taken out; the largest of these times. Radii that vary much more do not count.
      trials: Every radius at every time when it was validated.
      steps: Steps that the sweep trained, of all radii together.
      gradients: The same in plain gradients, by `info.overhead`; None if steps report
        none.
      why: The proposal and its reason, in words.
    """

    rho: float
    gain: float
    noise: float
    trials: tuple[Trial, ...]
    steps: int
    gradients: float | None
    why: str


def find_rho(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batches: Iterable[Any] | Callable[[int], Iterable[Any]],
    validate: Callable[..., float],
    *,
    steps: int,
    rhos: Sequence[float] | None = None,
    repeats: int = 3,
    rungs: int = 3,
    confidence: float = 2.5,
    maximize: bool = True,
) -> FoundRho:
    """Proposes a radius by a few short trainings, by successive halving.

    All radii, and 0, are trained from the same state on the same batches. At each of
    the rungs (after 1/4, 1/2 and all of the steps, if there are three) the better half
    goes on, and 0 always does. The best one is proposed if over the repeats, and over the
    rungs from half of the steps on, its score is better than that of 0 by more than
    `confidence` standard errors of their difference, and at the end no worse; else 0 is.
    The radius is data of the state, so that nothing compiles again.

    The sweep holds a state for each radius and repeat at a time. It sees a training of
    `steps` steps: where a method helps late, as under label noise, let it be as long as
    the training will be.

    Args:
      step: `(state, batch) -> (state, info)`: a `TrainStep`, or a jitted step of a loop
        whose state holds that of `as_optax` or `perturbed`.
      state: Where all begin. It is not donated, and its radius is the middle of the
        ladder.
      batches: Batches that can be gone through anew, an iterator, or a function of the
        repeat's number to some. What ends is begun again.
      validate: `(state) -> score` or `(state, repeat) -> score`, a number, of validation
        data. With the repeat's number it can hold out other examples for each, which
        `batches(repeat)` leaves out: then more of them are seen, and the noise has
        theirs. For `perturbed` evaluate `eval_params`. Not finite is worst.
      steps: Steps of the longest training, at least one for each rung.
      rhos: The radii to try, above 0; None: seven, each twice the one before, with that
        of the state in the middle.
      repeats: Trainings of each radius, >= 2, each with its own batches; where the state
        has a `key`, with its own key.
      rungs: How often the radii are compared, >= 1.
      confidence: How many standard errors a gain must have, >= 0. The best of several
        radii is ahead by one and a half where none is better; at 2.5 one sweep in
        thirty proposes such a one.
      maximize: Whether a higher score is better.

    Returns:
      A `FoundRho`.

    Raises:
      ValueError: For numbers out of range, a state without a radius that can be set, no
        batch.
      TypeError: For arguments of the wrong kind.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, lwsam_jax as lwsam
      >>> def loss_fn(params, model_state, batch, key):
      ...     return jnp.mean((batch @ params["w"] - 1) ** 2), (model_state, {})
      >>> batch = jnp.linspace(-1, 1, 8).reshape(4, 2)
      >>> step = lwsam.TrainStep(loss_fn, optax.sgd(0.1), lwsam.sam(0.1))
      >>> state = step.init({"w": jnp.ones((2, 1))}, {}, batch, key=jax.random.key(0))
      >>> validate = lambda s: -loss_fn(s.params, {}, batch, None)[0]
      >>> found = lwsam.find_rho(step, state, [batch], validate, steps=8)
      >>> found.rho in (0.0, *(t.rho for t in found.trials)), found.steps
      (True, 114)
    """
    for name, function in (("step", step), ("validate", validate)):
        remedy = "Pass a TrainStep, and a function of its state to a number."
        _checks.is_callable(_WHO, name, function, remedy)
    _at_least("rungs", rungs, 1, "3 compares three times.")
    _at_least("repeats", repeats, 2, "Without a second one there is no noise to see.")
    _at_least("steps", steps, rungs, "Pass the steps of the longest training.")
    _checks.non_negative(
        _WHO, "confidence", confidence, "2.5 asks for 2.5 standard errors."
    )
    radii = _ladder(state) if rhos is None else _given(rhos)
    sweep = _Sweep(step, batches, validate, 1.0 if maximize else -1.0)
    runs = [[_start(state, rho, r) for r in range(repeats)] for rho in (0.0, *radii)]
    alive, trials, done = [0.0, *radii], [], 0
    spread, late = 0.0, []
    for rung in range(rungs):
        until = max(steps * 2**rung // 2 ** (rungs - 1), rung + 1)
        scores = sweep.train(runs, until - done)
        done = until
        kept = _better_half(scores) if rung < rungs - 1 else [*range(len(alive))]
        spread = max(spread, _spread(scores))
        if 2 * done >= steps:
            late.append(dict(zip(alive, scores, strict=True)))
        trials += [
            Trial(rho, done, tuple((sweep.sign * row).tolist()))
            for rho, row in zip(alive, scores, strict=True)
        ]
        alive, runs = [alive[i] for i in kept], [runs[i] for i in kept]
    best, gain = _best(np.mean([[at[rho] for rho in alive] for at in late], axis=0))
    noise = math.sqrt(spread / repeats)
    stays = _best(np.stack([late[-1][0.0], late[-1][alive[best]]]))[1] >= 0
    is_large = gain > confidence * noise and math.isfinite(gain)
    asked = "gone at the end" if is_large else f"not {confidence:.3g} standard errors"
    is_better = is_large and stays
    why = _why(alive[best], gain, noise, asked, is_better, radii, sweep, done)
    return FoundRho(
        rho=alive[best] if is_better else 0.0,
        gain=gain,
        noise=noise,
        trials=tuple(trials),
        steps=sweep.steps,
        gradients=sweep.gradients,
        why=why,
    )


class _Sweep:
    """Trains runs side by side, and counts."""

    def __init__(self, step: Any, batches: Any, validate: Any, sign: float) -> None:
        self._step, self._batches = step, batches
        self._validate = _of_repeat(validate)
        self.sign, self.steps = sign, 0
        self.gradients: float | None = 0.0
        self._open: dict[int, Iterator[Any]] = {}

    def train(self, runs: list[list[Any]], steps: int) -> np.ndarray:
        """Trains each run, in place, and returns f64[runs, repeats], higher is better."""
        overheads = []
        for repeat in range(len(runs[0])):
            for _ in range(steps):
                batch = self._next(repeat)
                for row in runs:
                    row[repeat], info = self._step(row[repeat], batch)
                    overheads.append(getattr(info, "overhead", None))
        self.steps += len(overheads)
        if any(x is None for x in overheads):
            self.gradients = None
        elif self.gradients is not None:
            self.gradients += len(overheads) + float(np.sum(jax.device_get(overheads)))
        score = lambda repeat, s: self.sign * float(self._validate(s, repeat))
        scores = [[score(*numbered) for numbered in enumerate(row)] for row in runs]
        return np.where(np.isfinite(scores), scores, -np.inf)

    def _next(self, repeat: int) -> Any:
        """Returns the next batch of a repeat, from the start again where they end."""
        for _ in range(2):
            if repeat not in self._open:
                is_function = callable(self._batches)
                given: Any = self._batches
                self._open[repeat] = iter(given(repeat) if is_function else given)
            for batch in self._open[repeat]:
                return batch
            del self._open[repeat]
        remedy = "Pass batches that can be gone through anew, or an iterator with more."
        raise _checks.value_error(_WHO, "batches", "enough of them", "no more", remedy)


def _of_repeat(validate: Callable[..., float]) -> Callable[[Any, int], float]:
    """Returns a score as a function of two: as given, if one argument is not enough."""
    with contextlib.suppress(ValueError):  # no signature to read
        try:
            inspect.signature(validate).bind(None)
        except TypeError:
            return validate
    return lambda state, repeat: validate(state)


def _at_least(name: str, x: Any, least: int, remedy: str) -> None:
    _checks.count(_WHO, name, x, remedy)
    if x < least:
        raise _checks.value_error(_WHO, name, f">= {least}", x, remedy)


def _given(rhos: Sequence[float]) -> list[float]:
    remedy = "Pass the radii to try, such as (0.02, 0.05, 0.1); 0 is there by itself."
    radii = sorted({float(rho) for rho in rhos})
    if not radii or not all(math.isfinite(rho) and rho > 0 for rho in radii):
        raise _checks.value_error(_WHO, "rhos", "finite and > 0", repr(rhos), remedy)
    return radii


def _ladder(state: Any) -> list[float]:
    """Returns radii around that of the state."""
    found: list[float] = []
    _each_rho(state, lambda rho: found.append(float(jnp.ravel(rho)[0])) or rho)
    if not found[0] > 0:
        remedy = "Pass rhos=, or a state whose radius is above 0 by now."
        raise _checks.value_error(_WHO, "rhos", "given", "none", remedy)
    return [found[0] * 2.0**i for i in range(-_LADDER, _LADDER + 1)]


def _each_rho(state: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a state with another radius wherever one can be set; raises on none."""
    seen = 0

    def is_ours(node):
        settable = getattr(node, "hyperparams", None)
        return hasattr(node, "_fields") and isinstance(settable, dict)

    def set_in(node):
        nonlocal seen
        if not is_ours(node) or "rho" not in node.hyperparams:
            return node
        seen += 1
        rho = change(node.hyperparams["rho"])
        return node._replace(hyperparams={**node.hyperparams, "rho": rho})

    changed = jax.tree.map(set_in, state, is_leaf=is_ours)
    if not seen:
        remedy = (
            "Pass a state of TrainStep, as_optax or perturbed, of a method whose rho is "
            "a number above 0 and no schedule; a Python 0 is static."
        )
        got = "one without"
        raise _checks.value_error(_WHO, "state", "one with a radius", got, remedy)
    return changed


def _start(state: Any, rho: float, repeat: int) -> Any:
    """Returns a copy of the state with a radius, and with a key of its own."""
    copy = lambda x: x.copy() if isinstance(x, jax.Array) else x
    state = jax.tree.map(copy, state)
    state = _each_rho(state, lambda old: jnp.full_like(old, rho))
    if hasattr(state, "_replace") and hasattr(state, "key"):
        state = state._replace(key=jax.random.fold_in(state.key, repeat))
    return state


def _better_half(scores: np.ndarray) -> list[int]:
    """Returns 0 and the better half of the others, in their order."""
    means = scores[1:].mean(axis=1)
    count = -(-len(means) // 2)
    best = np.argsort(-means, kind="stable")[:count] + 1
    return [0, *sorted(best.tolist())]


def _gaps(scores: np.ndarray) -> np.ndarray:
    """Returns f64[radii, repeats], what each radius has over 0 in the same repeat."""
    if not np.isfinite(scores[0]).all():  # the base itself diverged
        scores = np.where(np.isfinite(scores), scores, _WORST)
    return scores[1:] - scores[0]


def _spread(scores: np.ndarray) -> float:
    """Returns the variance of the difference of two radii in one repeat.

    Twice the residual of a table of radii and repeats: what is common to a radius, and
    what is common to a repeat, its batches, is taken out.
    """
    known = scores[np.isfinite(scores).all(axis=1)]
    if len(known) < 2:
        return 0.0
    known = known - known.mean(axis=1, keepdims=True)
    sizes = ((known - np.median(known, axis=0)) ** 2).sum(axis=1)
    if 0 < np.median(sizes):  # where training collapses now and then is another noise
        known = known[sizes <= _TAME * np.median(sizes)]
    rest = known - known.mean(axis=0)
    return 2 * float((rest**2).sum()) / ((len(known) - 1) * (known.shape[1] - 1))


def _best(scores: np.ndarray) -> tuple[int, float]:
    """Returns the best radius' place, and its mean gain over 0."""
    means = _gaps(scores).mean(axis=1)
    best = int(np.argmax(means))
    return best + 1, float(means[best])


def _why(
    rho: float,
    gain: float,
    noise: float,
    asked: str,
    is_better: bool,
    radii: list[float],
    sweep: _Sweep,
    steps: int,
) -> str:
    cost, price = f"{sweep.steps} steps", sweep.gradients
    cost += "" if price is None else f", {price:.0f} plain gradients"
    seen = f"{gain:+.4g} over 0, with a standard error of {noise:.2g},"
    when = f"in the second half of {steps} steps"
    if not is_better:
        return (
            f"0: the best radius, {rho:.4g}, was {seen} {when}, which is {asked}. "
            f"The sweep took {cost}."
        )
    is_end = rho in (radii[0], radii[-1])
    edge = " It is the end of the ladder: try further." if is_end else ""
    return f"{rho:.4g}: {seen} {when}.{edge} The sweep took {cost}."
