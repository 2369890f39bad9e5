"""Random weight perturbations against their formulas, and the parts they are made of."""

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


STEPS, SIZE, PARTS = 20, 8, 4
RATE, MOMENTUM = 0.2, 0.9
KEY = jax.random.key(5)
BATCHES = reference.mlp_batches(STEPS, SIZE)
GRADIENT = family.gradient_of(reference.mlp_value_and_grad)
LEAVES = tuple(reference.LEAVES)
KERNELS = tuple(name for name in LEAVES if name.endswith("/kernel"))

# One set of numbers for each preset: for the library and for the oracle.
HYPER = {
    "random_sam": {"rho": 0.4},
    "rwp": {"rho": 0.1},
    "m_rwp": {"rho": 0.1, "weight": 0.3},
    "arwp": {"rho": 0.1, "eta": 2.0, "decay": 0.8},
    "m_arwp": {"rho": 0.1, "weight": 0.3, "eta": 2.0, "decay": 0.8},
    "damp": {"rho": 0.2, "count": PARTS},
}
# Into how many parts each cuts its batch, the clean one not counted; None: it does not.
PARTS_OF = {"m_rwp": 1, "m_arwp": 1, "damp": PARTS}


def method(name, **changes):
    return getattr(lwsam, name)(**{**HYPER[name], **changes})


def rule_of(name, noise, **changes):
    hyper: Any = {**HYPER[name], **changes}
    rho, weight = hyper["rho"], hyper.get("weight")
    damping: Any = {"eta": hyper.get("eta"), "beta": hyper.get("decay")}
    rules = {
        "random_sam": lambda: oracle.in_parts(
            GRADIENT, oracle.on_the_sphere(rho), noise
        ),
        "rwp": lambda: oracle.in_parts(GRADIENT, oracle.filter_wise(rho), noise),
        "m_rwp": lambda: oracle.two_batches(
            GRADIENT, oracle.filter_wise(rho), noise, weight
        ),
        "arwp": lambda: oracle.damped(GRADIENT, rho, noise, **damping),
        "m_arwp": lambda: oracle.damped(GRADIENT, rho, noise, weight=weight, **damping),
        "damp": lambda: oracle.in_parts(
            GRADIENT, oracle.multiplicative(rho, KERNELS), noise
        ),
    }
    return rules[name]()


def follow(rule, batches=BATCHES):
    steps = family.trajectory(
        rule,
        reference.mlp_params(),
        batches,
        learning_rate=RATE,
        momentum=MOMENTUM,
    )
    return [step.params for step in steps]


def assert_follows(ours, steps, rtol=1e-9):
    for number, (params, step) in enumerate(zip(ours, steps, strict=True)):
        for name, leaf in step.items():
            where = f"{name} after step {number}"
            atol = rtol * max(np.abs(leaf).max(), 1e-3)
            np.testing.assert_allclose(params[name], leaf, 0, atol, err_msg=where)


# --- the library ----------------------------------------------------------------------


def to_tree(leaves, dtype=np.float64):
    tree = {}
    for path, leaf in leaves.items():
        layer, key = path.split("/")
        tree.setdefault(layer, {})[key] = jnp.asarray(leaf, dtype)
    return tree


def from_tree(tree):
    pairs = (path.split("/") for path in LEAVES)
    return {f"{a}/{b}": np.asarray(tree[a][b]) for a, b in pairs}


def losses_of(params, batch):
    h, labels = batch
    for name in reference.MLP_LAYERS:
        h = h @ params[name]["kernel"] + params[name]["bias"]
        h = jnp.tanh(h) if name != "a_out" else h
    return optax.softmax_cross_entropy_with_integer_labels(h, labels)


def loss_fn(params, model_state, batch, key):
    """Each example's metrics show the point at which its loss was computed."""
    del key
    losses = losses_of(params, batch)
    point = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params)])
    points = jnp.broadcast_to(point, (len(losses), *point.shape))
    metrics = {"losses": losses, "points": points, "examples": jnp.int32(len(losses))}
    return losses.mean(), (model_state + losses.mean(), metrics)


