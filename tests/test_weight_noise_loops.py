"""Random weight perturbations in `optax.chain` and `perturbed`, and what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import family_reference as family
import lwsam_jax as lwsam
import reference
import weight_noise_reference as oracle
from plain import enable_x64
from weight_noise_task import (
    assert_follows,
    base_optimizer,
    BATCHES,
    follow,
    from_tree,
    HYPER,
    KERNELS,
    KEY,
    losses_of,
    method,
    MOMENTUM,
    rule_of,
    STEPS,
    to_tree,
    train,
)


# --- optax.chain and perturbed --------------------------------------------------------


ONE_POINT = {**HYPER, "damp": {"rho": 0.2, "split": None}}
ONE_POINT = {n: h for n, h in ONE_POINT.items() if n not in ("m_rwp", "m_arwp")}
RAW = functools.partial(
    lwsam.Method,
    lwsam.everything(),
    rho=1.0,
    ascent=lwsam.random(),
    shape=lwsam.raw(),
    rule=lwsam.leaves,
)


@functools.cache
def noise_of_the_transformation():
    """Its `grad_fn` may return the point at which it is called."""
    with enable_x64(True):
        w = to_tree(reference.mlp_params())
        tx, drawn = lwsam.as_optax(RAW()), []
        state = tx.init(w)
        update = jax.jit(lambda s: tx.update(w, s, w, grad_fn=lambda p: p))
        for _ in range(STEPS):
            point, state = update(state)
            drawn.append([from_tree(jax.tree.map(jnp.subtract, point, w))])
    return drawn


@pytest.mark.parametrize("name", ONE_POINT)
def test_the_transformation_follows_the_formulas(name):
    with enable_x64(True):
        ours = getattr(lwsam, name)(**ONE_POINT[name])
        tx = optax.chain(lwsam.as_optax(ours), base_optimizer())
        params = to_tree(reference.mlp_params())

        @jax.jit
        def update(params, opt_state, batch):
            loss = lambda p: losses_of(p, batch).mean()
            updates, opt_state = tx.update(params, opt_state, params, value_fn=loss)
            return optax.apply_updates(params, updates), opt_state

        opt_state, found = tx.init(params), []
        for batch in BATCHES:
            params, opt_state = update(params, opt_state, batch)
            found.append(from_tree(params))
    draws = noise_of_the_transformation()
    assert_follows(found, follow(rule_of(name, draws)))


def held(method, steps=STEPS, optimizer=None):
    """What a loop of `perturbed` holds after each step, and the unperturbed ones."""
    with enable_x64(True):
        optimizer = base_optimizer() if optimizer is None else optimizer
        tx = lwsam.perturbed(optimizer, method)
        params = to_tree(reference.mlp_params())

        @jax.jit
        def update(params, opt_state, batch):
            grads = jax.grad(lambda p: losses_of(p, batch).mean())(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        opt_state, found = tx.init(params), []
        for batch in BATCHES[:steps]:
            params, opt_state = update(params, opt_state, batch)
            own = lwsam.eval_params(opt_state, params)
            found.append((from_tree(own), from_tree(params)))
    return found


@pytest.mark.parametrize("name", ONE_POINT)
def test_perturbed_follows_the_formulas(name):
    """Gradient 0 is that of the loop's own start."""
    w = reference.mlp_params()
    drawn = [[family.zeros(w)]]
    for own, now in held(RAW(), optimizer=optax.sgd(0.0)):
        drawn.append([family.added(now, -1.0, own)])
    found = held(getattr(lwsam, name)(**ONE_POINT[name]))
    expected = follow(rule_of(name, drawn[:STEPS]))
    assert_follows([own for own, _ in found], expected, rtol=1e-7)
    moved = family.added(found[-1][1], -1.0, found[-1][0])
    assert oracle.length(moved) > 1e-3


