"""What cannot be right raises, and says which argument, which value, what to do."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lwsam_jax as lwsam
from plain import says


PARAMS = {
    "first": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "second": jnp.ones((2, 2)),
}
LOSS = lambda p: (
    jnp.sum(p["first"]["kernel"] @ p["second"]) + jnp.sum(p["first"]["bias"])
)
GRADS = jax.tree.map(jnp.ones_like, PARAMS)


def make(**options):
    return lwsam.layerwise_sam(**{"k": 1, "rho": 0.1, "alpha": 0.8, **options})


# --- construction ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [make, lambda **o: lwsam.LayerwiseSAM(**{"k": 1, "rho": 0.1, "alpha": 0.8, **o})],
    ids=["layerwise_sam", "LayerwiseSAM"],
)
@pytest.mark.parametrize(
    ("options", "argument", "value"),
    [
        ({"k": None}, "k", "neither"),
        ({"select": lwsam.top_k(1)}, "k", "both"),
        ({"k": -1}, "k", "-1"),
        ({"k": 1.0}, "k", "1.0"),
        ({"k": True}, "k", "True"),
        ({"k": None, "select": 3}, "select", "3"),
        ({"rho": -0.1}, "rho", "-0.1"),
        ({"rho": float("nan")}, "rho", "nan"),
        ({"rho": float("inf")}, "rho", "inf"),
        ({"rho": None}, "rho", "None"),
        ({"rho": "0.1"}, "rho", "'0.1'"),
        ({"alpha": -0.5}, "alpha", "-0.5"),
        ({"alpha": float("nan")}, "alpha", "nan"),
        ({"alpha": float("inf")}, "alpha", "inf"),
        ({"normalize": "layer"}, "normalize", "layer"),
        ({"normalize": None}, "normalize", "None"),
        ({"rule": "weights"}, "rule", "'weights'"),
        ({"layers": ("first",)}, "layers", "('first',)"),
        ({"when": 2}, "when", "2"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_arguments_are_checked_at_construction(build, options, argument, value):
    with pytest.raises((ValueError, TypeError)) as error:
        build(**options)
    says(error, argument, value)


@pytest.mark.parametrize("alpha", [0, 0.0, 1, 1.5, 40.0])
def test_every_finite_alpha_from_zero_on_is_taken(alpha):
    make(alpha=alpha).init(PARAMS)


def test_rho_and_alpha_have_no_default():
    with pytest.raises(TypeError, match="rho"):
        lwsam.layerwise_sam(1, alpha=0.8)
    with pytest.raises(TypeError, match="alpha"):
        lwsam.layerwise_sam(1, rho=0.1)


# --- init -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"k": 3}, {"k": None, "select": lwsam.bottom_k(3)}]
)
def test_more_layers_than_there_are_raises_at_init(options):
    with pytest.raises(ValueError, match="2") as error:
        make(**options).init(PARAMS)
    says(error, "k", "3", "first, second")


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"scale": jnp.ones(3)},
        {"steps": jnp.ones((2, 2), int)},
        {"bias": jnp.ones((2, 2))},
    ],
    ids=["empty", "vector", "integers", "bias of rank 2"],
)
def test_a_tree_without_layers_raises_with_the_reason(params):
    for attempt in (make().init, lwsam.Layers.of):
        with pytest.raises(ValueError, match="weights") as error:
            attempt(params)
        says(error, "params", "rule=")


def test_two_paths_with_one_name_raise():
    """ "first" and "first/kernel" are one name, and would be one layer unseen."""
    params = {"first": {"kernel": jnp.ones((2, 2))}, "first/kernel": jnp.ones((2, 2))}
    clash = {"a/c": jnp.ones((2, 2)), "a": {"c": jnp.ones((2, 2))}}
    for rule in (lwsam.weights, lwsam.leaves):
        with pytest.raises(ValueError, match="a/c"):
            lwsam.Layers.of(clash, rule)
    assert len(lwsam.Layers.of(params)) == 2  # the one a path, the other a key


def test_a_rule_that_returns_no_name_raises():
    with pytest.raises(TypeError) as error:
        make(rule=lambda path, leaf: 3).init(PARAMS)
    says(error, "rule", "3")


LABELS = {"first": "ours", "second": "theirs"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"first": True, "second": False}),
        lambda tx: optax.multi_transform(
            {"ours": tx, "theirs": optax.sgd(0.1)}, LABELS
        ),
        lambda tx: optax.partition({"ours": tx, "theirs": optax.sgd(0.1)}, LABELS),
    ],
    ids=["masked", "multi_transform", "partition"],
)
def test_a_masked_tree_raises_with_the_remedy(wrap):
    """The loss needs every parameter; masked ones are placeholders."""
    with pytest.raises(ValueError, match="rule=") as error:
        wrap(make()).init(PARAMS)
    says(error, "params", "MaskedNode")


# --- update ---------------------------------------------------------------------------


def update(params=PARAMS, grads=GRADS, tx=None, **extra):
    tx = make() if tx is None else tx
    return tx.update(grads, tx.init(PARAMS), params, **extra)


def test_missing_parameters_raise():
    with pytest.raises(ValueError, match="tx.update") as error:
        update(params=None, grad_fn=jax.grad(LOSS))
    says(error, "params", "None")


@pytest.mark.parametrize("selection", [None, ("first",), lwsam.Cover(("first",))])
def test_without_a_function_of_the_loss_it_says_which_to_pass(selection):
    with pytest.raises(ValueError, match="neither") as error:
        update(selection=selection)
    says(error, "grad_fn", "value_fn", "tx.update(grads, opt_state, params, grad_fn=")


def test_both_functions_of_the_loss_raise():
    with pytest.raises(ValueError, match="both") as error:
        update(grad_fn=jax.grad(LOSS), value_fn=LOSS)
    says(error, "grad_fn", "value_fn")


@pytest.mark.parametrize(
    "extra", [{"grad_fn": 3}, {"value_fn": GRADS}, {"grad_fn": GRADS}]
)
def test_a_function_of_the_loss_that_is_none_raises(extra):
    (name,) = extra
    with pytest.raises(TypeError) as error:
        update(**extra)
    says(error, name, "callable")


def test_the_plain_step_needs_no_function_of_the_loss():
    updates, _ = update(selection=())
    assert jax.tree.structure(updates) == jax.tree.structure(GRADS)
    update(tx=make(k=0))


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (("third",), ("third", "first, second")),
        (lwsam.Cover(("third",)), ("third", "first, second")),
        (("first/kernel",), ("first/kernel", "first, second")),
    ],
)
def test_an_unknown_layer_raises_and_lists_the_known_ones(selection, words):
    with pytest.raises(ValueError, match="selection") as error:
        update(value_fn=LOSS, selection=selection)
    says(error, "selection", *words)


@pytest.mark.parametrize(
    "selection", ["first", 3, {"first"}, True, jnp.array([True, False])]
)
def test_a_selection_of_another_kind_raises(selection):
    with pytest.raises(TypeError, match="selection") as error:
        update(value_fn=LOSS, selection=selection)
    says(error, "selection")


def test_gradients_of_another_structure_raise():
    with pytest.raises(ValueError, match="structure") as error:
        update(grads=GRADS["first"], value_fn=LOSS)
    says(error, "updates", "kernel")
    with pytest.raises(ValueError, match="structure") as error:
        update(grad_fn=lambda p: p["first"])
    says(error, "grad_fn", "kernel")


def test_gradients_of_another_shape_raise():
    wrong = {**GRADS, "second": jnp.ones((2, 3))}
    for extra in ({"grads": wrong}, {}):
        with pytest.raises(ValueError, match="second") as error:
            update(grad_fn=lambda p: wrong, **extra)
        says(error, "updates" if extra else "grad_fn", "(2, 3)", "(2, 2)")


def test_a_loss_that_is_no_scalar_raises():
    with pytest.raises(TypeError, match="scalar") as error:
        update(value_fn=lambda p: p["second"])
    says(error, "value_fn", "[2, 2]")


def test_parameters_of_another_structure_than_the_layers_raise():
    tx = make(layers=lwsam.Layers.of({"other": jnp.ones((2, 2))}))
    with pytest.raises(ValueError, match="structure") as error:
        tx.init(PARAMS)
    says(error, "params", "other")


def test_it_stands_first_in_its_chain_or_clips_only_the_ascent():
    """Documented: what comes before it changes the ascent gradient, no more."""
    tx = optax.chain(optax.scale(2.0), make(alpha=1.0), optax.sgd(1.0))
    updates, _ = tx.update(
        GRADS, tx.init(PARAMS), PARAMS, grad_fn=lambda p: p, selection=("second",)
    )
    assert jnp.allclose(updates["second"], -(1.0 + 0.1 * 2.0))


# --- selection() and value() ----------------------------------------------------------


@pytest.mark.parametrize("read", [lwsam.selection, lwsam.value])
def test_none_or_several_states_raise(read):
    state = make().init(PARAMS)
    for tree, count in (
        ({}, "0"),
        (optax.sgd(0.1).init(PARAMS), "0"),
        ((state, state), "2"),
    ):
        with pytest.raises(ValueError, match="state") as error:
            read(tree)
        says(error, "state", count)


def test_reading_the_selection_under_jit_raises():
    state = make().init(PARAMS)
    with pytest.raises(TypeError, match="static") as error:
        jax.jit(lambda s: jnp.zeros(len(lwsam.selection(s))))(state)
    says(error, "state")


def test_an_ensemble_whose_members_disagree_has_no_one_selection():
    state = make().init(PARAMS)
    masks = jnp.stack([state.mask, ~state.mask])
    with pytest.raises(ValueError, match="ensemble") as error:
        lwsam.selection(state._replace(mask=masks))
    says(error, "state", "2")


@pytest.mark.parametrize("as_transformation", [False, True])
def test_multi_steps_raises_when_the_selection_is_read(as_transformation):
    """It cannot be seen from inside: the loss would be of the last micro-batch."""
    tx = optax.MultiSteps(optax.chain(make(), optax.sgd(0.1)), every_k_schedule=2)
    tx = tx.gradient_transformation() if as_transformation else tx
    with pytest.raises(ValueError, match="MultiSteps") as error:
        lwsam.selection(tx.init(PARAMS))
    says(error, "state")
