"""The same pairs in the Optax transformation and in the functional form."""

import functools

import jax
import numpy as np
import optax
import pytest

import family_reference as family
import lwsam_jax as lwsam
import reference
import walk_reference as walk
from plain import enable_x64
from walk_parts import (
    base_optimizer,
    BATCHES,
    by_layer,
    differs,
    FEW,
    from_tree,
    half_square,
    KEY,
    mask,
    mean_loss,
    method_of,
    name_of,
    NOISY,
    probe_of,
    PROBING,
    to_tree,
)
from walk_reference import STEPS


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
def probes_of_the_transformation():
    with enable_x64(True):
        w = to_tree(reference.mlp_params())
        tx, drawn = lwsam.as_optax(PROBING()), []
        state = tx.init(w)
        for _ in range(STEPS):
            point, state = tx.update(w, state, w, value_fn=half_square)
            drawn.append(probe_of(from_tree(point), from_tree(w)))
    return drawn


@functools.cache
def draws_of_the_functional_form(ascent):
    method = PROBING() if ascent == "differences" else NOISY()
    with enable_x64(True):
        w = to_tree(reference.mlp_params())
        names = lwsam.Layers.of(w, lwsam.leaves).names
        out = lwsam.value_and_grad(half_square, names, method=method)(w, key=KEY)
        point, w = from_tree(out.grads), from_tree(w)
    if ascent == "differences":
        return probe_of(point, w)
    return family.added(point, -1.0, w)


def forms_of(parts):
    """What the transformation may take its gradients from, traced mask or a tuple."""
    more = (*walk.COUNTS, "differences")  # look at the loss more than twice
    twice = parts.ascent not in more and parts.combine != "flatness"
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
    if parts.ascent == "differences":
        draws = probes_of_the_transformation()
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
        or parts.shape in ("chain", "sparse", "light")
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
    draws = draws_of_the_functional_form(parts.ascent)
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
