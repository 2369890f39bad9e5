"""layerwise_sam as a citizen of Optax: every way in which a transformation is used."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
import nets
from plain import assert_close, take_step, two_gradients


CASE = nets.mlp()
PARAMS = CASE.params
LOSS = lambda p: CASE.loss(p, *CASE.args)[0]
HYPER = {"k": 2, "rho": 0.3, "alpha": 0.7}


def chained(*after, **options):
    after = after or (optax.sgd(0.1, momentum=0.9),)
    return optax.chain(lwsam.layerwise_sam(**{**HYPER, **options}), *after)


def jitted_step(tx, *, form="value_fn", **jit_options):
    jit = functools.partial(jax.jit, static_argnames="selection", **jit_options)

    @jit
    def step(params, opt_state, selection=None):
        return take_step(tx, LOSS, params, opt_state, form=form, selection=selection)

    return step


@functools.cache
def trained(steps=3):
    """What every use below must come to: a few steps with the traced selection."""
    tx = chained()
    step = jitted_step(tx)
    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return params, opt_state


def spec(tree):
    """Structure, shapes and dtypes (weak types count: they retrace)."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [
        (jnp.shape(x), jnp.result_type(x), getattr(x, "weak_type", False)) for x in leaves
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
        assert sum(leaf.size for leaf in leaves) < 10  # and no copy of them either
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
    assert isinstance(state, lwsam.LayerwiseSAMState)
    assert int(state.step_count) == 3
    assert state.norms.shape == state.mask.shape == (3,)
    assert state.norms.dtype == jnp.float32
    assert state.mask.dtype == jnp.bool_
    assert float(lwsam.value(opt_state)) == float(state.value)
    # The clean loss of the step that led here is not yet that of these parameters.
    assert float(state.value) > float(LOSS(params))


def test_value_is_infinite_before_the_first_loss():
    tx = lwsam.layerwise_sam(**HYPER)
    state = tx.init(PARAMS)
    assert float(lwsam.value(state)) == np.inf
    grads = jax.grad(LOSS)(PARAMS)
    _, state = tx.update(grads, state, PARAMS, grad_fn=jax.grad(LOSS))
    assert float(lwsam.value(state)) == np.inf
    _, state = tx.update(grads, state, PARAMS, value_fn=LOSS, selection=())
    np.testing.assert_allclose(lwsam.value(state), LOSS(PARAMS), rtol=1e-6)


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
    step = jax.jit(
        functools.partial(_counted, functools.partial(take_step, tx, LOSS))
    )
    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    assert_close(params, trained()[0], rtol=1e-5)


# --- Optax's wrappers -----------------------------------------------------------------


def test_hyperparameters_can_be_injected():
    make = lambda k, rho, alpha: chained(k=k, rho=rho, alpha=alpha)
    tx = optax.inject_hyperparams(make)(k=1, rho=0.1, alpha=1.0)
    opt_state = tx.init(PARAMS)
    for name, value in HYPER.items():
        given = opt_state.hyperparams[name]
        opt_state.hyperparams[name] = jnp.asarray(value, given.dtype)
    step = jitted_step(tx)
    params = PARAMS
    for i in range(3):
        params, opt_state = step(params, opt_state, () if i == 0 else None)
    expected_tx = chained()
    expected, expected_state = PARAMS, expected_tx.init(PARAMS)
    expected_step = jitted_step(expected_tx)
    for i in range(3):
        selection = () if i == 0 else None
        expected, expected_state = expected_step(expected, expected_state, selection)
    assert_close(params, expected, rtol=1e-5)
    assert lwsam.selection(opt_state) == lwsam.selection(expected_state)


def test_schedules_can_be_injected():
    make = optax.inject_hyperparams(lwsam.layerwise_sam)
    schedule = lambda step: 0.1 * (step + 1)
    tx = make(k=2, rho=schedule, alpha=1.0)
    assert radii(tx) == pytest.approx([0.1, 0.2, 0.3])


