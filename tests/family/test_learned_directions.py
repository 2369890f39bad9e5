"""Presets whose direction or whose layers come from what earlier values taught."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import family_reference as family
import lwsam_jax as lwsam
import reference
from family_runs import (
    ALL,
    assert_follows,
    base,
    base_optimizer,
    chain,
    follow,
    from_tree,
    GRADIENT,
    loss_fn,
    LOSSES,
    MODULES,
    MOMENTUM,
    NAMES,
    problem,
    RATE,
    SIZE,
    STEPS,
    train,
)
from plain import enable_x64


MU = 1e-3
PRESETS = {
    "adazo_sam": lambda rho, **parts: lwsam.adazo_sam(rho, mu=MU, **parts),
    "lorenza": lambda rho, **parts: lwsam.lorenza(
        rho, rank=2, period=2, mu=MU, **parts
    ),
}


def seen(run):
    """The perturbation of each step, from the point that its metrics show."""
    starts = [reference.mlp_params(), *run.params[:-1]]
    points = [from_tree(metrics["point"]) for metrics in run.metrics]
    return [family.added(b, -1.0, a) for a, b in zip(starts, points, strict=True)]


def given(epsilons):
    """The oracle that gets the perturbations: d = g(w + eps)."""

    def rule(number, w, last, batch):
        ghat = GRADIENT(family.added(w, 1.0, epsilons[number]), batch)
        return family.Move(ghat, epsilons[number], ghat, ghat, {})

    return rule


@pytest.mark.parametrize("name", PRESETS)
def test_a_train_step_climbs_along_one_random_vector(name):
    """With one probe the direction is that vector, its sign that of the difference."""
    run = train(PRESETS[name](0.3))
    epsilons = seen(run)
    assert_follows(run.params, follow(given(epsilons)))
    starts = [reference.mlp_params(), *run.params[:-1]]
    batches = reference.mlp_batches(STEPS, SIZE)
    for w, epsilon, batch in zip(starts, epsilons, batches, strict=True):
        np.testing.assert_allclose(family.norm_of(epsilon.values()), 0.3)
        along = [
            LOSSES(family.added(w, side * 1e-4, epsilon), batch).mean()
            for side in (1, -1)
        ]
        assert along[0] > along[1]
    unit = [family.scaled(1 / 0.3, epsilon) for epsilon in epsilons]
    assert abs(family.inner(unit[1], unit[2])) < 0.9


@pytest.mark.parametrize("name", PRESETS)
def test_so_does_a_chain_that_sees_the_loss(name):
    run = chain(PRESETS[name](0.3), "value_fn")
    other = [
        max(np.abs(p[n] - s.params[n]).max() for n in ALL)
        for p, s in zip(run.params, follow(family.sam(GRADIENT, rho=0.0)), strict=True)
    ]
    assert min(other) > 1e-6
    with pytest.raises(ValueError, match="`grad_fn`.*value_fn=loss"):
        chain(PRESETS[name](0.3), "grad_fn")


NO_RADIUS = {
    **PRESETS,
    "sl_sam": lambda rho: lwsam.sl_sam(rho, 1),
    "m_sam": lwsam.m_sam,
}


@pytest.mark.parametrize("name", NO_RADIUS)
def test_without_a_radius_it_is_the_base_optimizer_bit_for_bit(name):
    for ours, theirs in zip(train(NO_RADIUS[name](0.0)).params, base(), strict=True):
        for path, leaf in theirs.items():
            np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


def test_a_probe_moves_the_layers_of_the_step_alone():
    """So that the difference of the loss is theirs."""
    ours = lwsam.adazo_sam(0.3, 2, MU, select=lwsam.top_k(1), rule=lwsam.weights)
    run = train(ours)
    for kept, epsilon in zip(run.kept, seen(run), strict=True):
        moved = {n for n in ALL if np.any(epsilon[n])}
        (name,) = kept
        back = {ours: name for name, ours in NAMES.items()}
        assert moved == {f"{back[name]}/kernel"}


@pytest.mark.parametrize("count", [1, 3])
def test_differences_are_those_of_the_formula(count):
    """The draws are the library's; the sum over them is written out."""
    with enable_x64(True):
        ascent = lwsam.differences(count, 1e-2)
        params, (batch, *_) = problem()
        key = jax.random.key(5)
        w = reference.mlp_params()
        value_fn = lambda p: loss_fn(p, {}, batch, None)[0]
        got = from_tree(ascent.direction((), None, params, key, value_fn))
        total = family.zeros(w)
        for j in range(count):
            own = jax.random.fold_in(key, j)
            p = from_tree(ascent.draw((), params, own))
            values = [
                LOSSES(family.added(w, mu, p), reference.mlp_batches(1, SIZE)[0]).mean()
                for mu in (1e-2, -1e-2)
            ]
            slope = (values[0] - values[1]) / 2e-2 / count
            total = family.added(total, slope, p)
        downhill = lwsam.differences(count, 1e-2, sign=-1)
        other = from_tree(downhill.direction((), None, params, key, value_fn))
    for name in ALL:
        np.testing.assert_allclose(got[name], total[name], rtol=1e-7)
        np.testing.assert_allclose(other[name], -total[name], rtol=1e-7)