def test_perturbed_takes_the_rule_and_the_steps_of_a_method():
    ours = lwsam.rwp(0.1, when=lwsam.every(2), rule=lwsam.weights)
    for number, (own, now) in enumerate(held(ours, steps=3)):
        moved = family.added(now, -1.0, own)
        for name, leaf in moved.items():
            is_moved = name in KERNELS and (number + 1) % 2 == 0
            assert (np.abs(leaf).max() > 1e-4) == is_moved, (name, number)


# --- Flat-LoRA ------------------------------------------------------------------------


LORA_STEPS, SCALE = 6, 1.5
IN, OUT, RANK = 5, 4, 2


def lora_tree():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape) * 0.5
    return {
        "dense": {
            "kernel": draw(IN, OUT),
            "bias": draw(OUT),
            "lora_a": draw(IN, RANK),
            "lora_b": draw(RANK, OUT),
        },
        "head": {"kernel": draw(OUT, 1)},  # without adapters: it stays
    }


def lora_loss(params, model_state, batch, key):
    del key
    x, y = batch
    dense, frozen = params["dense"], jax.lax.stop_gradient
    merged = frozen(dense["kernel"]) + SCALE * dense["lora_a"] @ dense["lora_b"]
    h = x @ merged + frozen(dense["bias"])
    out = (h @ frozen(params["head"]["kernel"]))[:, 0]
    point = {"W": dense["kernel"], "head": params["head"]["kernel"]}
    return jnp.mean((out - y) ** 2), (model_state, point)


def lora_gradient(w, batch):
    x, y = batch
    merged = w["W"] + SCALE * w["A"] @ w["B"]
    error = (x @ merged + w["bias"]) @ w["head"][:, 0] - y
    of_merged = x.T @ (2 * error[:, None] / len(y) * w["head"][:, 0])
    zero = family.zeros(w)
    return zero | {
        "A": SCALE * of_merged @ w["B"].T,
        "B": SCALE * w["A"].T @ of_merged,
    }


def lora_batches():
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(6, IN)), rng.normal(size=6)) for _ in range(LORA_STEPS)]


def lora_run(method):
    with enable_x64(True):
        step = lwsam.TrainStep(lora_loss, base_optimizer(0.05), method)
        batches = lora_batches()
        params = jax.tree.map(jnp.asarray, lora_tree())
        state = step.init(params, {}, batches[0], key=KEY)
        found = []
        for batch in batches:
            before = jax.device_get(state.params)
            state, info = step(state, batch)
            found.append((before, jax.device_get(info), jax.device_get(state.params)))
        return found


