"""Every pair of built-in parts: right against an oracle, or refused with a reason.

`make test-slow` takes every three of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import family_reference as family
import lwsam_jax as lwsam
import reference
import walk_reference as walk
from plain import enable_x64
from walk_reference import MOMENTUM, Parts, RATE, SIZE, STEPS


KEY = jax.random.key(7)
SEED = 3
BATCHES = reference.mlp_batches(STEPS, SIZE)
FEW, REFUSED = walk.few(2)


def name_of(parts):
    return ", ".join(parts) if isinstance(parts, Parts) else str(parts)


# --- the parts in the library ---------------------------------------------------------


def near_the_largest(norms, key):
    del key
    return norms >= 0.9 * jnp.max(norms)


def some_examples(batch, key):
    del key
    return jax.tree.map(lambda x: x[: walk.COUNTS["function"]], batch)


def half_of_each(ascent, descent):
    """The middle of the descent gradient and the ascent gradient at its length."""
    size = lambda leaves: jnp.sqrt(sum(jnp.sum(x**2) for x in leaves))
    length = size(descent) / size(ascent)
    pairs = zip(ascent, descent, strict=True)
    return tuple(0.5 * (d + length * a) for a, d in pairs)


def elements():
    """A mask that stays through the walk."""
    return lwsam.sparse(0.5, seed=SEED)


@dataclasses.dataclass(frozen=True)
class Listed(lwsam.Gate):
    """Open in the steps of the walk's list."""

    def init(self, dtype):
        return ()

    def decide(self, kept, square_norm, step):
        is_open = jnp.asarray(walk.WHEN["gate"])[step]
        return is_open & (square_norm > 0), kept


WHICH = {
    "everything": lwsam.everything,
    "top_k": lambda: lwsam.top_k(1),
    "named": lambda: lwsam.named("a_out|m_mid"),
    "random_k": lambda: lwsam.random_k(1),
    "bandit": lambda: lwsam.bandit(1),
    "nothing": lwsam.nothing,
    "function": lambda: near_the_largest,
}
ASCENT = {
    "whole_batch": lwsam.whole_batch,
    "fraction": lambda: lwsam.micro_batch(walk.COUNTS["fraction"] / SIZE + 0.01),
    "size": lambda: lwsam.micro_batch(size=walk.COUNTS["size"]),
    "momentum": lwsam.momentum,
    "previous": lwsam.previous,
    "random": lwsam.random,
    "function": lambda: some_examples,
}
SHAPE = {
    "normalized": lwsam.normalized,
    "raw": lwsam.raw,
    "normalized all": lambda: lwsam.normalized("all"),
    "adaptive": lambda: lwsam.adaptive(walk.ETA),
    "relative layer": lwsam.relative,
    "relative filter": lambda: lwsam.relative("filter"),
    "proportional filter": lwsam.proportional,
    "proportional rms": lambda: lwsam.proportional(of="rms"),
    "proportional element": lambda: lwsam.proportional("element"),
    "chain": lambda: optax.chain(optax.trace(walk.DECAY), lwsam.normalized()),
    "sparse": lambda: optax.chain(lwsam.normalized(), elements()),
}
COMBINE = {
    "descend": lwsam.descend,
    "mix": lambda: lwsam.mix(walk.ALPHA["mix"]),
    "surrogate_gap": lambda: lwsam.surrogate_gap(walk.ALPHA["surrogate_gap"]),
    "match_norm": lwsam.match_norm,
    "decoupled": lambda: lwsam.decoupled(walk.ALPHA["decoupled"], RATE),
    "descend_on_selected": lwsam.descend_on_selected,
    "flatness": lambda: lwsam.flatness(**walk.FLATNESS),
    "reuse": lambda: lwsam.reuse(walk.WEIGHT),
    "function": lambda: half_of_each,
}
WHEN = {
    "always": lwsam.always,
    "every": lambda: lwsam.every(2),
    "last": lambda: lwsam.last(0.5, STEPS),
    "between": lambda: lwsam.between(1, 3),
    "predicate": lambda: lambda step: step != 2,
    "gate": Listed,
}
DESCENT = {"None": lambda: None, "sharpest": lambda: lwsam.sharpest(walk.SHARE)}


def method_of(parts, **changes):
    return lwsam.Method(
        **{
            "select": WHICH[parts.which](),
            "rho": parts.rho,
            "ascent": ASCENT[parts.ascent](),
            "shape": SHAPE[parts.shape](),
            "combine": COMBINE[parts.combine](),
            "when": WHEN[parts.when](),
            "descent": DESCENT[parts.descent](),
            "seed": SEED,
            **changes,
        }
    )


