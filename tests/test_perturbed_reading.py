"""What reads and refuses the state of `perturbed`: `eval_params`, `train_params`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from chains import LOSS, PARAMS
from perturbed_task import CHAIN, jitted, kernels_apart, sgd, train
from plain import assert_close, says


# --- eval_params and train_params -----------------------------------------------------


LABELS = {"a_out": "ours", "m_mid": "ours", "z_in": "theirs"}
PLACES = {
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), lwsam.perturbed(sgd(), 0.1)
    ),
    "random": lambda: lwsam.perturbed(sgd(), 0.1, ascent=lwsam.random()),
    "adaptive": lambda: lwsam.perturbed(sgd(), 0.1, shape=lwsam.adaptive()),
    "MultiSteps": lambda: optax.MultiSteps(lwsam.perturbed(sgd(), 0.1), 2),
    "multi_transform, both": lambda: optax.multi_transform(
        {
            "ours": lwsam.perturbed(sgd(), 0.1),
            "theirs": lwsam.momentum_sam(optax.adam(0.1), 0.3),
        },
        LABELS,
    ),
    "multi_transform, one": lambda: optax.multi_transform(
        {"ours": lwsam.perturbed(sgd(), 0.1), "theirs": optax.set_to_zero()}, LABELS
    ),
    "masked": lambda: optax.masked(
        lwsam.perturbed(sgd(), 0.1, ascent=lwsam.previous()),
        {"a_out": True, "m_mid": True, "z_in": False},
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda learning_rate, rho: lwsam.perturbed(
            optax.sgd(learning_rate, momentum=0.9), rho
        )
    )(learning_rate=0.3, rho=0.1),
    "inject_hyperparams of itself": lambda: optax.inject_hyperparams(lwsam.perturbed)(
        sgd(), rho=0.1
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(lwsam.perturbed(sgd(), 0.1), 3),
}


@pytest.mark.parametrize("place", PLACES)
def test_eval_params_finds_the_state_and_train_params_goes_back(place):
    params, state = train(PLACES[place]())
    own = lwsam.eval_params(state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(own, params)
    moved = ("a_out", "m_mid", "z_in")
    if place in ("multi_transform, one", "masked"):
        moved = moved[:2]
    assert kernels_apart(own, params) == moved
    # Relative to the weights, a tenth of each layer but for the other's optimizer.
    for name in moved:
        if (place, name) != ("multi_transform, both", "z_in"):
            gap = jnp.linalg.norm(own[name]["kernel"] - params[name]["kernel"])
            size = jnp.linalg.norm(own[name]["kernel"])
            if place != "adaptive":
                np.testing.assert_allclose(gap, 0.1 * size, rtol=1e-4)
    assert_close(lwsam.train_params(state, own), params)
    under_jit = jax.jit(lwsam.eval_params)(state, params)
    assert_close(under_jit, own)


def test_inside_multi_transform_each_part_is_that_of_its_own_tree():
    """MaskedNodes pass through: as if the others' leaves were not there."""
    grads = jax.grad(LOSS)(PARAMS)
    tx = PLACES["multi_transform, both"]()
    state, params = tx.init(PARAMS), PARAMS
    alone = lwsam.momentum_sam(optax.adam(0.1), 0.3)
    part = {"z_in": PARAMS["z_in"]}
    part_state = alone.init(part)
    update, update_alone = jax.jit(tx.update), jax.jit(alone.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, part_state = update_alone({"z_in": grads["z_in"]}, part_state, part)
        part = optax.apply_updates(part, updates)
    assert_close(params["z_in"], part["z_in"])
    own = lwsam.eval_params(state, params)
    assert_close(own["z_in"], lwsam.eval_params(part_state, part)["z_in"])


def test_multi_steps_around_it_is_the_mean_gradient_at_the_held_point():
    params, state = train(PLACES["MultiSteps"](), 4)
    expected, expected_state = train(lwsam.perturbed(sgd(), 0.1), 2)
    assert_close(params, expected, 1e-5)
    own = lwsam.eval_params(state, params)
    assert_close(own, lwsam.eval_params(expected_state, expected), 1e-5)


def test_an_optimizer_that_is_made_anew_in_each_update_compiles_once():
    """`inject_hyperparams` calls the factory at init and in each update."""
    tx = PLACES["inject_hyperparams"]()
    params, state, step = PARAMS, tx.init(PARAMS), jitted(tx)
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1
    body = lambda carry, _: (step(*carry), None)
    (again, _), _ = jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), length=3)
    assert_close(again, params)


def test_an_injected_radius_is_that_of_the_next_step():
    tx = PLACES["inject_hyperparams"]()
    params, state = train(tx, 2)
    state.hyperparams["rho"] = jnp.float32(0.0)
    params, state = train(tx, 1, params, state)
    chex.assert_trees_all_equal(lwsam.eval_params(state, params), params)