def test_the_subspaces_are_those_of_the_gradient():
    """Of a gradient of rank 2, bases of its columns and rows, refreshed in step 2."""
    rng = np.random.default_rng(0)
    low = lambda: rng.normal(size=(6, 2)) @ rng.normal(size=(2, 5))
    with enable_x64(True):
        ascent = lwsam.subspace_differences(1, rank=2, period=2, seed=1)
        params = {"b": jnp.zeros(5), "w": jnp.zeros((6, 5))}
        kept, gradients = ascent.init(params, None), [low() for _ in range(3)]
        found = []
        for g in gradients:
            kept = ascent.update(kept, {"b": jnp.ones(5), "w": jnp.asarray(g)})
            found.append((np.asarray(kept.left[1]), np.asarray(kept.right[1])))
        probe = ascent.draw(kept, params, jax.random.key(0))
    for (q, r), g in zip(
        found, [gradients[0], gradients[0], gradients[2]], strict=True
    ):
        np.testing.assert_allclose(q.T @ q, np.eye(2), atol=1e-12)
        np.testing.assert_allclose(r @ r.T, np.eye(2), atol=1e-12)
        np.testing.assert_allclose(q @ q.T @ g, g, atol=1e-12)
        np.testing.assert_allclose(g @ r.T @ r, g, atol=1e-12)
    q, r = found[-1]
    middle = q.T @ np.asarray(probe["w"]) @ r.T
    np.testing.assert_allclose(middle, np.diag(np.diag(middle)), atol=1e-12)
    np.testing.assert_allclose(q @ middle @ r, probe["w"], atol=1e-12)
    assert np.linalg.matrix_rank(probe["w"]) == 2
    assert np.all(np.asarray(probe["b"]) != 0)


def test_a_probe_costs_forward_passes():
    params, batches = problem(np.float32)
    step = lwsam.TrainStep(loss_fn, base_optimizer(), lwsam.adazo_sam(0.1, 2))
    state = step.init(params, {}, batches[0], key=jax.random.key(0))
    _, info = step(state, batches[0])
    forward = sum(step.cost.forward) / step.cost.plain
    np.testing.assert_allclose(info.overhead, 4 * forward, rtol=1e-5)


def test_where_values_of_the_loss_are_not_seen():
    with pytest.raises(ValueError, match="ascent"):
        lwsam.perturbed(optax.sgd(0.1), rho=0.1, ascent=lwsam.differences())


# --- SL-SAM ---------------------------------------------------------------------------


def modules_of(names):
    """The oracle's leaves of the library's layers."""
    back = {ours: name for name, ours in NAMES.items()}
    return [leaf for name in names for leaf in MODULES[back[name]]]


def sl_sam_steps(kept, rho):
    """Given the layers of each step: what stands still keeps its velocity as well."""
    w = reference.mlp_params()
    velocity = family.zeros(w)
    path, norms = [], []
    for names, batch in zip(kept, reference.mlp_batches(STEPS, SIZE), strict=True):
        inside = modules_of(names)
        epsilon = family.to_norm(rho, family.only(GRADIENT(w, batch), inside))
        ghat = GRADIENT(family.added(w, 1.0, epsilon), batch)
        for leaf in inside:
            velocity[leaf] = MOMENTUM * velocity[leaf] + ghat[leaf]
            w = {**w, leaf: w[leaf] - RATE * velocity[leaf]}
        path.append(w)
        norms.append(
            {n: family.norm_of(ghat[x] for x in modules_of([n])) for n in names}
        )
    return path, norms