def test_a_rule_is_a_static_argument_of_inject_hyperparams():
    """Else Optax takes the callable for a schedule."""
    make = optax.inject_hyperparams(
        lwsam.layerwise_sam, static_args=("rule", "normalize", "select")
    )
    tx = make(k=2, rho=0.3, alpha=1.0, rule=lwsam.leaves, normalize="selected")
    assert len(lwsam.selection(tx.init(PARAMS))) == 2
    assert set(lwsam.selection(tx.init(PARAMS))) == {"z_in", "z_in/bias"}
    tx = make(select=lwsam.named("m_"), rho=0.3, alpha=1.0)
    assert lwsam.selection(tx.init(PARAMS)) == ("m_mid",)


def radii(tx, steps=3):
    """The radius of each step, from a grad_fn that returns the point it is given."""
    params = {"w": jnp.zeros((2, 2))}
    grads = {"w": jnp.full((2, 2), 0.5)}  # of norm 1
    state = tx.init(params) if _takes(tx, params) else None
    found = []
    update = jax.jit(functools.partial(tx.update, grad_fn=lambda p: p))
    for _ in range(steps):
        point, state = update(grads, state, params)
        found.append(float(jnp.linalg.norm(point["w"])))
    return found


def _takes(tx, params):
    try:
        tx.init(params)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("argument", ["rho", "alpha"])
def test_schedules_advance_with_the_steps(argument):
    """Optax's own SAM resets them (style: 0.01, 0.01, 0.01)."""
    schedule = optax.linear_schedule(0.1, 0.4, 3)
    tx = lwsam.layerwise_sam(**{"k": 1, "rho": 1.0, "alpha": 1.0, argument: schedule})
    found = radii(tx)
    if argument == "alpha":  # the point is g, its gradient w + g: (1 - alpha) + alpha
        zero = {"w": jnp.zeros((2, 2))}
        state, found = tx.init(zero), []
        for _ in range(3):
            mixed, state = tx.update(
                {"w": jnp.full((2, 2), 0.5)}, state, zero, grad_fn=lambda p: zero
            )
            found.append(1.0 - float(jnp.linalg.norm(mixed["w"])))
    assert found == pytest.approx([0.1, 0.2, 0.3], rel=1e-5)


def test_apply_if_finite_skips_a_bad_step_whole():
    tx = optax.apply_if_finite(chained(), max_consecutive_errors=3)
    opt_state = tx.init(PARAMS)

    @jax.jit
    def step(params, opt_state, scale):
        loss = lambda p: scale * LOSS(p)
        return take_step(tx, loss, params, opt_state)

    good, good_state = step(PARAMS, opt_state, 1.0)
    bad, bad_state = step(good, good_state, jnp.nan)
    chex.assert_trees_all_equal(bad, good)
    chex.assert_trees_all_equal(bad_state.inner_state, good_state.inner_state)
    params, opt_state = bad, bad_state
    for _ in range(2):
        params, opt_state = step(params, opt_state, 1.0)
    assert_close(params, trained()[0], rtol=1e-5)


def test_map_params_leaves_our_state_alone():
    """It holds nothing that is shaped like the parameters."""
    tx = chained()
    _, opt_state = trained()
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, opt_state)
    chex.assert_trees_all_equal(doubled[0], opt_state[0])
    trace = optax.tree.get(opt_state, "trace")
    expected = jax.tree.map(lambda x: 2 * x, trace)
    chex.assert_trees_all_equal(optax.tree.get(doubled, "trace"), expected)
    assert lwsam.selection(doubled) == lwsam.selection(opt_state)


def test_unknown_extra_arguments_are_ignored():
    tx = chained()
    grads = jax.grad(LOSS)(PARAMS)
    tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=LOSS, selection=(), unheard_of=3)


def test_a_line_search_after_it_gets_its_own_extra_arguments():
    """`value_fn` is the name that Optax's line searches use too."""
    tx = chained(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8))
    grads, value = jax.grad(LOSS)(PARAMS), LOSS(PARAMS)

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(
            grads, opt_state, params, value=value, grad=grads, value_fn=LOSS
        )
        return optax.apply_updates(params, updates), opt_state

    params, _ = step(PARAMS, tx.init(PARAMS))
    assert float(LOSS(params)) < float(value)


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
        one = jax.jit(lambda s, fn=whole, on=selection: tx.update(
            grads, s, PARAMS, value_fn=fn, selection=on
        ))(tx.init(PARAMS))
        two = jax.jit(lambda s, fn=LOSS, on=selection: tx.update(
            grads, s, PARAMS, value_fn=fn, selection=on
        ))(tx.init(PARAMS))
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
