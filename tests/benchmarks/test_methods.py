"""Each method is the point on the axes that its authors describe; so are the options."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
import tiny_task
from lwsam_bench.commands.cli import _parser
from lwsam_bench.commands.train import train_config
from lwsam_bench.support.errors import UserError
from lwsam_bench.training import methods
from lwsam_bench.training.config import (
    ASCENTS,
    FAMILY,
    METHODS,
    NORMALIZE,
    OWN_DIRECTION,
    SHAPES,
    STALE,
)
from lwsam_bench.training.family import Facts, reads_losses
from lwsam_bench.training.recipe import (
    make_loss_fn,
    make_optimizer,
    make_schedule,
    make_step,
    weight_decay_in_loss,
)


NORMS = jnp.array([3.0, 1.0, 2.0, 5.0])
PARAMS = {name: jnp.ones((2, 2)) for name in "wxyz"}
LAYERS = lwsam.Layers.of(PARAMS)


def config(*arguments):
    return train_config(_parser().parse_args(["train", *map(str, arguments)]))


def configure(*arguments):
    return methods.configure(config("--method", *arguments), total_steps=10)


def chosen(method, step=0):
    """The layers of `NORMS` that a method perturbs."""
    mask = method.choose(NORMS, jnp.int32(step), LAYERS)
    return "".join(LAYERS.selected(np.asarray(mask)))


def length(method):
    """How far a method moves along a direction of norm 16, from weights of norm 4."""
    direction = jax.tree.map(lambda w: 4.0 * w, PARAMS)
    state = method.shape.init(PARAMS)
    mask = jnp.ones(len(LAYERS), bool)
    moved, _ = method.shape.update(direction, state, PARAMS, layers=LAYERS, mask=mask)
    return float(optax.tree.norm(moved))


def test_sgd_perturbs_nothing():
    assert configure("sgd").is_plain


@pytest.mark.parametrize(
    ("name", "rho", "alpha", "expected"),
    [
        ("sam", 0.05, None, 1.0),
        ("generalized_sam", 0.1, 0.8, 16.0),
        ("looksam", 0.05, None, 1.0),
        ("asam", 0.5, None, None),
        ("gsam", 0.1, 0.4, 1.0),
        ("friendly_sam", 0.1, None, 1.0),
        ("perturbed", 0.1, None, 4.0),
        ("momentum_sam", 3.0, None, 1.0),
    ],
)
def test_methods_that_perturb_everything(name, rho, alpha, expected):
    method = configure(name)
    assert (method.rho, method.combine.alpha) == (rho, alpha)
    assert method.rule is (lwsam.weights if name == "perturbed" else lwsam.leaves)
    assert chosen(method) == "wxyz"
    if expected:
        assert length(method) == pytest.approx(expected)


def test_generalised_sam_has_both_forms_of_the_perturbation():
    assert length(configure("generalized_sam", "--normalize", "selected")) == 1  # Eq. 2
    assert length(configure("generalized_sam")) == 16  # Eq. 3


def test_looksam_ascends_now_and_then_and_keeps_a_direction():
    method = configure("looksam", "--every", 2, "--reuse", 0.5)
    assert [chosen(method, step) for step in range(4)] == ["wxyz", "", "wxyz", ""]
    one, other = jnp.array([2.0, 0.0]), jnp.array([0.0, 3.0])
    (found,) = method.combine.otherwise((one,), (other,))
    np.testing.assert_allclose(found, [2.0, 0.5 * 2.0])
    always = configure("looksam", "--every", 1)
    assert [chosen(always, step) for step in range(2)] == ["wxyz", "wxyz"]
    assert configure("sam").combine.otherwise is None


def test_normalization_layers_alone():
    method = configure("sam_on")
    params = {"conv": jnp.ones((2, 2)), "bn1": {"scale": jnp.ones(2)}}
    layers = lwsam.Layers.of(params, method.rule)
    mask = method.choose(jnp.ones(2), jnp.int32(0), layers)
    assert layers.selected(np.asarray(mask)) == ("bn1/scale",)


def test_esam_drops_tensors_and_images():
    method = configure("esam")
    assert method.descent.fraction == 0.5
    assert len({chosen(method, step) for step in range(8)}) > 1


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_trains_by_its_names(name):
    task = tiny_task.make()
    loss_fn = make_loss_fn(task.network, per_example=reads_losses(name))
    wanted = config("--method", name, *(("--k", 2) if name == "sl_sam" else ()))
    step, _ = make_step(wanted, loss_fn, 10, **task.facts())
    network = task.network
    several = [task.batches(number) for number in range(4)]
    batch = jax.tree.map(lambda *xs: np.concatenate(xs)[:16], *several)
    state = step.init(network.params, network.model_state, batch, key=jax.random.key(0))
    for _ in range(2):
        state, info = step(state, batch)
        assert info.finite
    assert name == "ae_sam" or float(info.rho) == pytest.approx(wanted.rho)


def test_what_weighs_classes_wants_some():
    with pytest.raises(UserError, match="classes"):
        configure("focal_sam")
    with pytest.raises(UserError, match="--every has no meaning for --method ae_sam"):
        config("--method", "ae_sam", "--every", 2)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("raw", 16.0),
        ("normalized", 1.0),
        ("normalized_all", 1.0),
        ("relative", 4.0),
        ("relative_filter", 4.0),
    ],
)
@pytest.mark.parametrize("name", ["sam", "lwsam", "momentum_sam"])
def test_shapes(name, shape, expected):
    method = configure(name, "--shape", shape, "--rho", 0.3)
    assert length(method) == pytest.approx(expected)


def test_one_shape_has_one_name():
    """Runs that are equal have equal configurations."""
    for name, shape in NORMALIZE.items():
        one = config("--rho", 0.1, "--normalize", name)
        assert config("--rho", 0.1, "--shape", shape) == one
    assert config("--rho", 0.1, "--shape", "relative").normalize == "none"


def test_ascents():
    for name, ascent in (
        ("whole_batch", lwsam.whole_batch()),
        ("previous", lwsam.previous()),
        ("momentum", lwsam.momentum()),
        ("random", lwsam.random()),
    ):
        assert configure("sam", "--ascent", name, "--rho", 0.1).ascent == ascent
    tenth = config("--ascent", "micro_batch")
    assert (tenth.fraction, config().fraction) == (0.1, None)
    quarter = configure("sam", "--ascent", "micro_batch", "--fraction", 0.25)
    assert quarter.ascent.fraction(8) == 0.25
    assert configure("perturbed").ascent == lwsam.momentum()
    assert configure("momentum_sam", "--k", 1).ascent == lwsam.momentum()


def test_layers_of_methods_that_take_no_ascent():
    assert chosen(configure("perturbed", "--k", 2)) == "wz"
    assert chosen(configure("momentum_sam", "--k", 1)) == "z"
    # There is no gradient that alpha could mix in.
    method = configure("lwsam", "--ascent", "random", "--rho", 0.1)
    assert method.combine is lwsam.descend()


def test_the_tail_of_a_run():
    method = configure("sam", "--last", 0.2)
    assert [chosen(method, step) != "" for step in range(10)] == 8 * [False] + 2 * [
        True
    ]


@pytest.mark.parametrize("name", METHODS)
def test_options_are_refused_or_right(name):
    """A combination that the library cannot do is never left to it."""
    given = [*("--method", name), *(() if name == "sgd" else ("--rho", 0.1))]
    done = 0
    for ascent, shape in itertools.product((None, *ASCENTS), (None, *SHAPES)):
        options = [*given, *(("--ascent", ascent) if ascent else ())]
        options += ("--shape", shape) if shape else ()
        with contextlib.suppress(UserError):
            wanted = config(*options)
            made = methods.configure(wanted, 10, Facts(10, 5, 0.1, np.ones(3)))
            own = name in OWN_DIRECTION  # no pass, whatever is said
            assert made.is_stale == (own or wanted.ascent in STALE)
            done += 1
    assert done >= 1


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
    assert [chosen(configure("lwsam"), step) for step in range(2)] == ["wxyz"] * 2
    method = configure("lwsam", "--criterion", "all", "--mean-overhead", 0.5)
    assert method.mean_overhead == 0.5
    assert chosen(method) == "wxyz"
    with pytest.raises(UserError, match="--k has no meaning for --criterion all"):
        configure("lwsam", "--criterion", "all", "--k", 2)


def make_any_optimizer(wanted):
    return make_optimizer(wanted, make_schedule(wanted.lr, 10))


@pytest.mark.parametrize("field", ["method", "criterion", "optimizer", "ascent"])
def test_unknown_names(field):
    changed = dataclasses.replace(config(), **{field: "none"})
    make = make_any_optimizer
    if field != "optimizer":
        make = lambda wanted: methods.configure(wanted, 10)
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