@pytest.mark.parametrize("executables", [2, 12])
def test_sl_sam_updates_what_it_draws_alone(executables):
    k, rate, explore = 1, 0.5, 0.3
    method = lwsam.sl_sam(0.3, k, rate, explore, seed=4)
    with enable_x64(True):
        params, batches = problem()
        step = lwsam.TrainStep(
            loss_fn, base_optimizer(), method, max_executables=executables
        )
        state = step.init(params, {}, batches[0], key=jax.random.key(0))
        kept, path, weights = [], [], []
        for batch in batches:
            state, info = step(state, batch)
            kept.append(step.layers.selected(info.mask))
            path.append(from_tree(state.params))
            weights.append(np.asarray(state.method_state.select))
    assert all(len(names) == k for names in kept)
    assert len(set(kept)) > 1
    expected, norms = sl_sam_steps(kept, 0.3)
    for ours, theirs in zip(path, expected, strict=True):
        for name in ALL:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12)
    v = np.zeros(3)
    for drawn, ours in zip(norms, weights, strict=True):
        chance = (1 - explore) * np.exp(v) / np.exp(v).sum() + explore / 3
        for name, norm in drawn.items():
            at = step.layers.names.index(name)
            reward = norm / max(drawn.values())
            v[at] += rate * reward / min(1, k * chance[at])
        np.testing.assert_allclose(ours, v - v.max(), rtol=1e-9)


def test_the_bandit_draws_by_its_chances():
    bandit = lwsam.bandit(1)
    chances = jnp.asarray([0.6, 0.3, 0.1])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: bandit(chances, key))(keys)
    np.testing.assert_allclose(drawn.mean(axis=0), chances, atol=0.03)
    forbidden = jax.vmap(lambda key: bandit(chances.at[0].set(-1), key))(keys[:50])
    assert not forbidden[:, 0].any()
    assert (forbidden.sum(axis=1) == 1).all()


def test_of_all_layers_it_is_sam():
    """Every leaf is of some module here."""
    run = train(lwsam.sl_sam(0.3, 3))
    assert_follows(run.params, follow(family.sam(GRADIENT, rho=0.3)))


def test_sl_sam_stops_both_backward_passes():
    """For the layer next to the output: far below a plain gradient twice."""
    params, batches = problem(np.float32)
    method = lwsam.sl_sam(0.3, 1, select=lwsam.named("a_out"))
    step = lwsam.TrainStep(loss_fn, base_optimizer(), method)
    state = step.init(params, {}, batches[0], key=jax.random.key(0))
    flops = {}
    for selection in ((), ("a_out",)):
        found = step.lower(state, batches[0], selection).compile().cost_analysis()
        found = found[0] if isinstance(found, list) else found
        flops[selection] = found["flops"]
    _, info = step(state, batches[0])
    measured = flops[("a_out",)] / flops[()]
    assert 1 + float(info.overhead) < 0.75
    assert measured == pytest.approx(1 + float(info.overhead), abs=0.15)


def test_sl_sam_with_other_parts():
    micro = lwsam.sl_sam(0.1, 2, ascent=lwsam.micro_batch(0.5))
    run = train(micro, dtype=np.float32)
    assert {len(names) for names in run.kept} == {2}
    rare = lwsam.sl_sam(0.1, 1, when=lwsam.every(2))
    lengths = [len(names) for names in train(rare, dtype=np.float32).kept]
    assert lengths == [1, 0] * (STEPS // 2)


def test_a_chain_cannot_freeze():
    with pytest.raises(ValueError, match="TrainStep"):
        lwsam.as_optax(lwsam.sl_sam(0.1, 1))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: lwsam.adazo_sam(0.1, 0), "count"),
        (lambda: lwsam.adazo_sam(0.1, mu=0), "mu"),
        (lambda: lwsam.adazo_sam(0.1, sign=2), "sign"),
        (lambda: lwsam.lorenza(0.1, rank=0), "rank"),
        (lambda: lwsam.sl_sam(0.1, 0), "k"),
        (lambda: lwsam.sl_sam(0.1, 1, explore=1.5), "explore"),
        (
            lambda: lwsam.as_optax(lwsam.Method(lwsam.bandit(4), rho=0.1)).init(
                {"w": jnp.ones((2, 2))}
            ),
            "k",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(make, argument):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        make()
