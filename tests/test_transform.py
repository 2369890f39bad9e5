"""layerwise_sam under JAX: its state, its arguments, jit, scan, vmap, donation."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
import nets
from chains import CASE, chained, HYPER, jitted_step, LOSS, PARAMS, trained
from plain import assert_close, take_step, two_gradients


def spec(tree):
    """Structure, shapes and dtypes (weak types count: they retrace)."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [
        (jnp.shape(x), jnp.result_type(x), getattr(x, "weak_type", False))
        for x in leaves
    ]


# --- the state ------------------------------------------------------------------------


@pytest.mark.parametrize("selection", [None, (), ("a_out",), lwsam.Cover(nets.NAMES)])
@pytest.mark.parametrize("form", ["value_fn", "grad_fn"])
def test_the_state_keeps_its_structure_shapes_and_dtypes(form, selection):
    tx = lwsam.layerwise_sam(**HYPER)
    state = tx.init(PARAMS)
    extra = {form: LOSS if form == "value_fn" else jax.grad(LOSS)}
    after = jax.eval_shape(
        lambda s: tx.update(PARAMS, s, PARAMS, selection=selection, **extra)[1], state
    )
    assert spec(after) == spec(state)


def test_the_state_holds_no_buffer_of_the_parameters():
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(PARAMS)}
    tx = lwsam.layerwise_sam(**HYPER)
    state = tx.init(PARAMS)
    for _ in range(2):
        leaves = jax.tree.leaves(state)
        assert not pointers & {leaf.unsafe_buffer_pointer() for leaf in leaves}
        assert sum(leaf.size for leaf in leaves) < 12  # and no copy of them either
        _, state = tx.update(PARAMS, state, PARAMS, selection=())


def test_the_state_is_initialized_from_shapes():
    abstract = jax.eval_shape(lambda: PARAMS)
    tx = chained(optax.sgd(0.1))
    expected = spec(tx.init(PARAMS))
    assert spec(jax.eval_shape(tx.init, abstract)) == expected
    assert spec(tx.init(abstract)) == expected
    assert spec(jax.jit(tx.init)(PARAMS)) == expected


def test_the_state_says_what_happened():
    params, opt_state = trained()
    state = opt_state[0]
    assert isinstance(state, lwsam.MethodState)
    assert int(state.step_count) == 3
    assert state.norms.shape == state.mask.shape == (3,)
    assert state.norms.dtype == jnp.float32
    assert state.mask.dtype == jnp.bool_
    assert float(lwsam.value(opt_state)) == float(state.value)
    # The clean loss of the step that led here is not yet that of these parameters.
    assert float(state.value) > float(LOSS(params))


def test_value_is_zero_before_the_first_loss():
    tx = lwsam.layerwise_sam(**HYPER)
    state = tx.init(PARAMS)
    assert float(lwsam.value(state)) == 0
    grads = jax.grad(LOSS)(PARAMS)
    _, state = tx.update(grads, state, PARAMS, grad_fn=jax.grad(LOSS))
    assert float(lwsam.value(state)) == 0
    _, state = tx.update(grads, state, PARAMS, value_fn=LOSS, selection=())
    np.testing.assert_allclose(lwsam.value(state), LOSS(PARAMS), rtol=1e-6)


def test_the_third_argument_of_update_is_called_params():
    tx = chained()
    assert list(inspect.signature(tx.update).parameters)[:3] == [
        "updates",
        "state",
        "params",
    ]
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), params=PARAMS, selection=())
    chex.assert_trees_all_equal_structs(updates, PARAMS)


# --- JAX's transformations ------------------------------------------------------------


