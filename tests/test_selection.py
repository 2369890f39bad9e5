"""Which layers are selected: ranks, ties, norms that are no numbers, covers, names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam


NAMES = ("c_1", "c_10", "c_2", "stem")  # pytree order
# A loss may say that the stem comes first; names alone put c_1 first, c_10 after c_2.
BY_NAME = ("c_1", "c_2", "c_10", "stem")
BY_LOSS = ("stem", "c_1", "c_2", "c_10")
PARAMS = {name: jnp.zeros((2, 2)) for name in NAMES}


def chain_loss(params, x):
    for name in BY_LOSS:
        x = jnp.tanh(x @ params[name])
    return jnp.sum(x)


def state_after(norms, select=None, *, layers=None, steps=1, **options):
    """The state after steps whose gradients had these norms, in pytree order."""
    tx = lwsam.layerwise_sam(
        select=select, rho=0.1, alpha=0.8, layers=layers, **options
    )
    grads = {
        name: jnp.zeros((2, 2)).at[0, 0].set(norm)
        for name, norm in zip(NAMES, norms, strict=True)
    }
    state = tx.init(PARAMS)
    for _ in range(steps):
        _, state = tx.update(grads, state, PARAMS, selection=())
    return state


def selected(norms, select=None, **options):
    return set(lwsam.selection(state_after(norms, select, **options)))


def test_names_and_norms_are_in_pytree_order():
    state = state_after([1.0, 2.0, 3.0, 4.0], k=1)
    layers = lwsam.Layers.of(PARAMS)
    assert layers.names == NAMES
    assert len(layers) == 4
    np.testing.assert_array_equal(state.norms, [1.0, 2.0, 3.0, 4.0])
    assert state.norms.dtype == jnp.float32
    assert layers.selected(state.mask) == lwsam.selection(state) == ("stem",)
    grads = {name: jnp.full((2, 2), 3.0) for name in NAMES}
    np.testing.assert_array_equal(layers.norms(grads), [6.0] * 4)


def test_layers_are_found_from_shapes_alone():
    abstract = jax.eval_shape(lambda: PARAMS)
    x = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    layers = lwsam.Layers.of(abstract, None, chain_loss, x)
    assert layers == lwsam.Layers.of(PARAMS, None, chain_loss, jnp.ones((1, 2)))
    assert hash(layers) == hash(lwsam.Layers.of(PARAMS, None, chain_loss, x))
    assert layers != lwsam.Layers.of(PARAMS)  # of another depth


def test_top_k_takes_the_largest_norms():
    norms = [3.0, 1.0, 4.0, 2.0]
    assert selected(norms, lwsam.top_k(2)) == {"c_2", "c_1"}
    assert selected(norms, k=2) == {"c_2", "c_1"}
    assert selected(norms, lwsam.top_k(4)) == set(NAMES)
    assert selected(norms, lwsam.top_k(0)) == set()


def test_bottom_k_takes_the_smallest_norms():
    assert selected([3.0, 1.0, 4.0, 2.0], lwsam.bottom_k(2)) == {"c_10", "stem"}


def test_everything_and_nothing():
    norms = [3.0, 1.0, 0.0, 2.0]
    assert selected(norms, lwsam.everything()) == set(NAMES)
    assert selected(norms, lwsam.nothing()) == set()


def test_named_takes_the_layers_that_the_expression_finds():
    norms = [1.0] * 4
    assert selected(norms, lwsam.named("stem")) == {"stem"}
    assert selected(norms, lwsam.named(r"^c_\d$")) == {"c_1", "c_2"}
    assert selected(norms, lwsam.named("1")) == {"c_1", "c_10"}


def test_named_follows_the_layers_it_is_used_with():
    """Bound to one network, the same selector still works for another."""
    select = lwsam.named("head|stem")
    assert selected([1.0] * 4, select) == {"stem"}
    tx = lwsam.layerwise_sam(select=select, rho=0.1, alpha=0.8)
    other = {"body": jnp.zeros((2, 2)), "head": jnp.zeros((2, 2))}
    assert lwsam.selection(tx.init(other)) == ("head",)
    assert selected([1.0] * 4, select) == {"stem"}


def test_named_that_finds_nothing_raises_and_lists_the_names():
    with pytest.raises(ValueError, match="nowhere.*c_1, c_10, c_2, stem"):
        selected([1.0] * 4, lwsam.named("nowhere"))
    with pytest.raises(ValueError, match=re.escape("(")):
        lwsam.named("(")


def test_random_k_takes_k_at_random_again_and_again():
    norms = [3.0, 1.0, 4.0, 2.0]
    sets = [
        frozenset(selected(norms, lwsam.random_k(2), steps=1 + i, seed=7))
        for i in range(12)
    ]
    assert {len(s) for s in sets} == {2}
    assert len(set(sets)) > 2
    again = [
        frozenset(selected(norms, lwsam.random_k(2), steps=1 + i, seed=7))
        for i in range(4)
    ]
    assert again == sets[:4]
    other = [
        frozenset(selected(norms, lwsam.random_k(2), steps=1 + i, seed=8))
        for i in range(12)
    ]
    assert other != sets


def test_random_k_prefers_no_layer():
    keys = jax.random.split(jax.random.key(0), 2000)
    norms = jnp.array([1.0, 10.0, 100.0, 1000.0])
    chosen = jax.vmap(lambda key: lwsam.random_k(1)(norms, key))(keys)
    np.testing.assert_array_equal(chosen.sum(axis=1), 1)
    np.testing.assert_allclose(chosen.mean(axis=0), 0.25, atol=0.05)


def test_a_selector_may_be_any_function_of_the_norms():
    assert selected([3.0, 1.0, 4.0, 2.0], lambda norms, key: norms > 2.5) == {
        "c_1",
        "c_2",
    }


def test_a_selector_that_returns_no_mask_raises():
    with pytest.raises(ValueError, match="`select`.*bool"):
        selected([1.0] * 4, lambda norms, key: jnp.argmax(norms))


# --- ties -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("make", [lwsam.top_k, lwsam.bottom_k])
@pytest.mark.parametrize("norm", [0.0, 2.0])
def test_ties_go_to_the_deepest_layers(make, k, norm):
    with_loss = lwsam.Layers.of(PARAMS, None, chain_loss, jnp.ones((1, 2)))
    for layers, order in ((with_loss, BY_LOSS), (None, BY_NAME)):
        found = selected([norm] * 4, make(k), layers=layers)
        assert found == set(order[-k:])


def test_a_tie_below_the_top_is_broken_the_same_way():
    layers = lwsam.Layers.of(PARAMS, None, chain_loss, jnp.ones((1, 2)))
    assert selected([1.0, 1.0, 1.0, 5.0], k=2, layers=layers) == {"stem", "c_10"}


def test_step_0_selects_the_deepest_layers():
    layers = lwsam.Layers.of(PARAMS, None, chain_loss, jnp.ones((1, 2)))
    tx = lwsam.layerwise_sam(k=2, rho=0.1, alpha=0.8, layers=layers)
    assert set(lwsam.selection(tx.init(PARAMS))) == {"c_2", "c_10"}


# --- norms that are no numbers --------------------------------------------------------


BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "select",
    [
        lwsam.top_k(4),
        lwsam.bottom_k(4),
        lwsam.random_k(4),
        lwsam.everything(),
        lwsam.named("c_"),
        lambda norms, key: jnp.ones(4, bool),
        lambda norms, key: ~(norms < 1e9),
    ],
    ids=["top_k", "bottom_k", "random_k", "everything", "named", "all", "not below"],
)
def test_a_norm_that_is_not_finite_is_never_selected(select, bad):
    assert "c_10" not in selected([1.0, bad, 2.0, 3.0], select)
    assert selected([bad] * 4, select) == set()


@pytest.mark.parametrize("bad", BAD)
def test_a_norm_that_is_not_finite_takes_no_place(bad):
    assert selected([1.0, bad, 2.0, 3.0], k=2) == {"c_2", "stem"}
    assert selected([1.0, bad, 2.0, 3.0], lwsam.bottom_k(2)) == {"c_1", "c_2"}
    assert len(selected([1.0, bad, 2.0, 3.0], lwsam.random_k(3))) == 3


# --- wrong k --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lwsam.top_k, lwsam.bottom_k, lwsam.random_k])
def test_more_layers_than_there_are_raises_with_both_numbers(make):
    with pytest.raises(ValueError, match="`k`.*4.*got 5"):
        selected([1.0] * 4, make(5))


@pytest.mark.parametrize("make", [lwsam.top_k, lwsam.bottom_k, lwsam.random_k])
@pytest.mark.parametrize("k", [-1, 1.5, "2", None, True])
def test_a_k_that_counts_nothing_raises(make, k):
    with pytest.raises((TypeError, ValueError), match=f"`k`.*{re.escape(repr(k))[:3]}"):
        make(k)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_k_may_be_injected(k):
    """An `if` on it would be a tracer error."""
    tx = optax.inject_hyperparams(lwsam.layerwise_sam)(k=k, rho=0.1, alpha=0.8)
    state = jax.jit(tx.init)(PARAMS)
    assert set(lwsam.selection(state)) == set(BY_NAME[-k:])
    state.hyperparams["k"] = jnp.asarray(3)
    _, state = jax.jit(tx.update, static_argnames="selection")(
        PARAMS, state, PARAMS, selection=()
    )
    assert set(lwsam.selection(state)) == set(BY_NAME[-3:])


# --- static forms ---------------------------------------------------------------------


def test_a_cover_holds_every_layer_from_the_input_most_selected_one_on():
    layers = lwsam.Layers.of(PARAMS, None, chain_loss, jnp.ones((1, 2)))
    norms = dict.fromkeys(NAMES, 0.0)
    for i, name in enumerate(BY_LOSS):
        state = state_after((norms | {name: 1.0}).values(), k=1, layers=layers)
        cover = lwsam.selection(state, cover="depth")
        assert isinstance(cover, lwsam.Cover)
        assert cover.names == tuple(n for n in NAMES if n in BY_LOSS[i:])


def test_there_are_at_most_one_more_covers_than_layers():
    layers = lwsam.Layers.of(PARAMS, None, chain_loss, jnp.ones((1, 2)))
    covers, tuples = set(), set()
    for bits in range(16):
        wanted = jnp.array([bool(bits & 1 << i) for i in range(4)])
        state = state_after(
            [1.0] * 4, lambda norms, key, wanted=wanted: wanted, layers=layers
        )
        covers.add(lwsam.selection(state, cover="depth"))
        tuples.add(lwsam.selection(state))
    assert len(covers) == 5
    assert len(tuples) == 16
    assert lwsam.Cover(()) in covers


def test_covers_are_frozen_hashable_and_equal_by_names():
    cover = lwsam.Cover(("c_1", "stem"))
    assert hash(cover) == hash(lwsam.Cover(("c_1", "stem")))
    assert cover == lwsam.Cover(("c_1", "stem")) != lwsam.Cover(("stem",))
    with pytest.raises(AttributeError):
        cover.names = ()


def test_an_unknown_kind_of_cover_raises():
    state = state_after([1.0] * 4, k=1)
    with pytest.raises(ValueError, match="`cover`.*depth.*widest"):
        lwsam.selection(state, cover="widest")


def test_every_is_true_at_multiples():
    assert [bool(lwsam.every(3)(jnp.int32(i))) for i in range(7)] == [
        i % 3 == 0 for i in range(7)
    ]
    for n in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"`n`.*{n}"):
            lwsam.every(n)


def test_when_empties_the_selection_of_the_other_steps():
    picks = [selected([1.0] * 4, k=2, when=lwsam.every(2), steps=i) for i in (1, 2, 3)]
    assert picks == [set(), set(BY_NAME[-2:]), set()]