def to_tree(leaves):
    tree = {}
    for path, leaf in leaves.items():
        layer, key = path.split("/")
        tree.setdefault(layer, {})[key] = jnp.asarray(leaf, jnp.float64)
    return tree


def from_tree(tree):
    pairs = (path.split("/") for path in walk.LEAVES)
    return {f"{a}/{b}": np.asarray(tree[a][b]) for a, b in pairs}


def losses_of(params, batch):
    h, labels = batch
    for name in reference.MLP_LAYERS:
        h = h @ params[name]["kernel"] + params[name]["bias"]
        h = jnp.tanh(h) if name != "a_out" else h
    return optax.softmax_cross_entropy_with_integer_labels(h, labels)


def mean_loss(params, batch):
    return jnp.mean(losses_of(params, batch))


def loss_fn(params, model_state, batch, key):
    """The metrics show the point at which the loss was computed."""
    del key
    losses = losses_of(params, batch)
    return jnp.mean(losses), (model_state + 1, {"losses": losses, "point": params})


def base_optimizer():
    return optax.sgd(RATE, momentum=MOMENTUM)


def trained(method, steps=STEPS, **options):
    """The step, and for each of its calls the state after it and what it reports."""
    step = lwsam.TrainStep(loss_fn, base_optimizer(), method, **options)
    params = to_tree(reference.mlp_params())
    state = step.init(params, jnp.int32(0), BATCHES[0], key=KEY)
    found = []
    for batch in BATCHES[:steps]:
        state, info = step(state, batch)
        found.append(jax.device_get((state.params, state.model_state, info)))
    return step, found


NOISY = functools.partial(
    lwsam.Method,
    lwsam.everything(),
    rho=1.0,
    ascent=lwsam.random(),
    shape=lwsam.raw(),
    rule=lwsam.leaves,
    seed=SEED,
)


@functools.cache
def noise():
    """What `random` draws in each step, seen where every leaf is moved by it alone."""
    with enable_x64(True):
        w, drawn = reference.mlp_params(), []
        for params, _, info in trained(NOISY())[1]:
            point = from_tree(info.metrics["point"])
            drawn.append(family.added(point, -1.0, w))
            w = from_tree(params)
    flat = np.concatenate([leaf.ravel() for step in drawn for leaf in step.values()])
    assert len(flat) == len(np.unique(flat))
    assert 0.85 < flat.std() < 1.15
    return drawn


@functools.cache
def mask():
    """The elements that `sparse` leaves."""
    with enable_x64(True):
        state = elements().init(to_tree(reference.mlp_params()))
    return {name: 1.0 * leaf for name, leaf in from_tree(state.mask).items()}


# --- against the oracle ---------------------------------------------------------------


def differs(actual, expected, rtol=1e-9):
    """Whether leaves are not equal, relative to the largest entry of each."""
    return any(
        np.abs(np.asarray(actual[name]) - leaf).max()
        > rtol * max(np.abs(leaf).max(), 1e-3)
        for name, leaf in expected.items()
    )


def by_layer(norms):
    return dict(zip(sorted(walk.LAYERS), norms, strict=True))


def unlike(info, params, expected):
    """What of a step the oracle has otherwise."""
    numbers = {
        "value": (info.value, expected.value),
        "perturbed_value": (info.perturbed_value, expected.perturbed_value),
        "ascent_value": (info.ascent_value, expected.ascent_value),
        "rho": (info.rho, expected.rho),
    }
    numbers = {
        name: tuple(np.nan if x is None else x for x in pair)
        for name, pair in numbers.items()
    }
    wrong = [
        name
        for name, (ours, theirs) in numbers.items()
        if not np.isclose(ours, theirs, rtol=1e-9, atol=0, equal_nan=True)
    ]
    reported = from_tree(info.metrics["point"])
    leaves = {
        "norms": (by_layer(info.norms), expected.norms),
        "point of the metrics": (reported, expected.reported),
        "params": (params, expected.params),
    }
    return wrong + [name for name, pair in leaves.items() if differs(*pair)]


