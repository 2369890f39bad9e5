"""Parts that meet: known sets and budgets, stale ascents, shapes in chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from nets import weight
from plain import assert_close


PARAMS = {f"w{i}": weight(8, 8, seed=i) for i in range(4)}
X = weight(20, 8, seed=9)


def loss(params, x):
    for name in sorted(params)[:-1]:
        x = jnp.tanh(x @ params[name])
    return jnp.mean((x @ params[sorted(params)[-1]] - 1.0) ** 2)


def loss_fn(params, model_state, batch, key):
    del key
    return loss(params, batch), (model_state, {})


def sgd():
    return optax.sgd(0.05, momentum=0.9)


def run(method, steps=5, **options):
    step = lwsam.TrainStep(loss_fn, sgd(), method, **options)
    state = step.init(PARAMS, {}, X, key=jax.random.key(0))
    infos = []
    for _ in range(steps):
        state, info = step(state, X)
        infos.append(jax.tree.map(np.asarray, info))
    return step, state, infos


# --- known sets and budgets -----------------------------------------------------------


@pytest.mark.parametrize("select", [lwsam.everything(), lwsam.named("w[023]")])
@pytest.mark.parametrize("most", [2, 3, 12])
def test_a_known_set_keeps_max_overhead_in_every_step(select, most):
    method = lwsam.Method(select, rho=0.05, max_overhead=0.5)
    _, _, infos = run(method, max_executables=most)
    assert max(float(info.overhead) for info in infos) <= 0.5
    assert any(info.mask.any() for info in infos)


@pytest.mark.parametrize("select", [lwsam.everything(), lwsam.named("w[023]")])
@pytest.mark.parametrize("most", [2, 3, 12])
def test_a_known_set_keeps_mean_overhead_in_every_step(select, most):
    method = lwsam.Method(select, rho=0.05, mean_overhead=0.3)
    _, _, infos = run(method, steps=8, max_executables=most)
    spent = np.cumsum([float(info.overhead) for info in infos])
    assert (spent / np.arange(1, 9) <= 0.3 + 1e-6).all()


def test_a_chosen_price_is_kept_where_covers_are_one():
    wide = jnp.tile(X, (20, 1))
    cost = lwsam.step_cost(loss, PARAMS, wide)
    priced = lwsam.for_price(1.0175, cost)
    step = lwsam.TrainStep(loss_fn, sgd(), priced.method)
    state = step.init(PARAMS, {}, wide, key=jax.random.key(0))
    for _ in range(4):
        state, info = step(state, wide)
        assert float(info.overhead) <= 0.0175


def test_an_ascent_of_ones_own_on_the_whole_batch_shares_nothing():
    method = lwsam.Method(lwsam.named("w3"), rho=0.05, ascent=lambda batch, key: batch)
    _, _, infos = run(method, 1)
    _, _, shared = run(lwsam.Method(lwsam.named("w3"), rho=0.05), 1)
    assert infos[0].overhead > shared[0].overhead + 0.1


# --- predicates -----------------------------------------------------------------------


def test_a_predicate_may_return_an_integer():
    method = lwsam.sam(0.05, when=lambda step: (step + 1) % 2)
    _, _, infos = run(method, 4)
    assert [bool(info.mask.any()) for info in infos] == [True, False, True, False]
    step = lwsam.TrainStep(loss_fn, sgd(), method)
    state = step.init(PARAMS, {}, X, key=jax.random.key(0))
    _, scanned = step.scan(state, jnp.stack([X] * 4))
    np.testing.assert_allclose(scanned.rho, [0.05, 0, 0.05, 0], rtol=1e-6)


def test_a_predicate_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"`when`.*bool\[\]"):
        run(lwsam.sam(0.05, when=lambda step: jnp.ones(3, bool)), 1)


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("select", lwsam.everything),
        ("ascent", lwsam.momentum),
        ("combine", lwsam.descend),
        ("when", lwsam.always),
    ],
)
def test_forgotten_parentheses_are_named(argument, part):
    parts = {"select": lwsam.everything(), "rho": 0.05, argument: part}
    with pytest.raises(TypeError, match=rf"`{argument}`.*Call it: {part.__name__}"):
        lwsam.Method(**parts)


# --- ascents --------------------------------------------------------------------------


@pytest.mark.parametrize("ascent", [lwsam.momentum(), lwsam.random()])
def test_a_plain_step_of_a_stale_ascent_under_a_mapped_axis(ascent):
    method = lwsam.sam(0.05, ascent=ascent, axis_name="data")
    tx = lwsam.as_optax(method)
    state = tx.init(PARAMS)

    def step(x):
        grads = jax.grad(loss)(PARAMS, x)
        found, _ = tx.update(
            grads, state, PARAMS, value_fn=lambda p: loss(p, x), selection=()
        )
        return found

    found = jax.pmap(step, axis_name="data")(jnp.stack([X, X]))
    first = jax.tree.map(lambda x: x[0], found)
    assert_close(first, jax.grad(loss)(PARAMS, X), rtol=1e-5)


def test_a_plain_step_of_a_micro_batch_needs_no_loss_on_it():
    tx = lwsam.as_optax(lwsam.sam(0.05, ascent=lwsam.micro_batch(0.5)))
    grads = jax.grad(loss)(PARAMS, X)
    value_fn = lambda p: loss(p, X)
    tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=value_fn, selection=())


def test_the_loss_on_a_part_belongs_to_value_fn():
    tx = lwsam.as_optax(lwsam.sam(0.05, ascent=lwsam.micro_batch(0.5)))
    grad_fn = lambda p: jax.grad(loss)(p, X)
    part = lambda p: loss(p, X[:5])
    with pytest.raises(ValueError, match=r"`ascent_value_fn`.*value_fn="):
        tx.update(
            grad_fn(PARAMS),
            tx.init(PARAMS),
            PARAMS,
            grad_fn=grad_fn,
            ascent_value_fn=part,
        )


class Wrong(lwsam.Stale):
    """Along another tree, or along leaves of other shapes."""

    def __init__(self, change):
        self.change = change

    def direction(self, kept, opt_state, params, key):
        return self.change(params)


@pytest.mark.parametrize(
    "change",
    [lambda p: {"w0": p["w0"]}, lambda p: jax.tree.map(lambda w: w[:1], p)],
    ids=["structure", "shapes"],
)
def test_a_direction_of_another_kind_is_refused(change):
    method = lwsam.Method(lwsam.everything(), rho=0.05, ascent=Wrong(change))
    with pytest.raises(ValueError, match="`direction`"):
        run(method, 1)


def test_a_combination_runs_under_a_stale_ascent_too():
    nothing = lwsam.Combine(
        lambda g, d, state, alpha: (tuple(0 * x for x in d), state), needs="none"
    )
    method = lwsam.Method(
        lwsam.everything(), rho=0.05, ascent=lwsam.random(), combine=nothing
    )
    _, state, _ = run(method, 2)
    assert_close(state.params, PARAMS)


# --- shapes ---------------------------------------------------------------------------


def test_a_bare_transformation_is_a_shape():
    """One that takes no extra arguments, outside of a chain."""
    bare = lwsam.sam(0.05, shape=optax.scale(2.0))
    chain = lwsam.sam(0.05, shape=optax.chain(optax.scale(2.0)))
    assert_close(run(bare)[1].params, run(chain)[1].params)


def test_shapes_in_chains_of_perturbed_see_and_move_what_they_should():
    """The norm over all leaves stays one, and what is not selected stays where it is."""
    distances = {}
    for name, shape in {
        "alone": lwsam.normalized("all"),
        "chain": optax.chain(lwsam.normalized("all"), optax.scale(1.0)),
        "state": optax.chain(lwsam.normalized(), optax.trace(0.9)),
    }.items():
        tx = lwsam.perturbed(sgd(), 0.5, shape=shape, k=1, rule=lwsam.weights)
        held, state = PARAMS, tx.init(PARAMS)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(held, X), state, held)
            held = optax.apply_updates(held, updates)
        own = lwsam.eval_params(state, held)
        moved = {n: float(jnp.linalg.norm(held[n] - own[n])) for n in held}
        on = dict(zip(sorted(PARAMS), np.asarray(state.mask), strict=True))
        assert all(moved[n] < 1e-6 for n in moved if not on[n])
        distances[name] = max(moved.values())
    assert distances["alone"] == pytest.approx(distances["chain"], rel=1e-4)
    assert distances["alone"] < 0.499


def test_the_plain_baseline_without_a_momentum_has_eval_params():
    tx = lwsam.perturbed(optax.sgd(0.1), rho=0.0)
    state = tx.init(PARAMS)
    updates, state = tx.update(jax.grad(loss)(PARAMS, X), state, PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    assert_close(lwsam.eval_params(state, params), params, rtol=0)
    assert_close(lwsam.train_params(state, params), params, rtol=0)


# --- the functional form --------------------------------------------------------------


def test_a_weight_that_no_part_reads_is_refused():
    with pytest.raises(ValueError, match="`alpha`"):
        lwsam.value_and_grad(loss, ("w3",), method=lwsam.sam(0.05), alpha=0.5)
    method = lwsam.generalized_sam(0.05, 0.5)
    with pytest.raises(ValueError, match="`alpha`"):
        lwsam.value_and_grad(loss, ("w3",), method=method, alpha=-3.0)


def test_a_budget_is_the_train_steps_alone():
    method = lwsam.sam(0.05, max_overhead=0.1)
    with pytest.raises(ValueError, match=r"`max_overhead`.*TrainStep"):
        lwsam.value_and_grad(loss, ("w3",), method=method)


def test_refresh_compiles_once_for_one_loss():
    traces = []

    def counted(params, model_state, batch, key):
        traces.append(None)
        return loss_fn(params, model_state, batch, key)

    for _ in range(3):
        lwsam.refresh(counted, PARAMS, {}, [X, X])
    assert len(traces) == 1


def test_a_state_keeps_its_own_lag():
    """A restored state has as many masks in its queue as the step that made it."""
    method = lwsam.sam(0.05, when=lambda step: step >= 3)
    step, state, infos = run(method, 1, selection_lag=2)
    later = lwsam.TrainStep(loss_fn, sgd(), method)
    for _ in range(5):
        state, info = later(state, X)
        infos.append(info)
    assert [bool(np.any(i.mask)) for i in infos] == [False] * 3 + [True] * 3
    del step