def test_flat_lora_follows_its_formula():
    found = lora_run(lwsam.flat_lora(0.3, SCALE))
    alone = lora_run(lwsam.flat_lora(1.0, SCALE, shape=lwsam.raw(), rule=lwsam.leaves))
    flat = lambda p: {"W": p["kernel"], "A": p["lora_a"], "B": p["lora_b"]}
    tree = lora_tree()
    w = flat(tree["dense"]) | {
        "bias": tree["dense"]["bias"],
        "head": tree["head"]["kernel"],
    }
    noise = []
    for before, info, _ in alone:
        z = info.metrics["W"] - before["dense"]["kernel"]
        noise.append([family.zeros(w) | {"W": z}])
    merged = lambda w: {"W": w["W"] + SCALE * w["A"] @ w["B"]}
    rule = oracle.in_parts(lora_gradient, oracle.of_rows(0.3, merged), noise)
    steps = family.trajectory(
        rule, w, lora_batches(), learning_rate=0.05, momentum=MOMENTUM
    )
    for (_, info, after), step in zip(found, steps, strict=True):
        for name, leaf in flat(after["dense"]).items():
            np.testing.assert_allclose(leaf, step.params[name], rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(after["dense"]["kernel"], w["W"])
        np.testing.assert_array_equal(info.metrics["head"], w["head"])
        gap = info.metrics["W"] - w["W"]
        np.testing.assert_allclose(gap, step.move.epsilon["W"], rtol=1e-9)
        assert info.overhead == 0


def test_flat_lora_finds_adapters_where_frameworks_put_them():
    w, a, b = jnp.ones((IN, OUT)), jnp.ones((IN, RANK)), jnp.ones((RANK, OUT))
    adapters = {"lora_a": a, "lora_b": b}
    for params in (
        {"q": {"kernel": w, **adapters}},
        {"q": {"kernel": w, "lora": adapters}},
        {"q": {"base_module": {"kernel": w}, **adapters}},
    ):
        tx = lwsam.perturbed(optax.sgd(0.1), lwsam.flat_lora(0.5, 2.0))
        state = tx.init(params)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        sizes = {
            jax.tree_util.keystr(path)[-8:-2]: float(jnp.std(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
        }
        assert sizes["lora_a"] == sizes["lora_b"] == 0
        assert 1.5 < sizes["kernel"] < 3.5  # rho (1 + 2 * RANK) is 2.5
    with pytest.raises(ValueError, match=r"flat_lora.*`names`.*lora_a") as error:
        tx.init({"q": {"kernel": w}})
    assert "Pass names=" in str(error.value)


# --- what is refused ------------------------------------------------------------------


def refused(call, *words):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    for word in words:
        assert word in str(error.value), (word, str(error.value))


def test_what_needs_the_batch_is_refused_where_nobody_has_it():
    loss = lambda p, batch: losses_of(p, batch).mean()
    for name in ("damp", "m_rwp", "m_arwp"):
        ours = method(name)
        refused(lambda ours=ours: lwsam.as_optax(ours), "`method.split`", "TrainStep")
        refused(
            lambda ours=ours: lwsam.perturbed(optax.sgd(0.1), ours),
            "`method.split`",
            "TrainStep",
        )
        refused(
            lambda ours=ours: lwsam.value_and_grad(loss, ("a",), method=ours),
            "`split`",
            "TrainStep",
        )


def test_perturbed_refuses_a_method_that_one_gradient_cannot_follow():
    make = functools.partial(lwsam.perturbed, optax.sgd(0.1))
    refused(lambda: make(lwsam.sam(0.1)), "`ascent`", "TrainStep")
    half = lwsam.Combine(lambda g, d, state, alpha: (d, state), needs="none")
    refused(lambda: make(lwsam.rwp(0.1, combine=half)), "`method.combine`")
    refused(lambda: make(lwsam.rwp(0.1), k=2), "left out beside a Method")
    refused(lambda: make(lwsam.rwp(0.1, axis_name="x")), "`method.axis_name`")


def wrong(x: Any) -> Any:
    """What no type checker may see."""
    return x


def test_numbers_out_of_range_are_refused():
    refused(lambda: lwsam.sub_batches(0), "`count`", ">= 1")
    refused(lambda: lwsam.sub_batches(wrong(1.5)), "`count`", "integer")
    refused(lambda: lwsam.sub_batches(2, clean=1.5), "`clean`")
    refused(lambda: lwsam.m_rwp(0.1, weight=2.0), "`weight`", "0.5")
    refused(lambda: lwsam.m_arwp(0.1, weight=-1), "`weight`")
    refused(lambda: lwsam.arwp(0.1, eta=-1.0), "`eta`")
    refused(lambda: lwsam.arwp(0.1, decay=2.0), "`decay`")
    refused(lambda: lwsam.flat_lora(0.1, wrong("x")), "`scale`")
    refused(lambda: lwsam.proportional("layer"), "`per`")
    refused(lambda: lwsam.proportional("element", of="rms"), "`of`")
    refused(lambda: lwsam.sam(0.1, split=8), "`split`", "sub_batches(8)")
    clean = lwsam.sub_batches(1, clean=0.5)
    refused(lambda: lwsam.sam(0.1, split=clean), "`split`", "lwsam.random()")


def test_parts_that_do_not_fit_the_batch_are_refused_before_a_step():
    refused(lambda: train(method("damp", count=3), 1), "`count`", "8 examples", "3")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    refused(
        lambda: train(method("damp", count=3), 1, parallel=mesh), "`count`", "2 devices"
    )
    stateful = lwsam.friendly_sam(0.1, split=lwsam.sub_batches(2))
    refused(lambda: train(stateful, 1), "`shape`", "state")