def base_optimizer(rate=RATE):
    return optax.sgd(rate, momentum=MOMENTUM)


def train(method, steps=STEPS, optimizer=None, dtype=np.float64, parallel=None):
    """The parameters after each step, and what it reports."""
    with enable_x64(dtype == np.float64):
        optimizer = base_optimizer() if optimizer is None else optimizer
        step = lwsam.TrainStep(loss_fn, optimizer, method, parallel)
        params = to_tree(reference.mlp_params(), dtype)
        batches = [(x.astype(dtype), y) for x, y in BATCHES[:steps]]
        start = jnp.zeros((), dtype)
        state = step.init(params, start, batches[0], key=KEY)
        found = []
        for batch in batches:
            state, info = step(state, batch)
            found.append((from_tree(state.params), jax.device_get(info)))
        return found


def params_of(found):
    return [params for params, _ in found]


@functools.cache
def trained(name):
    return train(method(name))


@functools.cache
def noise(parts=None):
    """What `random` draws for each part of each step, seen where weights stay at 0."""
    split = None if parts is None else lwsam.sub_batches(parts)
    alone = lwsam.Method(
        lwsam.everything(),
        rho=1.0,
        ascent=lwsam.random(),
        shape=lwsam.raw(),
        split=split,
        rule=lwsam.leaves,
    )
    found = train(alone, optimizer=optax.sgd(0.0))
    with enable_x64(True):
        w, treedef = jax.tree.flatten(to_tree(reference.mlp_params()))
        start = np.concatenate([np.ravel(x) for x in w])
        shapes = [x.shape for x in w]
    sizes = np.cumsum([x.size for x in w])[:-1]

    def leaves(row):
        pieces = np.split(row - start, sizes)
        pairs = zip(pieces, shapes, strict=True)
        return from_tree(jax.tree.unflatten(treedef, [p.reshape(s) for p, s in pairs]))

    size = SIZE // (parts or 1)
    return [
        [leaves(row) for row in info.metrics["points"][::size]] for _, info in found
    ]


def test_every_part_of_every_step_has_its_own_noise():
    flat = [
        np.concatenate([z[name].ravel() for name in LEAVES])
        for step in noise(PARTS)
        for z in step
    ]
    drawn = np.concatenate(flat)
    assert len(np.unique(drawn)) > 0.99 * len(drawn)  # of so many single numbers
    assert abs(drawn.mean()) < 0.05
    assert 0.95 < drawn.std() < 1.05
    alike = np.corrcoef(np.stack(flat)) - np.eye(len(flat))
    assert np.abs(alike).max() < 0.7


