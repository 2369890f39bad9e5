"""Each method of the paper is the point on the four axes that its authors describe."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lwsam_jax as lwsam
from lwsam_bench import methods
from lwsam_bench._errors import UserError
from lwsam_bench.cli import _parser
from lwsam_bench.cli_train import train_config
from lwsam_bench.training import make_optimizer, make_schedule, weight_decay_in_loss


NORMS = jnp.array([3.0, 1.0, 2.0, 5.0])


def config(*arguments):
    return train_config(_parser().parse_args(["train", *map(str, arguments)]))


def configure(*arguments):
    return methods.configure(config("--method", *arguments))


def chosen(method, step=0):
    """The layers of `NORMS` that a method perturbs."""
    params = {name: jnp.ones((2, 2)) for name in "wxyz"}
    layers = lwsam.Layers.of(params)
    mask = method.choose(NORMS, jnp.int32(step), layers)
    return "".join(layers.selected(np.asarray(mask)))


def test_sgd_perturbs_nothing():
    assert configure("sgd").is_plain


@pytest.mark.parametrize(
    ("name", "alpha", "normalize", "rho"),
    [
        ("sam", 1.0, "selected", 0.05),
        ("gsam", 0.8, "none", 0.1),
        ("looksam", 1.0, "selected", 0.05),
    ],
)
def test_methods_that_perturb_everything(name, alpha, normalize, rho):
    method = configure(name)
    assert (method.alpha, method.normalize, method.rho) == (alpha, normalize, rho)
    assert method.rule is lwsam.leaves
    assert chosen(method) == "wxyz"


def test_generalised_sam_has_both_forms_of_the_perturbation():
    assert configure("gsam", "--normalize", "selected").normalize == "selected"  # Eq. 2
    assert configure("gsam").normalize == "none"  # Eq. 3


def test_looksam_ascends_now_and_then_and_keeps_a_direction():
    method = configure("looksam", "--every", 2, "--reuse", 0.5)
    assert method.reuse == 0.5
    assert [chosen(method, step) for step in range(4)] == ["wxyz", "", "wxyz", ""]
    always = configure("looksam", "--every", 1)
    assert [chosen(always, step) for step in range(2)] == ["wxyz", "wxyz"]
    assert configure("sam").reuse is None


@pytest.mark.parametrize(("criterion", "layers"), [("high", "wz"), ("low", "xy")])
def test_criteria_go_by_the_norms(criterion, layers):
    assert chosen(configure("lwsam", "--k", 2, "--criterion", criterion)) == layers


def test_random_layers_follow_from_seed_and_step():
    def draw(seed):
        method = configure("lwsam", "--k", 2, "--criterion", "random", "--seed", seed)
        return [chosen(method, step) for step in range(20)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert {len(layers) for layers in draw(0)} == {2}
    assert len(set(draw(0))) > 3


def test_periods_and_budgets():
    method = configure("lwsam", "--k", 1, "--every", 3, "--max-overhead", 0.1)
    assert [chosen(method, step) for step in range(4)] == ["z", "", "", "z"]
    assert method.max_overhead == 0.1
    assert configure("lwsam").when is None
    method = configure("lwsam", "--criterion", "all", "--mean-overhead", 0.5)
    assert method.mean_overhead == 0.5
    assert chosen(method) == "wxyz"
    with pytest.raises(UserError, match="--k has no meaning for --criterion all"):
        configure("lwsam", "--criterion", "all", "--k", 2)


def make_any_optimizer(wanted):
    return make_optimizer(wanted, make_schedule(wanted.lr, 10))


@pytest.mark.parametrize("field", ["method", "criterion", "optimizer"])
def test_unknown_names(field):
    changed = dataclasses.replace(config(), **{field: "none"})
    make = methods.configure if field != "optimizer" else make_any_optimizer
    with pytest.raises(ValueError, match="'none'"):
        make(changed)


def test_adamw_decays_weights_but_not_biases():
    wanted = config("--optimizer", "adamw", "--lr", 0.5, "--weight-decay", 0.1)
    assert weight_decay_in_loss(wanted) == 0.0
    assert weight_decay_in_loss(config("--weight-decay", 0.1)) == 0.1
    optimizer = make_any_optimizer(wanted)
    params = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 2.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)


def test_learning_rate_may_decay_elsewhere_or_never():
    schedule = make_schedule(0.1, 100, (0.5,))
    assert [schedule(s) for s in (49, 50, 99)] == pytest.approx([0.1, 0.01, 0.01])
    constant = make_schedule(0.1, 100, ())
    assert float(constant(jnp.int32(99))) == pytest.approx(0.1)