@pytest.mark.parametrize("form", ["value_fn", "grad_fn"])
def test_parameters_and_state_can_be_donated(form):
    tx = chained()
    step = jitted_step(tx, form=form, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    opt_state = tx.init(params)
    for _ in range(3):
        old = params
        params, opt_state = step(params, opt_state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert_close(params, trained()[0])


@pytest.mark.parametrize("finite", [False, True], ids=["bare", "apply_if_finite"])
def test_it_runs_in_a_scan(finite):
    """The carry keeps its dtypes, also the booleans of the wrapper."""
    tx = optax.apply_if_finite(chained(), 3) if finite else chained()

    @jax.jit
    def train(params, opt_state):
        body = lambda carry, _: (take_step(tx, LOSS, *carry), None)
        return jax.lax.scan(body, (params, opt_state), length=3)[0]

    params, opt_state = train(PARAMS, tx.init(PARAMS))
    opt_state = opt_state.inner_state if finite else opt_state
    assert_close((params, opt_state), trained(), rtol=1e-5)


def test_it_runs_in_a_vmap():
    """An ensemble: each member selects for itself."""
    tx = chained()
    scales = jnp.array([1.0, 0.3, 2.0])
    members = jax.vmap(lambda s: jax.tree.map(lambda w: s * w, PARAMS))(scales)
    step = jax.jit(jax.vmap(lambda p, s: take_step(tx, LOSS, p, s)))
    params, opt_states = members, jax.vmap(tx.init)(members)
    for _ in range(3):
        params, opt_states = step(params, opt_states)
    alone, alone_state = trained()
    assert_close(jax.tree.map(lambda x: x[0], params), alone, rtol=1e-5)
    assert_close(opt_states[0].norms[0], alone_state[0].norms, rtol=1e-5)


def test_static_and_traced_selections_agree():
    tx = chained()
    step = jitted_step(tx)
    for cover in (None, "depth"):
        params, opt_state = PARAMS, tx.init(PARAMS)
        for _ in range(3):
            selection = lwsam.selection(opt_state, cover=cover)
            params, opt_state = step(params, opt_state, selection)
        assert_close((params, opt_state), trained(), rtol=1e-5)


def test_grad_fn_and_value_fn_agree():
    tx = chained()
    step = jitted_step(tx, form="grad_fn")
    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    assert_close(params, trained()[0], rtol=1e-5)


def test_only_a_new_selection_traces_again():
    tx = chained(optax.sgd(0.3), k=1)
    traces = []

    @functools.partial(jax.jit, static_argnames="selection")
    def step(params, opt_state, x, selection):
        traces.append(selection)
        loss = lambda p: CASE.loss(p, x)[0]
        return take_step(tx, loss, params, opt_state, selection=selection)

    params, opt_state = PARAMS, tx.init(PARAMS)
    seen = set()
    for i in range(12):
        selection = lwsam.selection(opt_state, cover="depth")
        seen.add(selection)
        x = nets.weight(6, 4, seed=i)
        params, opt_state = step(params, opt_state, x, selection)
    assert len(traces) == len(seen) <= len(nets.NAMES) + 1


@chex.assert_max_traces(n=1)
def _counted(step, params, opt_state):
    return step(params, opt_state)


def test_the_traced_selection_is_traced_once():
    chex.clear_trace_counter()
    tx = chained()
    step = jax.jit(functools.partial(_counted, functools.partial(take_step, tx, LOSS)))
    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    assert_close(params, trained()[0], rtol=1e-5)


# --- the functions of the loss --------------------------------------------------------


def test_the_state_is_found_anywhere():
    _, opt_state = trained()
    expected = lwsam.selection(opt_state)
    assert lwsam.selection({"deep": [None, (opt_state, PARAMS)]}) == expected
    assert lwsam.selection(opt_state[0]) == expected
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 8), opt_state)
    assert lwsam.selection(stacked) == expected
    assert lwsam.selection(stacked, cover="depth") == lwsam.selection(
        opt_state, cover="depth"
    )


def test_value_fn_may_return_aux_which_is_dropped():
    tx = lwsam.layerwise_sam(**HYPER)
    grads = jax.grad(LOSS)(PARAMS)
    whole = lambda p: CASE.loss(p, *CASE.args)
    for selection in (("a_out",), (), None):
        one = jax.jit(
            lambda s, fn=whole, on=selection: tx.update(
                grads, s, PARAMS, value_fn=fn, selection=on
            )
        )(tx.init(PARAMS))
        two = jax.jit(
            lambda s, fn=LOSS, on=selection: tx.update(
                grads, s, PARAMS, value_fn=fn, selection=on
            )
        )(tx.init(PARAMS))
        assert_close(one, two)


@functools.cache
def expected_gradient():
    run = functools.partial(
        two_gradients, LOSS, selected=("a_out",), rho=0.3, alpha=0.7, has_aux=False
    )
    return jax.jit(run)(PARAMS).grads


@pytest.mark.parametrize(
    "make",
    [
        lambda grad: grad,
        lambda grad: lambda p, i: grad(p),
        lambda grad: lambda p, i=1: grad(p),
        lambda grad: lambda *args: grad(args[0]),
        functools.partial,
        jax.jit,
    ],
    ids=["(p)", "(p, i)", "(p, i=1)", "(*args)", "partial", "jit"],
)
def test_grad_fn_is_called_with_one_argument_if_it_can_be(make):
    grad_fn = make(jax.grad(LOSS))
    tx = lwsam.layerwise_sam(**HYPER)
    updates, _ = jax.jit(
        lambda p: tx.update(
            jax.grad(LOSS)(p), tx.init(p), p, grad_fn=grad_fn, selection=("a_out",)
        )
    )(PARAMS)
    assert_close(updates, expected_gradient())


def test_grads_are_used_only_when_nothing_is_selected():
    """With value_fn a loop may pass zeros, and jit drops what computed them."""
    tx = lwsam.layerwise_sam(**HYPER)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = tx.init(PARAMS)
    for selection in (("a_out",), lwsam.Cover(("a_out",)), None):
        run = jax.jit(
            lambda g, on=selection: tx.update(
                g, state, PARAMS, value_fn=LOSS, selection=on
            )[0]
        )
        chex.assert_trees_all_equal(run(zeros), run(PARAMS))
    plain, _ = tx.update(zeros, state, PARAMS, value_fn=LOSS, selection=())
    chex.assert_trees_all_equal(plain, zeros)