def follow(parts, infos, layers_of_mask, draws):
    """Walks the oracle beside a run; returns it, or raises where they part.

    Of the blocks that an ascent may see exactly one has to give what the library has.
    """
    last, steps = walk.first(reference.mlp_params()), []
    for number, (params, info) in enumerate(infos):
        layers = layers_of_mask(info)
        expected = walk.layers_of(parts, number, last)
        where = f"{name_of(parts)}, step {number}"
        if expected is None:
            assert len(layers) == 1, f"{where}: {layers} were drawn"
        else:
            assert set(layers) == set(expected), where
        found = []
        looks = layers or (parts.when == "gate" and parts.which != "nothing")
        for rows in walk.blocks(parts.ascent) if looks else [slice(0)]:
            taken = walk.step(
                parts, last, BATCHES[number], layers, rows, draws[number], mask()
            )
            found.append((unlike(info, params, taken), taken))
        right = [taken for wrong, taken in found if not wrong]
        assert len(right) == 1, f"{where}: {[wrong for wrong, _ in found]}"
        (last,) = right
        steps.append(last)
    return steps


def check(parts, **options):
    """A train step by these parts is the oracle's."""
    with enable_x64(True):
        step, found = trained(method_of(parts), **options)
    layers_of_mask = lambda info: step.layers.selected(info.mask)
    infos = [(from_tree(params), info) for params, _, info in found]
    follow(parts, infos, layers_of_mask, noise())
    for number, (_, model_state, info) in enumerate(found):
        assert info.finite
        assert model_state == number + 1
        assert info.metrics["losses"].shape == (SIZE,)


def check_refused(parts):
    """The message names the argument and says what to do."""
    argument = walk.refused(parts)
    with pytest.raises((TypeError, ValueError)) as caught:
        method_of(parts)
    assert f"`{argument}`" in str(caught.value)
    assert "Pass " in str(caught.value)


def check_held(axes, right, others):
    """Whatever values these axes can have are in one that is right."""
    held = {values for parts in right for values in walk.held_by(parts, axes)}
    wrong = {values for parts in others for values in walk.held_by(parts, axes)}
    assert held | wrong == walk.all_values(axes)
    assert not any(map(walk.refused, right))
    assert all(map(walk.refused, others))
    possible = (p for p in walk.product() if walk.refused(p) is None)
    assert held.issuperset(v for p in possible for v in walk.held_by(p, axes))


def test_the_few_hold_every_pair():
    """Those that can be right in one that is, and every other in one that is not."""
    check_held(2, FEW, REFUSED)
    one_alone = [parts._replace(**{"descent": "None"}) for parts in REFUSED]
    assert any(map(walk.refused, one_alone))


# Half of them with one executable beside the plain one, where the mask picks.
@pytest.mark.parametrize("parts", FEW, ids=name_of)
def test_every_pair_of_parts_is_right(parts):
    check(parts, **({"max_executables": 2} if FEW.index(parts) % 2 else {}))


@pytest.mark.parametrize("parts", REFUSED, ids=name_of)
def test_or_refused_with_a_remedy(parts):
    check_refused(parts)


# --- the other two forms --------------------------------------------------------------


@functools.cache
def noise_of_the_transformation():
    """Its `grad_fn` may return the point at which it is called."""
    with enable_x64(True):
        w = to_tree(reference.mlp_params())
        tx, drawn = lwsam.as_optax(NOISY()), []
        state = tx.init(w)
        for _ in range(STEPS):
            point, state = tx.update(w, state, w, grad_fn=lambda p: p)
            drawn.append(from_tree(jax.tree.map(lambda a, b: a - b, point, w)))
    return drawn


@functools.cache
def noise_of_the_functional_form():
    """The gradient of |w|^2 / 2 is the point."""
    with enable_x64(True):
        w = to_tree(reference.mlp_params())
        half = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)) / 2
        layers = lwsam.Layers.of(w, lwsam.leaves)
        point = lwsam.value_and_grad(half, layers.names, method=NOISY())(w, key=KEY)
        return from_tree(jax.tree.map(lambda a, b: a - b, point.grads, w))


def forms_of(parts):
    """What the transformation may take its gradients from, traced mask or a tuple."""
    twice = parts.ascent not in walk.COUNTS and parts.combine != "flatness"
    sources = ["value_fn"] + ["grad_fn"] * twice
    return [(source, static) for source in sources for static in (False, True)]