@pytest.mark.parametrize("name", HYPER)
def test_train_step_follows_the_formulas_over_20_steps(name):
    found = trained(name)
    expected = follow(rule_of(name, noise(PARTS_OF.get(name))))
    assert_follows(params_of(found), expected)
    for number, (_, info) in enumerate(found):
        assert info.finite
        assert info.overhead == 0
        np.testing.assert_allclose(info.rho, HYPER[name]["rho"], rtol=1e-6)
        assert info.metrics["losses"].shape == (SIZE // 2 if name[0] == "m" else SIZE,)
        assert info.metrics["examples"] == len(info.metrics["losses"])
        if name[0] != "m":
            np.testing.assert_allclose(info.value, info.metrics["losses"].mean())
            assert info.ascent_value is None
            continue
        w = found[number - 1][0] if number else reference.mlp_params()
        half = family.rows_of(BATCHES[number], slice(0, SIZE // 2))
        clean = reference.mlp_value_and_grad(w, half)[0]
        np.testing.assert_allclose(info.ascent_value, clean)
        np.testing.assert_allclose(info.metrics["losses"].mean(), clean)


@pytest.mark.parametrize("name", HYPER)
def test_without_a_radius_each_is_the_base_optimizer_bit_for_bit(name):
    found = train(method(name, rho=0.0), steps=3)
    plain = train(lwsam.sam(0.0), steps=3)
    for ours, base in zip(params_of(found), params_of(plain), strict=True):
        for leaf in LEAVES:
            np.testing.assert_array_equal(ours[leaf], base[leaf])


def test_the_limits_of_the_weights():
    """eta = 0 is RWP; a weight of 1 is RWP on one half, of 0 plain on the other."""
    arwp = params_of(train(method("arwp", eta=0.0), steps=4))
    assert_follows(arwp, params_of(trained("rwp"))[:4])
    m_arwp = params_of(train(method("m_arwp", eta=0.0), steps=4))
    assert_follows(m_arwp, params_of(trained("m_rwp"))[:4])
    first, second = slice(0, SIZE // 2), slice(SIZE // 2, None)
    half = lambda rows: [family.rows_of(batch, rows) for batch in BATCHES[:4]]
    on_one = params_of(train(method("m_rwp", weight=1.0), steps=4))
    assert_follows(on_one, follow(rule_of("rwp", noise(1)), half(second)))
    plain = params_of(train(method("m_rwp", weight=0.0), steps=4))
    assert_follows(plain, follow(family.sam(GRADIENT, rho=0.0), half(first)))


def test_random_sam_moves_by_exactly_its_radius():
    z = noise()[0][0]
    np.testing.assert_allclose(oracle.length(oracle.on_the_sphere(0.4)({}, z)), 0.4)


def test_the_noise_of_a_filter_has_its_norm_as_its_scale():
    """And not as its length: that is sqrt(n) times longer on average."""
    w = reference.mlp_params()
    draws = [oracle.filter_wise(0.1)(w, z[0]) for z in noise()]
    name = KERNELS[0]
    for column in range(w[name].shape[1]):
        spread = np.std([e[name][:, column] for e in draws])
        expected = 0.1 * np.linalg.norm(w[name][:, column])
        np.testing.assert_allclose(spread, expected, rtol=0.35)


@pytest.mark.parametrize("devices", [2, 8])
def test_damp_is_the_same_on_any_number_of_devices(devices):
    """Each part has its number in the global batch; devices may share one."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    ours = train(method("damp"), steps=3, parallel=mesh)
    alone = trained("damp")[:3]
    assert_follows(params_of(ours), params_of(alone))
    np.testing.assert_allclose(ours[2][1].value, alone[2][1].value)


@pytest.mark.parametrize("name", ["damp", "arwp"])
def test_many_steps_in_one_executable_are_the_same(name):
    with enable_x64(True):
        step = lwsam.TrainStep(loss_fn, base_optimizer(), method(name))
        params = to_tree(reference.mlp_params())
        state = step.init(params, jnp.zeros(()), BATCHES[0], key=KEY)
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *BATCHES[:3])
        state, infos = step.scan(state, stacked)
        assert_follows([from_tree(state.params)], [trained(name)[2][0]])
        assert infos.metrics["losses"].shape == (3, SIZE)


def test_a_sam_step_of_parts_is_m_sharpness():
    ours = train(lwsam.sam(0.3, split=lwsam.sub_batches(PARTS)), steps=4)
    inner = family.sam(GRADIENT, rho=0.3)

    def rule(number, w, last, batch):
        size = SIZE // PARTS
        rows = [slice(j * size, (j + 1) * size) for j in range(PARTS)]
        parts = [inner(number, w, last, family.rows_of(batch, row)) for row in rows]
        update = family.zeros(w)
        for move in parts:
            update = family.added(update, 1 / PARTS, move.update)
        return parts[0]._replace(update=update)

    assert_follows(params_of(ours), follow(rule, BATCHES[:4]))
    w = reference.mlp_params()
    for (params, info), batch in zip(ours, BATCHES[:4], strict=True):
        value = reference.mlp_value_and_grad(w, batch)[0]
        np.testing.assert_allclose(info.value, value)
        np.testing.assert_allclose(info.ascent_value, value)
        assert info.overhead > 0.9
        w = params


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
