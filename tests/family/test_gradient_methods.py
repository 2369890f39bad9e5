"""Presets of two gradients against their oracles: what forms the perturbation, and d."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import family_reference as family
import gradient_oracles as oracles
import lwsam_jax as lwsam
import reference
from family_runs import (
    ALL,
    assert_follows,
    base,
    base_optimizer,
    chain,
    example_losses,
    flat_norm,
    follow,
    from_tree,
    GRADIENT,
    loss_fn,
    problem,
    pulled,
    pulling_batches,
    RATE,
    SIZE,
    train,
)
from plain import enable_x64


class Case(NamedTuple):
    """A preset with its numbers, and its oracle; both take the radius."""

    ours: Callable[..., lwsam.Method]
    oracle: Callable[..., family.Rule]
    rho: float = 0.3
    in_a_chain: bool = True


def role(name: str) -> str:
    return {"z": "input", "a": "output"}.get(name[0], "hidden")


def powers(width: float) -> dict[str, float]:
    exponents = {
        "z_in/kernel": 1.5,
        "z_in/bias": 1.5,
        "m_mid/kernel": 0.5,
        "m_mid/bias": 1.5,
        "a_out/kernel": -0.5,
        "a_out/bias": 0.5,
    }
    return {name: width**power for name, power in exponents.items()}


def case(ours: Any, oracle: Any, numbers: dict[str, Any] | None = None, **more: Any):
    """A case whose preset and oracle take the same numbers."""
    numbers = numbers or {}
    return Case(
        lambda rho, **parts: ours(rho, **numbers, **parts),
        lambda rho: oracle(GRADIENT, rho=rho, **numbers),
        **more,
    )


CASES = {
    "gcsam": case(lwsam.gcsam, oracles.gcsam),
    "gcsam, of tensors, both": Case(
        lambda rho, **parts: lwsam.gcsam(rho, "tensor", True, **parts),
        lambda rho: oracles.gcsam(GRADIENT, rho=rho, over="tensor", descent=True),
    ),
    "async_sam": case(lwsam.async_sam, oracles.async_sam),
    "lightsam I": case(lwsam.lightsam, oracles.lightsam, {"variant": "I"}),
    "lightsam II": case(lwsam.lightsam, oracles.lightsam, {"variant": "II"}, rho=0.05),
    "lightsam III": case(
        lwsam.lightsam,
        oracles.lightsam,
        {"variant": "III", "b1": 0.7, "b2": 0.8, "delta": 1e-3},
        rho=0.05,
    ),
    "mup_perturbation": Case(
        lambda rho, **parts: lwsam.mup_perturbation(rho, 2.0, role, **parts),
        lambda rho: oracles.mup_all(GRADIENT, rho=rho, powers=powers(2.0)),
        rho=0.1,
    ),
    "mup_perturbation, per layer": Case(
        lambda rho, **parts: lwsam.mup_perturbation(rho, per="layer", **parts),
        lambda rho: oracles.mup_each(GRADIENT, rho=rho),
        rho=0.1,
    ),
    "stable_sam": case(lwsam.stable_sam, oracles.stable_sam),
    "stable_sam, raw": case(lwsam.stable_sam, oracles.stable_sam, {"normalize": False}),
    "wsam, coupled": case(lwsam.wsam, oracles.wsam, {"gamma": 0.6, "coupled": True}),
    "wsam": Case(
        lambda rho, **parts: lwsam.wsam(rho, 0.6, learning_rate=RATE, **parts),
        lambda rho: oracles.wsam(GRADIENT, rho=rho, gamma=0.6, coupled=False),
        in_a_chain=False,
    ),
}
CASES["gam"] = case(
    lwsam.gam, oracles.gam, {"radius": 0.1, "beta0": 0.3, "beta1": 0.6, "gamma": 0.2}
)
GATE = {"total_steps": 6, "decay": 0.5, "first": 0.6, "last": 0.2}
CASES["ae_sam"] = case(lwsam.ae_sam, oracles.ae_sam, GATE)
CASES["ae_sam, reusing"] = Case(
    lambda rho, **parts: lwsam.ae_sam(
        rho, **{**GATE, "combine": lwsam.reuse(0.7), **parts}
    ),
    lambda rho: oracles.ae_sam(GRADIENT, rho=rho, weight=0.7, **GATE),
)
SAM = family.sam(GRADIENT, rho=0.3)


@pytest.mark.parametrize("name", CASES)
def test_a_train_step_follows_the_formula(name):
    found = CASES[name]
    run = train(found.ours(found.rho))
    steps = follow(found.oracle(found.rho))
    assert_follows(run.params, steps)
    moved = [oracles.size(step.move.epsilon) > 1e-3 for step in steps]
    if name.startswith("ae_sam"):
        assert 0 < sum(moved) < len(moved)
        assert [info.mask.all() for info in run.infos] == moved
        assert [info.overhead > 0 for info in run.infos] == moved
        np.testing.assert_allclose(
            [info.rho for info in run.infos], 0.3 * np.array(moved)
        )
    else:
        assert all(moved[1 if name == "async_sam" else 0 :])


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.in_a_chain])
def test_a_chain_follows_the_formula(name):
    found = CASES[name]
    form = "grad_fn" if list(CASES).index(name) % 2 else "value_fn"
    form = "value_fn" if name == "gam" else form
    assert_follows(
        chain(found.ours(found.rho), form).params, follow(found.oracle(found.rho))
    )


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.in_a_chain])
def test_or_a_chain_refuses_it_with_a_remedy(name):
    with pytest.raises(ValueError, match="TrainStep"):
        lwsam.as_optax(CASES[name].ours(0.3))


@pytest.mark.parametrize("name", CASES)
def test_without_a_radius_it_is_the_base_optimizer_bit_for_bit(name):
    for ours, theirs in zip(train(CASES[name].ours(0.0)).params, base(), strict=True):
        for path, leaf in theirs.items():
            np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


@pytest.mark.parametrize("name", CASES)
def test_zero_gradients_and_a_schedule_that_makes_the_radius_zero(name):
    """The gradient of step 0 is 0; from step 2 on the radius is."""
    ours = CASES[name].ours(lambda step: 0.1 * (step < 2))
    records = pulled(ours, pulling_batches(4))
    assert flat_norm(records[0][2]) == 0
    for _, g, added, _ in records[2:]:
        # Of one d is centered whatever the radius, another has a second radius.
        if "both" not in name and name != "gam":
            assert flat_norm(added) <= 1e-6 * flat_norm(g)


LIMITS = {
    "mup_perturbation at the base width": lambda: lwsam.mup_perturbation(0.3),
    "wsam of one half, coupled": lambda: lwsam.wsam(0.3, 0.5, coupled=True),
    "wsam of alpha 4 is generalized_sam": lambda: lwsam.wsam(0.3, 0.8, coupled=True),
    "wsam of zero": lambda: lwsam.wsam(0.3, 0.0, coupled=True),
    "wsam of zero, decoupled": lambda: lwsam.wsam(0.3, 0.0, learning_rate=RATE),
    "gam of its first step": lambda: lwsam.gam(0.2, 0.3, beta1=1.0, gamma=0.0),
    "ae_sam of an open gate": lambda: lwsam.ae_sam(0.3, 6, first=-1e9, last=-1e9),
    "ae_sam of a closed gate is zero": lambda: lwsam.ae_sam(
        0.3, 6, first=1e9, last=1e9
    ),
    "sparse_sam of every element": lambda: lwsam.sparse_sam(0.3, 0.0),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits(name):
    rule = SAM
    if "alpha 4" in name:
        rule = family.generalized_sam(GRADIENT, rho=0.3, alpha=4.0)
    elif "zero" in name:
        rule = family.sam(GRADIENT, rho=0.0)
    assert_follows(train(LIMITS[name]()).params, follow(rule))


def test_norms_and_directions_of_the_oracles():
    """What the papers say of their perturbations and updates."""
    for name in ("gcsam", "async_sam"):
        for step in follow(CASES[name].oracle(0.3))[1:]:
            np.testing.assert_allclose(oracles.size(step.move.epsilon), 0.3)
    for step in follow(CASES["stable_sam"].oracle(0.3)):
        move = step.move
        np.testing.assert_allclose(oracles.size(move.update), oracles.size(move.ascent))
        np.testing.assert_allclose(oracles.cosine(move.update, move.descent), 1.0)
    first = follow(CASES["lightsam I"].oracle(0.3))[0]
    np.testing.assert_allclose(oracles.size(first.move.epsilon), 0.3)


def test_a_zero_at_the_perturbed_point_gives_zero():
    g, zero = (jnp.asarray([3.0, 4.0]),), (jnp.zeros(2),)
    for part in (lwsam.match_norm(), lwsam.flatness(0.1, 0.5, 0.5, 0.1)):
        twice = 2 if part.pair else 1
        found, _ = part.update(g * twice, zero * twice, (), None)
        assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(lwsam.match_norm().update(g, zero, (), None)[0][0], 0)
    near = (jnp.asarray([0.3, 0.4]),)
    (found,), _ = lwsam.match_norm().update(g, near, (), None)
    np.testing.assert_allclose(found, g[0], rtol=1e-6)


def test_a_gate_reads_the_gradient_of_every_leaf_at_its_price():
    """Of one layer as well; closed it is a plain step."""
    ours = lwsam.ae_sam(0.3, 6, select=lwsam.named("a_out"), rule=lwsam.weights)
    step = lwsam.TrainStep(loss_fn, base_optimizer(), ours)
    params, batches = problem(np.float32)
    state = step.init(params, {}, batches[0], key=jax.random.key(0))
    flops = lambda *given: flops_of(step.lower(state, batches[0], *given).compile())
    plain, opened = flops(()), flops()
    _, info = step(state, batches[0])
    assert float(info.rho) > 0
    alone = step.cost.ratio(("a_out",)) - 1
    assert float(info.overhead) > alone
    np.testing.assert_allclose(opened / plain, 1 + float(info.overhead), atol=0.15)


def flops_of(compiled):
    found = compiled.cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


def test_decoupled_wsam_bypasses_the_momentum():
    """With momentum the two forms part after the first step, and not before."""
    ours = lambda **form: train(lwsam.wsam(0.3, 0.6, **form)).params
    coupled, decoupled = ours(coupled=True), ours(learning_rate=lambda t: RATE + 0 * t)
    apart = [
        max(np.abs(a[name] - b[name]).max() for name in ALL)
        for a, b in zip(coupled, decoupled, strict=True)
    ]
    assert apart[0] < 1e-12
    assert min(apart[1:]) > 1e-4


# --- any ascent, any selection --------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CASES if n != "ae_sam, reusing"])
def test_a_part_of_the_batch_and_the_largest_layers(name):
    """Every one runs so, and perturbs two layers; AE-SAM where its gate opens."""
    ours = CASES[name].ours(
        0.1, ascent=lwsam.micro_batch(0.25), select=lwsam.top_k(2), rule=lwsam.weights
    )
    run = train(ours, dtype=np.float32)
    some = {0, 2} if name == "ae_sam" else {2}
    assert {len(names) for names in run.kept[1:]} == some


@pytest.mark.parametrize("name", ["gcsam", "async_sam", "lightsam II"])
def test_along_the_momentum(name):
    run = train(CASES[name].ours(0.1, ascent=lwsam.momentum()), dtype=np.float32)
    assert all(len(names) == 6 for names in run.kept)


@pytest.mark.parametrize("name", ["stable_sam", "wsam", "gam"])
def test_there_is_nothing_to_combine_along_the_momentum(name):
    with pytest.raises(ValueError, match="combine"):
        CASES[name].ours(0.1, ascent=lwsam.momentum())


# --- Sparse SAM's masks ---------------------------------------------------------------


def test_sparse_sam_follows_the_formula_and_its_masks():
    """Masks are drawn; what is dropped are the active elements of smallest |g|."""
    method = lwsam.sparse_sam(0.3, 0.5, period=2, total_steps=6, drop=0.5)
    run = train(method)
    masks = [mask_of(state.memory) for state in run.states]
    steps = follow(oracles.sparse_sam(GRADIENT, rho=0.3, masks=masks))
    assert_follows(run.params, steps)
    count = sum(leaf.size for leaf in masks[0].values())
    flat = [np.concatenate([mask[n].ravel() for n in ALL]) for mask in masks]
    assert all(mask.sum() == round(count / 2) for mask in flat)
    grads = [np.concatenate([s.move.ascent[n].ravel() for n in ALL]) for s in steps]
    for t in range(1, 6):
        if t % 2:
            np.testing.assert_array_equal(flat[t], flat[t - 1])
            continue
        share = 0.5 * (1 + np.cos(np.pi * t / 6)) / 2
        dropped = int(share * flat[t].sum())
        active = np.flatnonzero(flat[t - 1])
        order = active[np.argsort(-np.abs(grads[t])[active])]
        stay = order[: len(order) - dropped]
        assert flat[t][stay].all()
        assert 0 < (flat[t] != flat[t - 1]).sum() <= 2 * dropped


def mask_of(memory):
    found = [x for x in jax.tree.leaves(memory, is_leaf=is_mask) if is_mask(x)]
    (state,) = found
    return from_tree(state.mask)


def is_mask(x):
    return isinstance(x, lwsam.ElementMask)


def test_four_gradients_are_not_of_one_function_and_cost_four():
    with pytest.raises(ValueError, match="value_fn"):
        chain(CASES["gam"].ours(0.3), "grad_fn")
    for part in ({"when": lwsam.unusual(6)}, {"descent": lwsam.sharpest(0.5)}):
        with pytest.raises(ValueError, match="`combine`.*takes two"):
            lwsam.gam(0.1, **part)
    info = train(CASES["gam"].ours(0.3)).infos[0]
    np.testing.assert_allclose(1 + info.overhead, 4.0, atol=0.05)


@pytest.mark.parametrize("form", ["step", "chain"])
def test_the_radius_of_gsam_may_follow_the_learning_rate(form):
    """And alpha a schedule of its own: both are read at the number of the gradient."""
    rate = lambda t: 0.3 * 0.5**t
    low, high, largest = 0.05, 0.4, rate(0)
    rho = lambda t: low + (high - low) * rate(t) / largest
    alpha = lambda t: 0.2 + 0.1 * t

    def rule(number, *rest):
        return family.gsam(GRADIENT, rho=rho(number), alpha=alpha(number))(
            number, *rest
        )

    method = lwsam.gsam(rho, alpha)
    run = train(method) if form == "step" else chain(method, "value_fn")
    assert_follows(run.params, follow(rule))
    if form == "step":
        radii = [float(info.rho) for info in run.infos]
        np.testing.assert_allclose(radii, [rho(t) for t in range(len(radii))])


def test_the_fisher_mask_is_that_of_single_examples_and_the_loop_sets_it():
    """Until then nothing is perturbed; then the largest half of the elements is."""
    w, batches = reference.mlp_params(), reference.mlp_batches(4, SIZE)
    fisher = family.zeros(w)
    for i in range(SIZE):
        g = GRADIENT(w, family.rows_of(batches[0], [i]))
        fisher = {name: leaf + g[name] ** 2 for name, leaf in fisher.items()}
    flat = np.concatenate([leaf.ravel() for leaf in fisher.values()])
    bound = np.sort(flat)[-round(len(flat) / 2)]
    expected = {name: leaf >= bound for name, leaf in fisher.items()}
    with enable_x64(True):
        params, given = problem()
        loss = lambda p, batch: jnp.mean(example_losses(p, batch))
        mask = lwsam.fisher_mask(loss, params, given[0], sparsity=0.5)
        method = lwsam.sparse_sam(0.3, 0.5, "fisher")
        step = lwsam.TrainStep(loss_fn, base_optimizer(), method)
        state = step.init(params, {}, given[0], key=jax.random.key(0))
        path = []
        for number, batch in enumerate(given[:4]):
            if number == 2:
                state = lwsam.set_mask(state, mask)
            state, _ = step(state, batch)
            path.append(from_tree(state.params))
    for name, leaf in from_tree(mask).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    none = {name: np.zeros_like(leaf) for name, leaf in w.items()}
    rule = oracles.sparse_sam(GRADIENT, rho=0.3, masks=[none, none, expected, expected])
    assert_follows(path, follow(rule, batches=batches))
    with pytest.raises(ValueError, match="ElementMask"):
        lwsam.set_mask({"w": jnp.ones(2)}, mask)


def test_adasam_is_sam_with_amsgrad():
    """Its formula with the bias corrections that Optax has."""
    rate, b1, b2, eps, rho = 0.01, 0.9, 0.999, 1e-8, 0.3
    with enable_x64(True):
        params, given = problem()
        tx = optax.chain(lwsam.as_optax(lwsam.sam(rho)), optax.amsgrad(rate))
        state, path = tx.init(params), []

        @jax.jit
        def update(params, state, batch):
            loss = lambda p: jnp.mean(example_losses(p, batch))
            grads = jax.grad(loss)(params)
            updates, state = tx.update(grads, state, params, value_fn=loss)
            return optax.apply_updates(params, updates), state

        for batch in given:
            params, state = update(params, state, batch)
            path.append(from_tree(params))
    w = reference.mlp_params()
    m, v, largest = family.zeros(w), family.zeros(w), family.zeros(w)
    for t, (ours, batch) in enumerate(
        zip(path, reference.mlp_batches(len(path), SIZE), strict=True), start=1
    ):
        epsilon = family.to_norm(rho, GRADIENT(w, batch))
        d = GRADIENT(family.added(w, 1.0, epsilon), batch)
        for name in w:
            m[name] = b1 * m[name] + (1 - b1) * d[name]
            v[name] = b2 * v[name] + (1 - b2) * d[name] ** 2
            largest[name] = np.maximum(largest[name], v[name] / (1 - b2**t))
            step = m[name] / (1 - b1**t) / (np.sqrt(largest[name]) + eps)
            w = {**w, name: w[name] - rate * step}
            np.testing.assert_allclose(ours[name], w[name], rtol=1e-8, atol=1e-10)