def check_transformation(parts, source, static):
    """The transformation in a chain is the oracle's."""
    rows = walk.blocks(parts.ascent)[-1]
    with enable_x64(True):
        params = to_tree(reference.mlp_params())
        layers = lwsam.Layers.of(params, None, mean_loss, BATCHES[0])
        method = method_of(parts, layers=layers)
        tx = optax.chain(lwsam.as_optax(method), base_optimizer())

        @functools.partial(jax.jit, static_argnames="selection")
        def update(params, opt_state, batch, selection):
            loss = lambda p: mean_loss(p, batch)
            part = lambda p: mean_loss(p, jax.tree.map(lambda x: x[rows], batch))
            grads = jax.grad(loss)(params)
            extra = {source: jax.grad(loss) if source == "grad_fn" else loss}
            if parts.ascent in walk.COUNTS:
                extra["ascent_value_fn"] = part
            updates, opt_state = tx.update(
                grads, opt_state, params, selection=selection, **extra
            )
            return optax.apply_updates(params, updates), opt_state

        opt_state, found = tx.init(params), []
        for batch in BATCHES:
            layers = lwsam.selection(opt_state)
            selection = layers if static else None
            params, opt_state = update(params, opt_state, batch, selection)
            found.append((layers, from_tree(params), opt_state[0].norms))
    last, draws = walk.first(reference.mlp_params()), noise_of_the_transformation()
    for number, (layers, params, norms) in enumerate(found):
        where = f"{name_of(parts)}, {source}, step {number}"
        if parts.when != "gate":  # which the state cannot know beforehand
            expected = walk.layers_of(parts, number, last)
            assert set(layers) == set(expected or layers), where
        seen = layers if walk.WHEN[parts.when][number] else ()
        last = walk.step(
            parts, last, BATCHES[number], seen, rows, draws[number], mask()
        )
        assert not differs(params, last.params), where
        assert not differs(by_layer(norms), last.norms), where


WITHOUT_DESCENT = [parts for parts in FEW if parts.descent == "None"]


@pytest.mark.parametrize("parts", WITHOUT_DESCENT, ids=name_of)
def test_so_it_is_in_the_transformation(parts):
    # The base optimizer's step is not seen.
    if parts.combine in ("decoupled", "descend_on_selected"):
        with pytest.raises(ValueError, match=r"`method.combine`.*TrainStep"):
            lwsam.as_optax(method_of(parts))
        return
    forms = forms_of(parts)
    check_transformation(parts, *forms[FEW.index(parts) % len(forms)])


# Which layers and when is not read by the functional form: the selection says it.
STATELESS = dict.fromkeys(
    parts._replace(which="everything", when="always") for parts in WITHOUT_DESCENT
)
LAYERS_CHOSEN = ("a_out", "z_in")


@pytest.mark.parametrize("parts", STATELESS, ids=name_of)
def test_so_it_is_in_the_functional_form(parts):
    """And parts that keep something from step to step are refused."""
    rows = walk.blocks(parts.ascent)[-1]
    part = family.rows_of(BATCHES[0], rows)
    keeps = (
        parts.ascent in ("momentum", "previous")
        or parts.shape in ("chain", "sparse")
        or parts.combine == "reuse"
    )
    with enable_x64(True):
        params = to_tree(reference.mlp_params())
        gradient = lwsam.value_and_grad(
            mean_loss, LAYERS_CHOSEN, method=method_of(parts)
        )
        extra = {"ascent_args": (part,)} if parts.ascent in walk.COUNTS else {}
        if keeps:
            with pytest.raises(
                ValueError, match=r"`method`.*keep.*Use lwsam.TrainStep"
            ):
                gradient(params, BATCHES[0], key=KEY, **extra)
            return
        out = gradient(params, BATCHES[0], key=KEY, **extra)
    draws = noise_of_the_functional_form() if parts.ascent == "random" else None
    first = walk.first(reference.mlp_params())
    taken = walk.step(parts, first, BATCHES[0], LAYERS_CHOSEN, rows, draws, mask())
    assert not differs(from_tree(out.grads), taken.update)
    assert not differs(by_layer(out.norms), taken.norms)
    np.testing.assert_allclose(out.value, taken.value)
    np.testing.assert_allclose(out.perturbed_value, taken.perturbed_value)
    if taken.ascent_value is None:
        assert out.ascent_value is None
    else:
        np.testing.assert_allclose(out.ascent_value, taken.ascent_value)


# --- the limits -----------------------------------------------------------------------

# Each ascent with the default shape, and each shape with the default ascent.
STAR = [Parts(ascent=name) for name in walk.PARTS["ascent"]]
STAR += [Parts(shape=name) for name in walk.PARTS["shape"][1:]]
PASSES = [parts for parts in STAR if not parts.is_stale]
LIMITS = {"no radius": {"rho": 0.0}, "nothing": {"select": lwsam.nothing()}}


