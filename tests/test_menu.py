"""Which executables there are, what they are charged, and what a run compiles of them."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lwsam_jax as lwsam
from lwsam_jax._train.budget import Purse
from lwsam_jax._train.executables import Executables, Menu
from test_budget import loss_fn, make_batches, make_params


ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDED = ROOT / "benchmarks" / "results" / "speed" / "speed-check.jsonl"
SAME_PRICE = 1.02


def stack(count):
    """That many layers, whose order is their depth."""
    params = {
        f"w{i:02}": jax.ShapeDtypeStruct((2, 2), np.float32) for i in range(count)
    }
    return lwsam.Layers.of(params)


def ratio_of(overheads):
    """Prices of covers that start at a depth: overheads of the layers, falling."""
    by_name = {f"w{i:02}": x for i, x in enumerate(overheads)}
    return lambda cover: 1.0 + max((by_name[n] for n in cover.names), default=0.0)


def random_overheads(rng, count):
    """Falling from the input on, some steps of them tiny, the last ones free."""
    steps = rng.choice([0.0, 0.003, 0.03, 0.2], size=count) * rng.random(count)
    return np.cumsum(steps[::-1])[::-1]


CASES = [
    (seed, most, bound, share)
    for seed, (most, (bound, share)) in enumerate(
        itertools.product(
            (2, 3, 4, 9, 12),
            ((None, None), (0.2, None), (None, 0.1), (None, 0.6), (0.5, 0.1)),
        )
    )
]


@pytest.mark.parametrize(("seed", "most", "bound", "share"), CASES)
def test_a_menu_is_few_nested_sets_by_rising_price(seed, most, bound, share):
    rng = np.random.default_rng(seed)
    for count in (1, 2, 5, 20, 40):
        overheads, layers = random_overheads(rng, count), stack(count)
        menu = Menu(layers, ratio_of(overheads), most, bound=bound, share=share)
        sets = [set(cover.names) for cover in menu.covers]
        assert menu.covers[0] == lwsam.Cover(())
        assert menu.prices[0] == 0.0
        assert len(sets) == len(menu.prices) <= most
        for small, large in itertools.pairwise(sets):
            assert small < large
        # Every set is a cover, at its own price.
        by_size = {len(s): overheads[count - len(s)] for s in sets if s}
        for own, price in zip(sets[1:], menu.prices[1:], strict=True):
            assert own == set(layers.names[count - len(own) :])
            np.testing.assert_allclose(price, by_size[len(own)], atol=1e-12)
        affordable = [x for x in overheads if bound is None or x <= bound + 1e-12]
        if affordable:  # what may be had for the most is always there
            np.testing.assert_allclose(menu.prices[-1], max(affordable), atol=1e-12)
            largest = len(affordable)
            assert len(sets[-1]) == largest
        else:
            assert len(sets) == 1
        pinned = [x for x in affordable if share is not None and x <= share]
        for low, high in itertools.pairwise(menu.prices[1:]):
            apart = (1 + high) > (1 + low) * SAME_PRICE
            assert apart or (pinned and np.isclose(low, max(pinned)))
        if pinned and most > 2:
            assert len(pinned) in map(len, sets)


@pytest.mark.parametrize(("seed", "most", "bound", "share"), CASES)
def test_a_selection_runs_on_the_cheapest_set_that_holds_it(seed, most, bound, share):
    rng = np.random.default_rng(seed)
    layers = stack(12)
    menu = Menu(
        layers, ratio_of(random_overheads(rng, 12)), most, bound=bound, share=share
    )
    price_of = dict(zip(menu.covers, menu.prices, strict=True))
    for _ in range(50):
        mask = rng.random(12) < 0.2
        names = set(layers.selected(mask))
        cover = menu.fitting(menu.bits(layers.selected(mask)))
        holding = [c for c in menu.covers if names <= set(c.names)]
        prices = menu.layer_prices[mask]
        if holding:
            assert price_of[cover] == min(price_of[c] for c in holding)
            # What budgets count: the largest of the layers' prices.
            assert price_of[cover] == max(prices, default=0.0)
        else:
            assert np.isinf(prices).any()
            assert cover == (menu.covers[-1] if bound else lwsam.Cover(layers.names))


def test_a_menu_with_room_for_all_loses_no_more_than_two_percent():
    rng = np.random.default_rng(0)
    for count in (5, 20, 60):
        overheads = random_overheads(rng, count)
        menu = Menu(stack(count), ratio_of(overheads), 1000)
        assert (1 + menu.layer_prices <= (1 + overheads) * SAME_PRICE + 1e-12).all()
        assert (menu.layer_prices >= overheads - 1e-12).all()


def test_sets_of_one_price_are_one():
    menu = Menu(stack(9), ratio_of([0.0] * 9), 9)
    assert [len(cover) for cover in menu.covers] == [0, 9]
    menu = Menu(stack(4), ratio_of([0.5, 0.495, 0.49, 0.1]), 9)
    assert [len(cover) for cover in menu.covers] == [0, 1, 4]


def test_a_menu_that_may_be_larger_offers_no_dearer_run():
    overheads = random_overheads(np.random.default_rng(4), 30)
    layers, mean = stack(30), []
    for most in range(2, 14):
        mean.append(Menu(layers, ratio_of(overheads), most).layer_prices.mean())
    assert mean[-1] < mean[0]


# --- sets that are known beforehand ---------------------------------------------------


@pytest.mark.parametrize("chosen", [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]], ids=str)
def test_a_known_set_is_the_menu(chosen):
    menu = Menu(
        stack(4),
        ratio_of([1.0, 0.6, 0.3, 0.1]),
        9,
        chosen=list(map(bool, chosen)),
        bound=2.0,
    )
    names = tuple(n for n, on in zip(stack(4).names, chosen, strict=True) if on)
    assert menu.covers == (lwsam.Cover(()), lwsam.Cover(names))


def test_a_known_set_above_the_bound_is_taken_as_far_as_it_pays():
    menu = Menu(
        stack(4),
        ratio_of([1.0, 0.6, 0.3, 0.1]),
        9,
        chosen=[True, False, True, True],
        bound=0.5,
    )
    sets = [cover.names for cover in menu.covers]
    assert sets == [(), ("w03",), ("w02", "w03")]
    assert max(menu.prices) <= 0.5


def test_nothing_has_a_menu_of_one():
    menu = Menu(stack(3), ratio_of([1.0, 0.5, 0.1]), 9, chosen=[False] * 3)
    assert menu.covers == (lwsam.Cover(()),)


BATCHES = make_batches(8)


def run(method, steps=8, **options):
    at = lambda i: jax.tree.map(lambda x: x[i], BATCHES)
    step = lwsam.TrainStep(loss_fn, optax.sgd(0.05, momentum=0.9), method, **options)
    state = step.init(make_params(), {}, at(0), key=jax.random.key(3))
    infos = []
    for i in range(steps):
        state, info = step(state, at(i))
        infos.append(jax.device_get(info))
    return step, state, infos


KNOWN = {
    "one": (lwsam.named("w1"), ("w1",)),
    "two apart": (lwsam.named("w0|w3"), ("w0", "w3")),
    "everything": (lwsam.everything(), ("w0", "w1", "w2", "w3")),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_set_compiles_exactly_its_set_once(name):
    select, names = KNOWN[name]
    step, _, infos = run(lwsam.Method(select, rho=0.05))
    assert step.executables == (lwsam.Cover(names),)
    price = step.cost.ratio(names) - 1
    assert infos[0].overhead == pytest.approx(price)
    assert all(step.layers.selected(info.mask) == names for info in infos)


STALE = {
    "momentum": lwsam.momentum(),
    "previous": lwsam.previous(),
    "random": lwsam.random(),
}


@pytest.mark.parametrize("name", STALE)
def test_a_stale_ascent_has_one_executable_at_no_price(name):
    step, _, infos = run(lwsam.Method(lwsam.top_k(2), rho=0.05, ascent=STALE[name]))
    assert step.executables == (lwsam.Cover(step.layers.names),)
    assert all(info.overhead == 0.0 for info in infos)
    assert len({tuple(info.mask) for info in infos}) > 1


def test_a_tail_needs_two_executables():
    method = lwsam.Method(lwsam.everything(), rho=0.05, when=lwsam.last(0.25, 8))
    step, _, infos = run(method)
    assert step.executables == (lwsam.Cover(()), lwsam.Cover(step.layers.names))
    assert [bool(info.mask.any()) for info in infos] == [False] * 6 + [True] * 2


def test_a_micro_batch_needs_fewer_executables_than_the_whole_batch():
    """What a tenth of the batch costs differs little from layer to layer."""
    method = lambda ascent: lwsam.Method(lwsam.random_k(1), rho=0.05, ascent=ascent)
    whole = run(method(lwsam.whole_batch()), steps=1)[0]._compiled._menu
    tenth = run(method(lwsam.micro_batch(0.1)), steps=1)[0]._compiled._menu
    assert len(tenth.covers) < len(whole.covers)
    assert max(tenth.prices) <= 1 / 16 + 1e-9  # floor(0.1 * 16) examples


@pytest.mark.parametrize("most", [2, 3, 4])
def test_a_run_compiles_no_more_than_the_menu_has(most):
    method = lwsam.Method(lwsam.random_k(1), rho=0.05, when=lambda step: step != 3)
    step, _, _ = run(method, max_executables=most)
    assert len(step.executables) <= most
    assert set(step.executables) <= set(step._compiled._menu.covers)


# --- budgets --------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.03, 0.1, 0.35, 0.8])
@pytest.mark.parametrize("most", [2, 3, 9])
@pytest.mark.parametrize("bound", [None, 0.7])
def test_the_mean_of_what_runs_is_never_above_the_share(share, most, bound):
    """Charged is the executable that runs, whatever the norms are."""
    rng = np.random.default_rng(most)
    layers, overheads = stack(8), random_overheads(rng, 8)
    method = lwsam.Method(
        lwsam.top_k(2), rho=0.1, mean_overhead=share, max_overhead=bound
    )
    menu = Menu(layers, ratio_of(overheads), most, bound=bound, share=share)
    purse = Purse(method, layers, menu)
    price_of = dict(zip(menu.covers, menu.prices, strict=True))
    choose = jax.jit(purse.choose)
    unspent, total = purse.first().unspent, 0.0
    for number in range(60):
        norms = jnp.asarray(rng.random(8), jnp.float32)
        mask, unspent = choose(norms, jnp.int32(number), unspent)
        cover = menu.fitting(menu.bits(layers.selected(mask)))
        assert bound is None or price_of[cover] <= bound
        total += price_of[cover]
        assert total / (number + 1) <= share + 1e-5
    assert total > 0


@pytest.mark.parametrize("most", [2, 3, 9])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.9])
def test_budgets_hold_in_a_run_with_any_number_of_executables(most, share):
    method = lwsam.Method(lwsam.top_k(2), rho=0.05, mean_overhead=share)
    step, _, infos = run(method, max_executables=most)
    means = np.cumsum([info.overhead for info in infos]) / np.arange(1, 9)
    assert (means <= share + 1e-5).all()
    np.testing.assert_allclose([i.mean_overhead for i in infos], means, rtol=1e-5)
    assert len(step.executables) <= most
    prices = dict(
        zip(step._compiled._menu.covers, step._compiled._menu.prices, strict=True)
    )
    for info in infos:
        names = step.layers.selected(info.mask)
        cover = step._compiled._menu.fitting(step._compiled._menu.bits(names))
        assert info.overhead == pytest.approx(prices[cover], abs=1e-6)


@pytest.mark.parametrize("ascent", ["whole_batch", "micro_batch"])
def test_no_step_is_above_its_bound(ascent):
    ascent = {
        "whole_batch": lwsam.whole_batch(),
        "micro_batch": lwsam.micro_batch(0.5),
    }[ascent]
    method = lwsam.Method(lwsam.top_k(1), rho=0.05, ascent=ascent, max_overhead=0.45)
    step, _, infos = run(method)
    assert max(info.overhead for info in infos) <= 0.45
    assert all(info.mask.any() for info in infos)
    assert max(step._compiled._menu.prices) <= 0.45


# --- compiling ------------------------------------------------------------------------


def test_a_step_that_raises_leaves_no_trace():
    menu = Menu(stack(3), ratio_of([1.0, 0.5, 0.1]), 9)
    built, broken = [], True

    def build(cover):
        built.append(cover)

        def step(x):
            if broken:
                raise KeyError("y")
            return x + len(cover)

        return step

    executables = Executables(menu, build)
    mask = np.array([False, True, False])
    with pytest.raises(KeyError, match="y"):
        executables.run(mask, 1)
    assert executables.compiled == ()
    assert executables.compile_seconds == 0.0
    broken = False
    assert executables.run(mask, 1) == 3
    assert executables.run(mask, 2) == 4
    assert len(built) == 2  # once in vain
    assert executables.compiled == (lwsam.Cover(("w01", "w02")),)
    assert executables.run(np.zeros(3, bool), 1) == 1
    assert executables.compiled[1] == lwsam.Cover(())


def test_only_first_calls_count_as_compiling():
    method = lwsam.Method(lwsam.everything(), rho=0.05, when=lwsam.every(2))
    step = lwsam.TrainStep(loss_fn, optax.sgd(0.05), method)
    at = lambda i: jax.tree.map(lambda x: x[i], BATCHES)
    state = step.init(make_params(), {}, at(0), key=jax.random.key(3))
    assert step.compile_seconds == 0.0
    seconds = []
    for i in range(4):
        state, _ = step(state, at(i))
        seconds.append(step.compile_seconds)
    assert 0.0 < seconds[0] < seconds[1] == seconds[2] == seconds[3]


# --- the two ends ---------------------------------------------------------------------


def test_without_a_budget_the_two_ends_are_a_set():
    layers = stack(10)
    reach = lambda cover: max(10 - layers.depth[layers.names.index(n)] for n in cover)
    ratio = lambda c: 1 + (0.06 * reach(c.names) + 0.04 * len(c) if len(c) else 0.0)
    menu = Menu(layers, ratio, 6)
    by_depth = sorted(layers.names, key=lambda n: layers.depth[layers.names.index(n)])
    ends = {by_depth[0], *by_depth[6:]}
    assert ends in [set(cover.names) for cover in menu.covers]
    assert len(menu.covers) <= 6
    assert list(menu.prices) == sorted(menu.prices)
    bits = menu.bits((by_depth[0], by_depth[8]))
    assert set(menu.fitting(bits).names) == ends
    bits = menu.bits((by_depth[0], by_depth[3]))
    assert menu.fitting(bits).names == layers.names
    for budget in ({"bound": 0.9}, {"share": 0.5}, {"chosen": [True] * 10}):
        sets = [set(cover.names) for cover in Menu(layers, ratio, 6, **budget).covers]
        assert ends not in sets


# --- a recorded run -------------------------------------------------------------------


def resnet20(params, x):
    """He et al. (2016) for 32 x 32 pixels, shortcuts without parameters."""

    def conv(name, x, stride=1):
        return jax.lax.conv_general_dilated(
            x,
            params[name],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def norm(x):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) * jax.lax.rsqrt(var + 1e-5)

    h = jax.nn.relu(norm(conv("stem_conv", x)))
    for stage, block in itertools.product((1, 2, 3), (1, 2, 3)):
        name = f"stage{stage}_block{block}"
        stride = 2 if stage > 1 and block == 1 else 1
        y = jax.nn.relu(norm(conv(f"{name}/conv1", h, stride)))
        y = norm(conv(f"{name}/conv2", y))
        if stride == 2:
            extra = h.shape[-1] // 2
            h = jnp.pad(h[:, ::2, ::2], ((0, 0),) * 3 + ((extra, extra),))
        h = jax.nn.relu(h + y)
    return jnp.mean(jax.nn.logsumexp(h.mean((1, 2)) @ params["dense"], axis=-1))


def resnet20_shapes(names):
    def shape(name):
        if name == "dense":
            return (64, 10)
        if name == "stem_conv":
            return (3, 3, 3, 16)
        stage = int(name[len("stage")])
        outputs = 16 * 2 ** (stage - 1)
        halved = stage > 1 and name.endswith("block1/conv1")
        return (3, 3, outputs // 2 if halved else outputs, outputs)

    return {name: jax.ShapeDtypeStruct(shape(name), np.float32) for name in names}


@pytest.fixture(scope="module")
def recorded():
    """The row of the paper's rule: selections as bits, and what its sets had cost."""
    if not RECORDED.is_file():
        pytest.skip(f"needs {RECORDED.relative_to(ROOT)}, a checkout has it")
    rows = map(json.loads, RECORDED.read_text(encoding="utf-8").splitlines())
    return next(row for row in rows if row["method"] == "layer-wise SAM, top 4")


