"""Training steps without a `TrainStep`, as a user of JAX and Optax would write them.

Each maker returns a jitted `step(state, batch) -> state` that donates its state, which is
`(params, model_state, opt_state)`, and the optimizer's `init`.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib

from lwsam_bench.speed.workloads import Workload


Made = tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]
Optimizer = optax.GradientTransformation


def sgd(workload: Workload) -> Made:
    """Make the plain step: what all others are compared with."""
    return plain(lambda optimizer: optimizer)(workload)


def plain(change: Callable[[Optimizer], Optimizer]) -> Callable[[Workload], Made]:
    """Return a maker of the plain step with another optimizer: one line is changed.

    Args:
      change: Returns it, given the workload's own.
    """

    def make(workload: Workload) -> Made:
        optimizer, gradient = change(workload.optimizer), _gradient(workload)

        def step(state: Any, batch: Any) -> Any:
            params, model_state, opt_state = state
            (_, (model_state, _)), grads = gradient(params, model_state, batch)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), model_state, opt_state

        return jax.jit(step, donate_argnums=0), optimizer.init

    return make


def optax_sam(rho: float) -> Callable[[Workload], Made]:
    """Return a maker of the step of `optax.contrib.sam`, as its documentation has it."""

    def make(workload: Workload) -> Made:
        ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
        optimizer = optax.contrib.sam(workload.optimizer, ascent, opaque_mode=True)
        gradient = _gradient(workload)

        def step(state: Any, batch: Any) -> Any:
            params, old_state, opt_state = state
            (_, (model_state, _)), grads = gradient(params, old_state, batch)
            updates, opt_state = optimizer.update(
                grads,
                opt_state,
                params,
                grad_fn=lambda p, _: gradient(p, old_state, batch)[1],
            )
            return optax.apply_updates(params, updates), model_state, opt_state

        return jax.jit(step, donate_argnums=0), optimizer.init

    return make


def two_gradients(rho: float, alpha: float) -> Callable[[Workload], Made]:
    """Return a maker of generalised SAM's step, without normalisation.

    The gradient is `(1 - alpha) g(w) + alpha g(w + rho g(w))` over all parameters.
    """

    def make(workload: Workload) -> Made:
        optimizer, gradient = workload.optimizer, _gradient(workload)

        def step(state: Any, batch: Any) -> Any:
            params, old_state, opt_state = state
            (_, (model_state, _)), clean = gradient(params, old_state, batch)
            perturbed = jax.tree.map(lambda w, g: w + rho * g, params, clean)
            _, sharp = gradient(perturbed, old_state, batch)
            mix = lambda g, s: (1.0 - alpha) * g + alpha * s
            grads = jax.tree.map(mix, clean, sharp)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), model_state, opt_state

        return jax.jit(step, donate_argnums=0), optimizer.init

    return make


def _gradient(workload: Workload) -> Callable[..., Any]:
    differentiate = jax.value_and_grad(workload.loss_fn, has_aux=True)
    key = jax.random.key(0)  # these networks draw nothing at random
    return lambda params, model_state, batch: differentiate(
        params, model_state, batch, key
    )
