"""Where the method becomes another: the base optimizer, SAM, generalized SAM."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
import nets
from plain import assert_close, global_norm, take_step, two_gradients


CASE = nets.mlp()
LOSS = lambda p: CASE.loss(p, *CASE.args)[0]
NAMES = nets.NAMES
BASES = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(0.01),
}


def train(tx, *, form, static, steps=3):
    """Parameters after a few jitted steps; plain ones where `form` is None."""

    @functools.partial(jax.jit, static_argnames="selection")
    def step(params, opt_state, selection):
        if form is not None:
            return take_step(
                tx, LOSS, params, opt_state, form=form, selection=selection
            )
        updates, opt_state = tx.update(jax.grad(LOSS)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = CASE.params, tx.init(CASE.params)
    for _ in range(steps):
        selection = lwsam.selection(opt_state) if static else None
        params, opt_state = step(params, opt_state, selection)
    return params


@functools.cache
def base_only(base):
    return train(BASES[base](), form=None, static=False)


def chained(base="momentum", **options):
    options = {"rho": 0.3, "alpha": 0.7, **options}
    return optax.chain(lwsam.layerwise_sam(**options), BASES[base]())


NO_STEP = {
    "k=0": {"k": 0},
    "nothing()": {"select": lwsam.nothing()},
    "rho=0": {"k": 2, "rho": 0.0},
    "integer rho=0": {"k": 2, "rho": 0},
    "rho=0, normalized": {"k": 2, "rho": 0.0, "normalize": "selected"},
}


@pytest.mark.parametrize("form", ["grad_fn", "value_fn"])
@pytest.mark.parametrize("name", NO_STEP)
def test_no_layer_or_no_radius_is_the_base_optimizer_bit_for_bit(name, form):
    """The selection is static, as in the loops that the library documents."""
    params = train(chained(**NO_STEP[name]), form=form, static=True)
    chex.assert_trees_all_equal(params, base_only("momentum"))


def test_no_radius_is_adamw_bit_for_bit():
    tx = chained("adamw", k=2, rho=0.0)
    params = train(tx, form="value_fn", static=True)
    chex.assert_trees_all_equal(params, base_only("adamw"))


@pytest.mark.parametrize("name", ["k=0", "rho=0"])
def test_so_it_is_where_the_mask_is_traced(name):
    params = train(chained(**NO_STEP[name]), form="value_fn", static=False)
    chex.assert_trees_all_equal(params, base_only("momentum"))


@pytest.mark.parametrize("form", ["grad_fn", "value_fn"])
@pytest.mark.parametrize("normalize", ["none", "selected", "full"])
def test_a_scheduled_radius_of_zero_agrees_with_the_base_optimizer(form, normalize):
    tx = chained(k=2, rho=optax.constant_schedule(0.0), normalize=normalize)
    assert_close(train(tx, form=form, static=False), base_only("momentum"))


def test_an_empty_mask_at_run_time_agrees_with_the_base_optimizer():
    tx = chained(select=lambda norms, key: jnp.zeros(norms.shape, bool))
    assert_close(train(tx, form="value_fn", static=False), base_only("momentum"))


@pytest.mark.parametrize("selection", [(), lwsam.Cover(())])
def test_an_empty_selection_is_the_plain_gradient_bit_for_bit(selection):
    fn = lwsam.value_and_grad(CASE.loss, selection, rho=0.3, alpha=0.7, has_aux=True)
    out = jax.jit(fn)(CASE.params, *CASE.args)
    plain = jax.jit(jax.value_and_grad(CASE.loss, has_aux=True))
    (value, aux), grads = plain(CASE.params, *CASE.args)
    chex.assert_trees_all_equal((out.value, out.aux, out.grads), (value, aux, grads))
    chex.assert_trees_all_equal(out.perturbed_value, value)
    expected = [global_norm([grads[name]["kernel"]]) for name in NAMES]
    np.testing.assert_allclose(out.norms, expected, rtol=1e-6)


def one_gradient(selection=NAMES, **options):
    options = {"rho": 0.3, "alpha": 0.7, **options}
    fn = lwsam.value_and_grad(CASE.loss, selection, has_aux=True, **options)
    return jax.jit(fn)(CASE.params, *CASE.args).grads


def two_plain(selected, alpha):
    run = functools.partial(
        two_gradients, CASE.loss, selected=selected, rho=0.3, alpha=alpha
    )
    return jax.jit(run)(CASE.params, CASE.args)


@functools.cache
def plain_gradient():
    return jax.jit(jax.grad(LOSS))(CASE.params)


def one_update(tx, grads=None, params=None, **extra):
    """The updates and the state of one jitted update from a fresh state."""
    params = CASE.params if params is None else params
    grads = plain_gradient() if grads is None else grads
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p, **extra))(grads, params)


def test_alpha_one_returns_the_descent_gradient_unmixed():
    """An infinite ascent gradient would otherwise come back as 0 * inf."""
    params = {"w": jnp.zeros((2, 2))}
    tx = lwsam.layerwise_sam(k=1, rho=0.3, alpha=1.0)
    descent = {"w": jnp.full((2, 2), 0.1)}
    ascent = {"w": jnp.full((2, 2), jnp.inf)}
    updates, _ = one_update(
        tx, ascent, params, grad_fn=lambda p: descent, selection=("w",)
    )
    chex.assert_trees_all_equal(updates, descent)


def test_alpha_zero_is_the_base_optimizer_where_every_leaf_is_a_selected_layer():
    leaves = tuple(f"{n}{end}" for n in NAMES for end in ("/bias", ""))
    grads = one_gradient(leaves, alpha=0.0, rule=lwsam.leaves)
    assert_close(grads, plain_gradient())


def test_alpha_zero_is_not_the_base_optimizer_elsewhere():
    """Biases are no layers: they get the gradient at the perturbed point (line 6)."""
    grads, clean = one_gradient(alpha=0.0), plain_gradient()
    for name in NAMES:
        assert_close(grads[name]["kernel"], clean[name]["kernel"])
        with pytest.raises(AssertionError):
            assert_close(grads[name]["bias"], clean[name]["bias"], rtol=1e-3)


def test_unselected_layers_get_the_gradient_at_the_perturbed_point():
    """Algorithm 1, line 6, and not the clean gradient of section 3.2's prose."""
    grads = one_gradient(("a_out",), alpha=0.7)
    expected = two_plain(("a_out",), alpha=1.0)
    for name in ("m_mid", "z_in"):
        assert_close(grads[name], expected.grads[name])


