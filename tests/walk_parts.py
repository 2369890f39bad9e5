"""The built-in parts by the names of the walk, and a train step of them to follow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import family_reference as family
import lwsam_jax as lwsam
import reference
import walk_combinations as combinations
import walk_reference as walk
from plain import enable_x64
from walk_combinations import Parts
from walk_reference import MOMENTUM, RATE, SIZE, STEPS


KEY = jax.random.key(7)
SEED = 3
BATCHES = reference.mlp_batches(STEPS, SIZE)
FEW, REFUSED = combinations.few(2)


def name_of(parts):
    return ", ".join(parts) if isinstance(parts, Parts) else str(parts)


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


def bent(losses, batch):
    del batch
    return losses + walk.BEND * losses**2 / 2


def own(losses, batch):
    return jnp.asarray(walk.CLASSES)[batch[1]] * losses


def others(losses, batch):
    return losses - own(losses, batch)


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
    "differences": lambda: lwsam.differences(mu=walk.MU),
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
    "light": lambda: lwsam.light_scale(**walk.LIGHT),
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
DESCENT = {
    "None": lambda: None,
    "sharpest": lambda: lwsam.sharpest(walk.SHARE),
    "weighed": lambda: lwsam.weighed(bent),
    "weighed thrice": lambda: lwsam.weighed(bent, ascent=own, rest=others),
}


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


def trained(method, steps=STEPS, loss=loss_fn, **options):
    """The step, and for each of its calls the state after it and what it reports."""
    step = lwsam.TrainStep(loss, base_optimizer(), method, **options)
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


PROBING = functools.partial(NOISY, ascent=lwsam.differences(mu=walk.MU))


def half_square(params):
    """Its gradient at a point is the point."""
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params)) / 2


def probe_of(point, w):
    """The vector P, or its opposite, behind the direction (w . P) P of `half_square`."""
    direction = family.added(point, -1.0, w)
    square = family.inner(w, direction)
    assert square > 1e-6
    return family.scaled(square**-0.5, direction)


@functools.cache
def mask():
    """The elements that `sparse` leaves."""
    with enable_x64(True):
        state = elements().init(to_tree(reference.mlp_params()))
    return {name: 1.0 * leaf for name, leaf in from_tree(state.mask).items()}


def differs(actual, expected, rtol=1e-9):
    """Whether leaves are not equal, relative to the largest entry of each."""
    return any(
        np.abs(np.asarray(actual[name]) - leaf).max()
        > rtol * max(np.abs(leaf).max(), 1e-3)
        for name, leaf in expected.items()
    )


def by_layer(norms):
    return dict(zip(sorted(walk.LAYERS), norms, strict=True))
