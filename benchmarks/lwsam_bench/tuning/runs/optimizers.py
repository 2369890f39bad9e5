"""Base optimizers whose numbers are data of their state, so that all trials share a step.

Learning rate, weight decay and the number of steps of the schedule lie in the state, as
`optax.inject_hyperparams` keeps them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lwsam_bench.training.config import DECAY_AT


MOMENTUM = 0.9

# Beside `lr`, `weight_decay` and `steps`.
OPTIMIZERS = ("sgd", "nesterov", "ema", "adamw", "nadamw", "amsgrad")


def make(name: str) -> optax.GradientTransformation:
    """Return one of `OPTIMIZERS`, with numbers that are to be replaced.

    Weight decay is of the weights, not of biases and BatchNorm. That of SGD is added to
    the gradient, after the gradient at the perturbed point was taken; AdamW's is its own.
    """
    numbers = {"lr": 1.0, "weight_decay": 0.0, "steps": 1.0}
    if name == "ema":
        return optax.inject_hyperparams(_averaged_sgd)(**numbers, average=0.1)
    return optax.inject_hyperparams(_BUILDERS[name])(**numbers)


def with_numbers(state: Any, config: Mapping[str, Any]) -> Any:
    """Return an optimizer's state with the numbers of a configuration."""
    old = state.hyperparams
    new = {name: jnp.asarray(config[name], old[name].dtype) for name in old}
    return state._replace(hyperparams=new)


def weights_to_use(opt_state: Any, params: Any) -> Any:
    """Return the parameters of a net in use: the averaged ones where they are kept."""
    is_average = lambda x: isinstance(x, Average)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(x)]
    return found[0].average if found else params


class Average(NamedTuple):
    """State of `averaged`: the mean of the parameters, and how many steps there were."""

    average: Any
    count: Array


def averaged(steps: Any) -> optax.GradientTransformation:
    """Return what keeps an exponential mean of the parameters over about so many steps.

    It stands last in a chain. In the first steps it is their plain mean.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new = optax.apply_updates(params, updates)
        share = jnp.maximum(1 / (state.count + 1), 1 / jnp.maximum(steps, 1))
        mean = jax.tree.map(lambda m, w: m + share * (w - m), state.average, new)
        return updates, Average(mean, state.count + 1)

    return optax.GradientTransformation(
        lambda params: Average(params, jnp.zeros((), jnp.int32)), update
    )


def _schedule(lr: Any, steps: Any) -> Callable[[Any], Any]:
    """Return the rate of `training.make_schedule`, of numbers that may be traced."""

    def rate(count: Any) -> Any:
        past = [count >= jnp.maximum(1, jnp.round(at * steps)) for at in DECAY_AT]
        return lr * 0.1 ** sum(x.astype(jnp.float32) for x in past)

    return rate


def _decay(weight_decay: Any) -> optax.GradientTransformation:
    matrices = lambda params: jax.tree.map(lambda w: w.ndim >= 2, params)
    return optax.add_decayed_weights(weight_decay, mask=matrices)


def _sgd(lr: Any, weight_decay: Any, steps: Any, *, nesterov: bool = False) -> Any:
    return optax.chain(
        _decay(weight_decay),
        optax.trace(MOMENTUM, nesterov=nesterov),
        optax.scale_by_learning_rate(_schedule(lr, steps)),
    )


def _adamw(lr: Any, weight_decay: Any, steps: Any, *, nesterov: bool = False) -> Any:
    return optax.chain(
        optax.scale_by_adam(nesterov=nesterov),
        _decay(weight_decay),
        optax.scale_by_learning_rate(_schedule(lr, steps)),
    )


def _amsgrad(lr: Any, weight_decay: Any, steps: Any) -> Any:
    return optax.chain(
        optax.scale_by_amsgrad(),
        _decay(weight_decay),
        optax.scale_by_learning_rate(_schedule(lr, steps)),
    )


def _averaged_sgd(lr: Any, weight_decay: Any, steps: Any, average: Any) -> Any:
    return optax.chain(_sgd(lr, weight_decay, steps), averaged(average * steps))


# Functions of numbers alone: Optax makes all of their arguments data.
_BUILDERS: Mapping[str, Callable[..., Any]] = {
    "sgd": lambda lr, weight_decay, steps: _sgd(lr, weight_decay, steps),
    "nesterov": lambda lr, weight_decay, steps: _sgd(
        lr, weight_decay, steps, nesterov=True
    ),
    "adamw": lambda lr, weight_decay, steps: _adamw(lr, weight_decay, steps),
    "nadamw": lambda lr, weight_decay, steps: _adamw(
        lr, weight_decay, steps, nesterov=True
    ),
    "amsgrad": _amsgrad,
}
