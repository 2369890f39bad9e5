"""The extra work is really skipped: XLA's count of FLOPs, over a plain gradient."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import layer_nets
import lwsam_jax as lwsam
import nets


WIDTH, DEPTH, BATCH = 64, 6, 512
NAMES = tuple(f"layer_{i}" for i in range(DEPTH))
PARAMS = {name: nets.weight(WIDTH, WIDTH, seed=i) for i, name in enumerate(NAMES)}
X = nets.weight(BATCH, WIDTH, seed=9)


def forward(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name])
    return x


def mlp_loss(params, x):
    return jnp.mean(forward(params, x) ** 2)


def norm_loss(params, x):
    """With a normalization after each layer, XLA shares no prefix by itself."""
    for name in NAMES:
        x = x @ params[name]
        x = (x - x.mean(axis=0)) * jax.lax.rsqrt(x.var(axis=0) + 1e-3)
        x = jnp.maximum(x, 0.0)
    return jnp.mean(x**2)


remat_loss = jax.checkpoint(mlp_loss)
LOSSES = {"mlp": mlp_loss, "normalized": norm_loss, "remat of the whole": remat_loss}


def flops(fn, *args):
    cost = jax.jit(fn).lower(*args).compile().cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return cost["flops"]


@functools.cache
def plain(loss):
    return flops(jax.value_and_grad(LOSSES[loss]), PARAMS, X)


@functools.cache
def ratio(loss, selection, **options):
    options = {"rho": 0.1, "alpha": 0.8, **options}
    fn = lwsam.value_and_grad(LOSSES[loss], selection, **options)
    if isinstance(selection, lwsam.Cover):
        mask = jnp.zeros(DEPTH, bool)
        run = lambda p, x, m: fn(p, x, mask=m)[:3]
        return flops(run, PARAMS, X, mask) / plain(loss)
    return flops(lambda p, x: fn(p, x)[:3], PARAMS, X) / plain(loss)


# A plain gradient of n layers is n forward, n weight and n - 1 input products: 3n - 1.
# Perturbing from layer i (of m = n - i on) adds m forward products, m - 1 input
# products, and one weight product for each layer compiled for.
def ideal(first, weights):
    onward = DEPTH - first
    return 1 + (onward + (onward - 1) + weights) / (3 * DEPTH - 1)


@pytest.mark.parametrize("loss", ["mlp", "normalized"])
@pytest.mark.parametrize("first", [DEPTH - 1, DEPTH - 2, 0])
def test_one_layer_costs_the_suffix_and_its_own_gradient(loss, first):
    assert ratio(loss, (NAMES[first],)) == pytest.approx(ideal(first, 1), abs=0.03)


@pytest.mark.parametrize("loss", ["mlp", "normalized"])
def test_all_layers_cost_two_gradients(loss):
    assert ratio(loss, NAMES) <= 2.01
    assert ratio(loss, NAMES) >= 1.97


def test_a_tuple_pays_for_its_layers_and_a_cover_for_all_above_the_cut():
    ends = ratio("mlp", (NAMES[1], NAMES[-1]))
    assert ends == pytest.approx(ideal(1, 2), abs=0.03)
    cover = ratio("mlp", lwsam.Cover(NAMES[1:]))
    assert cover == pytest.approx(ideal(1, DEPTH - 1), abs=0.05)


def test_the_empty_selection_costs_nothing():
    assert ratio("mlp", ()) == pytest.approx(1.0, abs=0.01)


def test_the_traced_selection_costs_what_sam_costs():
    """A mask prunes nothing."""
    tx = lwsam.layerwise_sam(k=1, rho=0.1, alpha=0.8)
    loss = lambda p: mlp_loss(p, X)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    run = lambda p, s: tx.update(zeros, s, p, value_fn=loss)
    cost = flops(run, PARAMS, tx.init(PARAMS)) / plain("mlp")
    assert cost == pytest.approx(2.0, abs=0.1)


def test_the_whole_gradient_in_the_norm_costs_a_whole_ascent():
    assert ratio("mlp", (NAMES[-1],), normalize="selected") < 1.2
    full = ratio("mlp", (NAMES[-1],), normalize="full")
    assert 1.6 < full <= 2.01


def test_a_remat_of_the_whole_net_is_looked_into():
    """Kept whole it would leave no prefix, and cost a whole forward pass more."""
    cheap = ratio("remat of the whole", (NAMES[-1],))
    whole = ratio("remat of the whole", NAMES)
    assert cheap <= 1.15
    assert whole > 1.6


def test_unused_gradients_of_the_caller_are_dropped():
    """jit drops the gradient that the caller passes and nobody reads."""
    tx = lwsam.layerwise_sam(k=1, rho=0.1, alpha=0.8)
    loss = lambda p: mlp_loss(p, X)

    def run(params, state):
        return tx.update(
            jax.grad(loss)(params), state, params, value_fn=loss, selection=NAMES[-1:]
        )

    cost = flops(run, PARAMS, tx.init(PARAMS)) / plain("mlp")
    assert cost == pytest.approx(ideal(DEPTH - 1, 1), abs=0.05)


@pytest.mark.parametrize(
    "selection", [(), NAMES[-1:], NAMES[:1], (NAMES[1], NAMES[4]), NAMES], ids=len
)
def test_the_cost_model_agrees_with_the_compiler(selection):
    """`step_cost` counts a trace and compiles nothing."""
    cost = lwsam.step_cost(mlp_loss, PARAMS, X)
    assert cost.ratio(selection) == pytest.approx(ratio("mlp", selection), abs=0.03)


def climbed(params, selection, x):
    """The parameters a step up from the given examples; only these layers move."""
    own = {name: params[name] for name in selection}
    ascent = jax.grad(lambda own: mlp_loss({**params, **own}, x))(own)
    return {**params, **{name: params[name] + 0.1 * ascent[name] for name in own}}


@pytest.mark.parametrize("selection", [NAMES[-1:], NAMES[:1], NAMES], ids=str)
@pytest.mark.parametrize("fraction", [1 / 4, 1 / 16])
def test_the_cost_model_agrees_on_an_ascent_of_a_part_of_the_batch(selection, fraction):
    def step(params, x):
        moved = climbed(params, selection, x[: int(fraction * BATCH)])
        return jax.value_and_grad(mlp_loss)(moved, x)

    found = flops(step, PARAMS, X) / plain("mlp")
    cost = lwsam.step_cost(mlp_loss, PARAMS, X)
    assert cost.ratio(selection, fraction) == pytest.approx(found, rel=0.02)
    assert cost.ratio(selection, Part(fraction)) == cost.ratio(selection, fraction)


def test_the_cost_model_agrees_on_a_whole_ascent_of_a_part_of_the_batch():
    def step(params, x):
        ascent = jax.grad(mlp_loss)(params, x[: BATCH // 4])
        scale = 0.1 / optax.tree.norm(ascent)
        last = NAMES[-1]
        moved = {**params, last: params[last] + scale * ascent[last]}
        return jax.value_and_grad(mlp_loss)(moved, x)

    found = flops(step, PARAMS, X) / plain("mlp")
    cost = lwsam.step_cost(mlp_loss, PARAMS, X)
    modelled = cost.ratio(NAMES[-1:], 1 / 4, whole_ascent=True)
    assert modelled == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("selection", [NAMES[-1:], NAMES[:1]], ids=str)
def test_the_cost_model_agrees_on_a_descent_of_a_part_of_the_batch(selection):
    """The choice of its examples takes a forward pass at the perturbed point."""

    def step(params, x):
        moved = climbed(params, selection, x)
        start = jnp.int32(mlp_loss(moved, x) > 0)  # stands for a choice by the losses
        picked = jax.lax.dynamic_slice_in_dim(x, start, BATCH // 2)
        return jax.value_and_grad(mlp_loss)(moved, picked)

    found = flops(step, PARAMS, X) / plain("mlp")
    cost = lwsam.step_cost(mlp_loss, PARAMS, X)
    assert cost.ratio(selection, descent=0.5) == pytest.approx(found, rel=0.02)


class Part:
    """What asks for the number of examples, as an ascent does."""

    def __init__(self, share):
        self.share = share

    def fraction(self, examples):
        return int(self.share * examples) / examples


def test_a_train_step_costs_what_its_selection_costs():
    def loss(params, model_state, batch, key):
        return norm_loss(params, batch), (model_state, {})

    method = lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8)
    step = lwsam.TrainStep(loss, optax.sgd(0.1), method)
    state = step.init(PARAMS, {}, X, key=jax.random.key(0))
    count = {
        selection: step.lower(state, X, selection).compile().cost_analysis()["flops"]
        for selection in ((), NAMES[-1:], NAMES)
    }
    assert count[NAMES[-1:]] / count[()] < ideal(DEPTH - 1, 1) + 0.05
    assert count[NAMES] / count[()] <= 2.01


def test_convolutions_are_skipped_as_well():
    case = layer_nets.list_of_convolutions()
    images = nets.weight(8, 8, 8, 2)
    loss = lambda p, x: case.loss(p, x)[0]
    base = flops(jax.value_and_grad(loss), case.params, images)
    costs = []
    for selected in (("a_out",), ("blocks/10",), ("blocks/5",), case.names):
        fn = lwsam.value_and_grad(loss, selected, rho=0.1, alpha=0.8)
        costs.append(
            flops(lambda p, x, fn=fn: fn(p, x)[:3], case.params, images) / base
        )
    assert costs == sorted(costs)
    assert costs[0] < 1.03
    assert costs[1] < 1.15
    assert 1.3 < costs[2] < 1.7
    assert costs[3] <= 2.01