@pytest.mark.parametrize("read", [lwsam.eval_params, lwsam.train_params])
def test_none_or_two_of_one_leaf_or_other_parameters_raise(read):
    state = lwsam.perturbed(sgd(), 0.1).init(PARAMS)
    for tree, params, got in (
        (sgd().init(PARAMS), PARAMS, "none"),
        ({}, PARAMS, "none"),
        ((state, state), PARAMS, "two"),
        (state, {"other": jnp.ones((2, 2))}, "others"),
        (state, PARAMS["z_in"], "others"),
    ):
        with pytest.raises(ValueError, match="perturb|parameters") as error:
            read(tree, params)
        says(error, "opt_state", got)


def test_a_shape_with_a_state_has_no_way_back():
    params, state = train(lwsam.perturbed(sgd(), 0.3, shape=CHAIN), 2)
    own = lwsam.eval_params(state, params)
    with pytest.raises(ValueError, match="Keep the parameters") as error:
        lwsam.train_params(state, own)
    says(error, "opt_state")


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "argument", "words"),
    [
        ({"ascent": lwsam.whole_batch()}, ValueError, "ascent", "TrainStep"),
        ({"ascent": lwsam.micro_batch(0.1)}, ValueError, "ascent", "momentum()"),
        ({"ascent": lambda batch, key: batch}, ValueError, "ascent", "TrainStep"),
        ({"k": 1, "select": lwsam.top_k(1)}, ValueError, "k", "both"),
        ({"k": -1}, ValueError, "k", "-1"),
        ({"k": 1.0}, TypeError, "k", "1.0"),
        ({"rho": -0.1}, ValueError, "rho", "-0.1"),
        ({"rho": float("nan")}, ValueError, "rho", "nan"),
        ({"rho": "0.1"}, TypeError, "rho", "'0.1'"),
        ({"rho": None}, TypeError, "rho", "None"),
        ({"base": 0.1}, TypeError, "base", "0.1"),
        ({"base": optax.sgd}, TypeError, "base", "optax.sgd(0.1, momentum=0.9)"),
        ({"shape": "relative"}, TypeError, "shape", "'relative'"),
        ({"shape": lwsam.relative}, TypeError, "shape", "relative()"),
        ({"ascent": "momentum"}, TypeError, "ascent", "'momentum'"),
        ({"select": "a_out"}, TypeError, "select", "'a_out'"),
        ({"rule": "weights"}, TypeError, "rule", "'weights'"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_right_is_refused_with_the_remedy(
    options, kind, argument, words
):
    options = {"base": sgd(), "rho": 0.1, **options}
    with pytest.raises(kind) as error:
        lwsam.perturbed(**options).init(PARAMS)
    says(error, argument, words)


def test_missing_parameters_raise():
    for rho in (0.1, 0):
        tx = lwsam.perturbed(sgd(), rho)
        with pytest.raises(ValueError, match=r"tx\.update") as error:
            tx.update(PARAMS, tx.init(PARAMS))
        says(error, "params", "None")


def test_more_layers_than_there_are_raises():
    tx = lwsam.perturbed(sgd(), 0.1, k=9)
    with pytest.raises(ValueError, match="a_out") as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    says(error, "k", "9")


@pytest.mark.parametrize("inner", [lwsam.perturbed(sgd(), 0.1), lwsam.sam(0.1)])
def test_a_train_step_does_not_perturb_twice(inner):
    if isinstance(inner, lwsam.Method):
        inner = lwsam.as_optax(inner)
    loss = lambda params, model_state, batch, key: (LOSS(params), (model_state, {}))
    step = lwsam.TrainStep(loss, optax.chain(inner, sgd()), lwsam.sam(0.1))
    with pytest.raises(ValueError, match="TrainStep") as error:
        step.init(PARAMS, {}, jnp.zeros(2), key=jax.random.key(0))
    says(error, "base_optimizer")


def test_gradients_of_another_structure_raise():
    tx = lwsam.perturbed(sgd(), 0.1)
    with pytest.raises(ValueError, match="structure") as error:
        tx.update(PARAMS["z_in"], tx.init(PARAMS), PARAMS)
    says(error, "updates")


# --- keywords -------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.1, 0], ids=["rho 0.1", "rho 0"])
def test_unknown_keywords_are_ignored(rho):
    """Levanter always passes the first three; NNX users pass `value`."""
    tx = lwsam.perturbed(sgd(), rho)
    grads, state = jax.grad(LOSS)(PARAMS), tx.init(PARAMS)
    update = lambda **extra: tx.update(grads, state, PARAMS, **extra)
    extra = {"obj_fn": LOSS, "loss": 1.0, "grams": None, "value": 1.0, "unheard_of": 3}
    chex.assert_trees_all_equal(update(**extra)[0], update()[0])


def test_the_value_reaches_a_base_that_wants_it():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    tx = lwsam.perturbed(optax.chain(sgd(), plateau), 0.1)
    grads, state = jax.grad(LOSS)(PARAMS), tx.init(PARAMS)
    update = jax.jit(lambda state, value: tx.update(grads, state, PARAMS, value=value))
    for _ in range(5):
        _, state = update(state, 1.0)
    assert float(optax.tree.get(state, "scale")) < 1.0
