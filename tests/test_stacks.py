"""The recipes of docs/stacks.md: what they train is what a plain loop trains.

The stacks themselves are not installed. Each step calls the optimizer as that of the
stack does, and passes what that passes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from plain import assert_close


STEPS = 4
RNG = np.random.default_rng(0)
PARAMS = {
    "embed": {"kernel": jnp.asarray(RNG.normal(size=(4, 6)) * 0.5, jnp.float32)},
    "mlp": {
        "kernel": jnp.asarray(RNG.normal(size=(6, 6)) * 0.5, jnp.float32),
        "bias": jnp.zeros(6),
    },
    "head": {"kernel": jnp.asarray(RNG.normal(size=(6, 2)) * 0.5, jnp.float32)},
}
BATCHES = [jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32) for _ in range(STEPS)]


def loss_of(params, x):
    h = jnp.tanh(x @ params["embed"]["kernel"])
    h = jnp.tanh(h @ params["mlp"]["kernel"] + params["mlp"]["bias"])
    return jnp.mean((h @ params["head"]["kernel"] - 1.0) ** 2)


def of_train_step(method, optimizer):
    """The parameters that a `TrainStep` finds."""

    def loss_fn(params, model_state, batch, key):
        return loss_of(params, batch), (model_state, {})

    step = lwsam.TrainStep(loss_fn, optimizer, method)
    state = step.init(PARAMS, {}, BATCHES[0], key=jax.random.key(0))
    for batch in BATCHES:
        state, _ = step(state, batch)
    return state.params


def run(step, params, opt_state: Any) -> tuple[Any, Any]:
    step = jax.jit(step)
    for x in BATCHES:
        params, opt_state = step(params, opt_state, x)
    return params, opt_state


# --- MaxText --------------------------------------------------------------------------


def get_optimizer(opt_type, schedule, rho):
    base = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1)
    if opt_type == "adamw":
        return base
    if opt_type == "rwp":
        return lwsam.perturbed(base, lwsam.rwp(rho))
    return lwsam.perturbed(base, rho, shape=lwsam.relative())


def maxtext(opt_type, rho, frozen=(), spikes=True):
    schedule = optax.warmup_constant_schedule(0.0, 0.02, 2)
    label = lambda path, _: "frozen" if path[0].key in frozen else "trained"
    labels = jax.tree_util.tree_map_with_path(label, PARAMS)
    inner = get_optimizer(opt_type, schedule, rho)
    tx = optax.multi_transform(
        {"trained": inner, "frozen": optax.set_to_zero()}, labels
    )

    def step(params, opt_state, x):
        loss, grads = jax.value_and_grad(loss_of)(params, x)
        norm = optax.tree.norm(grads)
        extra = {"loss": loss, "grad_norm": norm} if spikes else {}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    return run(step, PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("opt_type", ["momentum_sam", "rwp"])
def test_maxtext_freezes_around_a_method_that_needs_no_second_gradient(opt_type):
    held, opt_state = maxtext(opt_type, 0.1, frozen=("embed",))
    own = lwsam.eval_params(opt_state, held)
    for params in (held, own):
        np.testing.assert_array_equal(
            params["embed"]["kernel"], PARAMS["embed"]["kernel"]
        )
    for name in ("mlp", "head"):
        gap = np.abs(held[name]["kernel"] - own[name]["kernel"]).max()
        assert gap > 1e-3
    assert float(loss_of(own, BATCHES[0])) < float(loss_of(PARAMS, BATCHES[0]))


def test_maxtext_without_a_radius_is_its_own_adamw():
    ours, _ = maxtext("momentum_sam", 0.0, frozen=("embed",))
    theirs, _ = maxtext("adamw", 0.0, frozen=("embed",))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_maxtext_need_not_pass_what_it_passes_for_spikes():
    with_it, _ = maxtext("momentum_sam", 0.1)
    without, _ = maxtext("momentum_sam", 0.1, spikes=False)
    assert_close(with_it, without, 1e-6)


def test_maxtext_finds_what_one_momentum_in_a_train_step_finds():
    """But for the gradient at the start, which a fresh momentum does not move."""
    held, opt_state = maxtext("momentum_sam", 0.1)
    method = lwsam.Method(
        lwsam.everything(), rho=0.1, ascent=lwsam.momentum(), shape=lwsam.relative()
    )
    schedule = optax.warmup_constant_schedule(0.0, 0.02, 2)
    base = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1)
    expected = of_train_step(method, base)
    assert_close(lwsam.eval_params(opt_state, held), expected, 1e-4)


# --- Levanter -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SamConfig:
    learning_rate: float = 0.05
    rho: float = 0.1

    def build(self, num_train_steps):
        def optimizer(learning_rate, rho):
            base = optax.sgd(learning_rate, momentum=0.9)
            return optax.chain(lwsam.as_optax(lwsam.sam(rho)), base)

        rate = optax.cosine_decay_schedule(self.learning_rate, num_train_steps)
        return optax.inject_hyperparams(optimizer)(learning_rate=rate, rho=self.rho)


def test_levanter_passes_obj_fn_and_gets_sam():
    tx = SamConfig().build(10)

    def step(params, opt_state, x):
        obj_fn = lambda p: loss_of(p, x)
        loss, grads = jax.value_and_grad(obj_fn)(params)
        extra = {"obj_fn": obj_fn, "loss": loss, "grams": None}
        updates, opt_state = tx.update(grads, opt_state, params=params, **extra)
        return optax.apply_updates(params, updates), opt_state

    state: Any = tx.init(PARAMS)
    found, opt_state = run(step, PARAMS, state)
    rate = optax.cosine_decay_schedule(0.05, 10)
    expected = of_train_step(lwsam.sam(0.1), optax.sgd(rate, momentum=0.9))
    assert_close(found, expected, 1e-5)
    assert float(opt_state.hyperparams["rho"]) == pytest.approx(0.1)


# --- kauldron -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class State:
    params: Any
    opt_state: Any


class UseEvalParams:
    def transform(self, state):
        own = lwsam.eval_params(state.opt_state, state.params)
        return dataclasses.replace(state, params=own)


def test_kauldron_finds_the_evaluation_weights_in_the_state():
    tx = optax.named_chain(
        ("clip", optax.clip_by_global_norm(10.0)),
        ("sam", lwsam.momentum_sam(optax.sgd(0.05, momentum=0.9), rho=0.3)),
    )

    def step(params, opt_state, x):
        grads = jax.grad(loss_of)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = State(*run(step, PARAMS, tx.init(PARAMS)))
    found = UseEvalParams().transform(state)
    method = lwsam.sam(0.3, ascent=lwsam.momentum())
    expected = of_train_step(method, optax.sgd(0.05, momentum=0.9))
    assert_close(found.params, expected, 1e-5)
    plain = State(PARAMS, optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="one of `perturbed`"):
        UseEvalParams().transform(plain)


# --- nnx.Optimizer --------------------------------------------------------------------


def test_nnx_takes_a_loss_of_the_model_by_one_wrapper():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self):
            self.embed = nnx.Linear(4, 6, use_bias=False, rngs=nnx.Rngs(0))
            self.mlp = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(6, 2, use_bias=False, rngs=nnx.Rngs(0))
            for name, leaves in PARAMS.items():
                for leaf, value in leaves.items():
                    setattr(getattr(self, name), leaf, nnx.Param(value))

        def __call__(self, x):
            return self.head(jnp.tanh(self.mlp(jnp.tanh(self.embed(x)))))

    def of_params(model, loss):
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)
        return lambda p: loss(nnx.merge(graphdef, p, rest, copy=True))

    model = Net()
    base = optax.sgd(0.05, momentum=0.9)
    tx = optax.chain(lwsam.as_optax(lwsam.sam(0.1)), base)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: jnp.mean((model(x) - 1.0) ** 2)
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, value=value, value_fn=of_params(model, loss))

    for x in BATCHES:
        step(model, optimizer, x)
    expected = of_train_step(lwsam.sam(0.1), base)
    found = {
        name: {leaf: getattr(getattr(model, name), leaf)[...] for leaf in leaves}
        for name, leaves in PARAMS.items()
    }
    assert_close(found, expected, 1e-5)