def assert_same(one, other, rtol=0.0):
    """Bit for bit, or almost."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol, rtol)


@functools.cache
def path_of_the_base():
    """The base optimizer in a loop of its own."""
    with enable_x64(True):
        params = to_tree(reference.mlp_params())
        tx = base_optimizer()

        @jax.jit
        def update(params, opt_state, batch):
            updates, opt_state = tx.update(
                jax.grad(mean_loss)(params, batch), opt_state, params
            )
            return optax.apply_updates(params, updates), opt_state

        opt_state, path = tx.init(params), []
        for batch in BATCHES:
            params, opt_state = update(params, opt_state, batch)
            path.append(jax.device_get(params))
    return path


def path_of(method, **options):
    with enable_x64(True):
        return [params for params, *_ in trained(method, **options)[1]]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("parts", STAR, ids=name_of)
def test_a_step_without_a_perturbation_is_the_base_optimizer_bit_for_bit(parts, limit):
    assert_same(path_of(method_of(parts, **LIMITS[limit])), path_of_the_base())


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("shape", walk.PARTS["shape"])
@pytest.mark.parametrize("ascent", walk.PARTS["ascent"])
def test_and_the_transformation_hands_gradients_through(ascent, shape, limit):
    method = method_of(Parts(ascent=ascent, shape=shape), **LIMITS[limit])
    tx = lwsam.as_optax(method)
    params = {"w": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    grads = jax.tree.map(lambda x: 2 * x, params)
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=lambda p: 0.0)
    assert_same(updates, grads)
    assert lwsam.selection(state) == () or limit == "no radius"


@pytest.mark.parametrize("parts", STAR, ids=name_of)
def test_a_radius_that_is_set_to_zero_is_the_base_optimizer(parts):
    """It is data, so the step is the same one; w + 0 eps is w."""
    path = path_of(method_of(parts, rho=lambda step: 0.0 * step))
    assert_same(path, path_of_the_base(), 1e-12)


@pytest.mark.parametrize("parts", PASSES, ids=name_of)
def test_with_an_alpha_of_one_all_is_descent(parts):
    """As a number it is `descend` itself, and as a schedule it has its gradients."""
    assert lwsam.mix(1) is lwsam.mix(1.0) is lwsam.descend()
    mixed = method_of(parts, combine=lwsam.mix(lambda step: 1.0 + 0.0 * step))
    assert_same(path_of(mixed), path_of(method_of(parts)), 1e-12)


SAMS = {
    "sam": lambda: lwsam.sam(0.4),
    "generalized": lambda: lwsam.generalized_sam(0.4, 1.0),
    "layer-wise": lambda: lwsam.LayerwiseSAM(
        6, rho=0.4, alpha=1.0, normalize="selected", rule=lwsam.leaves
    ),
    "over all": lambda: lwsam.sam(0.4, shape=lwsam.normalized("all")),
    "by name": lambda: lwsam.sam(0.4, select=lwsam.named(".")),
    "all of the batch": lambda: lwsam.sam(0.4, ascent=lwsam.micro_batch(size=SIZE)),
    "no gap": lambda: lwsam.gsam(0.4, 0.0),
    "no weight": lambda: lwsam.sam(0.4, combine=lwsam.reuse(0.0)),
}


@pytest.mark.parametrize("name", SAMS)
def test_everything_with_an_alpha_of_one_is_sam(name):
    steps = family.trajectory(
        family.sam(walk.GRADIENT, rho=0.4),
        reference.mlp_params(),
        BATCHES,
        learning_rate=RATE,
        momentum=MOMENTUM,
    )
    for params, taken in zip(path_of(SAMS[name]()), steps, strict=True):
        assert not differs(from_tree(params), taken.params, 1e-12)


def test_the_whole_of_a_batch_is_the_whole_batch():
    assert lwsam.micro_batch(1.0) is lwsam.micro_batch(1) is lwsam.whole_batch()


# --- every three ----------------------------------------------------------------------

CHUNKS = 100  # of some nine combinations each
THREES = functools.cache(lambda: walk.few(3))


@pytest.mark.thorough
def test_they_hold_every_three():
    check_held(3, *THREES())


@pytest.mark.thorough
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_three_parts_are_right(chunk):
    for number, parts in enumerate(THREES()[0][chunk::CHUNKS]):
        check(parts, **({"max_executables": 2} if number % 2 else {}))
    jax.clear_caches()


@pytest.mark.thorough
def test_or_refused_in_the_whole_product():
    for parts in walk.product():
        if walk.refused(parts) is not None:
            check_refused(parts)