def test_alpha_above_one_extrapolates():
    assert_close(one_gradient(alpha=1.5), two_plain(NAMES, alpha=1.5).grads)


def leafwise_sam(params, rho=0.3):
    """Foret et al.: the gradient at w + rho g / ||g||, over all leaves."""
    grads = jax.grad(LOSS)(params)
    norm = global_norm(jax.tree.leaves(grads))
    return jax.grad(LOSS)(jax.tree.map(lambda w, g: w + rho * g / norm, params, grads))


@pytest.mark.parametrize("normalize", ["selected", "full"])
def test_sam_is_every_leaf_with_alpha_one_and_normalized(normalize):
    tx = lwsam.layerwise_sam(
        select=lwsam.everything(),
        rho=0.3,
        alpha=1.0,
        normalize=normalize,
        rule=lwsam.leaves,
    )
    grads, _ = one_update(tx, value_fn=LOSS)
    assert_close(grads, jax.jit(leafwise_sam)(CASE.params))


@pytest.mark.filterwarnings("ignore")  # Optax's own, whatever they are by then
def test_sam_agrees_with_optax_contrib_sam_in_opaque_mode():
    """Call-compatible: the same loop runs both, with the same `grad_fn`."""
    from optax import contrib

    grad_fn = lambda p, i: jax.grad(LOSS)(p)
    ours = optax.chain(
        lwsam.layerwise_sam(
            k=6, rho=0.3, alpha=1.0, normalize="selected", rule=lwsam.leaves
        ),
        optax.sgd(0.1, momentum=0.9),
    )
    theirs = contrib.sam(
        optax.sgd(0.1, momentum=0.9),
        optax.chain(contrib.normalize(), optax.sgd(0.3)),
        opaque_mode=True,
    )
    results = []
    for tx in (ours, theirs):

        @jax.jit
        def step(params, opt_state, tx=tx):
            updates, opt_state = tx.update(
                grad_fn(params, 0), opt_state, params, grad_fn=grad_fn
            )
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = CASE.params, tx.init(CASE.params)
        for _ in range(4):
            params, opt_state = step(params, opt_state)
        results.append(params)
    assert_close(*results, rtol=2e-6)


def test_k_of_all_layers_is_generalized_sam():
    """Eq. 3 over every leaf."""
    tx = lwsam.layerwise_sam(k=6, rho=0.3, alpha=0.7, rule=lwsam.leaves)
    clean = plain_gradient()
    grads, _ = one_update(tx, value_fn=LOSS)
    moved = jax.tree.map(lambda w, g: w + 0.3 * g, CASE.params, clean)
    perturbed = jax.jit(jax.grad(LOSS))(moved)
    expected = jax.tree.map(lambda g, d: 0.3 * g + 0.7 * d, clean, perturbed)
    assert_close(grads, expected)


@pytest.mark.parametrize("normalize", ["selected", "full"])
def test_the_length_of_the_perturbation_is_the_radius(normalize):
    """Exactly for "selected", less for "full"; a grad_fn that returns w shows it."""
    params = CASE.params
    tx = lwsam.layerwise_sam(k=2, rho=0.3, alpha=1.0, normalize=normalize)
    clean = plain_gradient()
    point, _ = one_update(tx, grad_fn=lambda p: p, selection=("a_out", "z_in"))
    step = jax.tree.map(lambda a, b: a - b, point, params)
    length = float(global_norm(jax.tree.leaves(step)))
    if normalize == "selected":
        np.testing.assert_allclose(length, 0.3, rtol=1e-5)
    else:
        part = global_norm([clean["a_out"]["kernel"], clean["z_in"]["kernel"]])
        whole = global_norm(jax.tree.leaves(clean))
        np.testing.assert_allclose(length, float(0.3 * part / whole), rtol=1e-5)
    assert not np.any(step["m_mid"]["kernel"])


@pytest.mark.parametrize("normalize", ["none", "selected", "full"])
@pytest.mark.parametrize("selection", [("w",), lwsam.Cover(("w",)), None])
def test_a_zero_gradient_gives_a_zero_perturbation(normalize, selection):
    """At a minimum, where a division by the norm would give NaN."""
    params = {"v": jnp.zeros((2, 2)), "w": jnp.zeros((2, 2))}
    loss = lambda p: jnp.sum((p["w"] + p["v"]) ** 2)
    tx = lwsam.layerwise_sam(k=1, rho=0.3, alpha=0.7, normalize=normalize)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for extra in ({"value_fn": loss}, {"grad_fn": jax.grad(loss)}):
        updates, after = one_update(tx, zeros, params, selection=selection, **extra)
        chex.assert_trees_all_equal(updates, zeros)
        chex.assert_trees_all_equal(after.norms, jnp.zeros(2))
        chex.assert_trees_all_equal(lwsam.selection(after), ("w",))