@pytest.fixture(scope="module")
def cost(recorded):
    images = jax.ShapeDtypeStruct((128, 32, 32, 3), np.float32)
    rule = lambda path, leaf: path[-1].key
    return lwsam.step_cost(
        resnet20, resnet20_shapes(recorded["layer_names"]), images, rule=rule
    )


def test_the_net_is_that_of_the_record(recorded, cost):
    """Its layers, and the sets that were compiled, at the prices that were recorded."""
    assert list(cost.layers.names) == recorded["layer_names"]
    assert len(recorded["selections"]) == 400
    assert cost.ratio(cost.layers.names) == pytest.approx(2.0, abs=1e-3)
    prices = [1 + price for price in cost.prices()]
    covers = [1.1428, 1.2499, 1.3363, 1.6628, 1.9713]  # among the programs of the row
    for recorded_price in covers:
        nearest = min(abs(price - recorded_price) for price in prices)
        assert nearest < 1e-3
    exact = np.mean([cost.ratio(names) for names in selections(recorded, cost)])
    assert exact == pytest.approx(1.568, abs=1e-3)


def selections(recorded, cost):
    bits = range(len(cost.layers))
    return [
        tuple(cost.layers.names[i] for i in bits if taken >> i & 1)
        for taken in recorded["selections"]
    ]


def default_of_train_step():
    """How many executables a TrainStep may have if nothing else is said."""
    method = lwsam.LayerwiseSAM(k=1, rho=0.1, alpha=0.8)
    return lwsam.TrainStep(loss_fn, optax.sgd(0.1), method)._most


def test_the_papers_rule_on_resnet20_costs_what_was_promised(recorded, cost):
    """At most 1.82 on average with at most 12 executables; exact sets cost 1.56."""
    most = default_of_train_step()
    assert most <= 12
    menu = Menu(cost.layers, cost.ratio, most)
    prices = dict(zip(menu.covers, menu.prices, strict=True))
    used = [menu.fitting(menu.bits(names)) for names in selections(recorded, cost)]
    mean = 1 + np.mean([prices[cover] for cover in used])
    assert len(set(used)) <= len(menu.covers) <= 12
    assert mean <= 1.82
