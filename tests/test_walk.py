"""Every pair of built-in parts: right against an oracle, or refused with a reason.

`make test-slow` takes every three of them.
"""

import functools

import jax
import numpy as np
import pytest

import family_reference as family
import reference
import walk_combinations as combinations
import walk_reference as walk
from plain import enable_x64
from walk_parts import (
    BATCHES,
    by_layer,
    differs,
    FEW,
    from_tree,
    half_square,
    mask,
    method_of,
    name_of,
    NOISY,
    probe_of,
    PROBING,
    REFUSED,
    trained,
)
from walk_reference import SIZE


# --- the parts in the library ---------------------------------------------------------


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
def probes():
    """What `differences` draws in each step."""
    with enable_x64(True):
        w, drawn = reference.mlp_params(), []
        for params, _, info in trained(PROBING(), loss=squares)[1]:
            drawn.append(probe_of(from_tree(info.metrics["point"]), w))
            w = from_tree(params)
    flat = np.concatenate([leaf.ravel() for step in drawn for leaf in step.values()])
    assert 0.85 < flat.std() < 1.15
    return drawn


def squares(params, model_state, batch, key):
    del batch, key
    return half_square(params), (model_state, {"point": params})


# --- against the oracle ---------------------------------------------------------------


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
    draws = probes() if parts.ascent == "differences" else noise()
    follow(parts, infos, layers_of_mask, draws)
    for number, (_, model_state, info) in enumerate(found):
        assert info.finite
        assert model_state == number + 1
        assert info.metrics["losses"].shape == (SIZE,)


def check_refused(parts):
    """The message names the argument and says what to do."""
    argument = combinations.refused(parts)
    with pytest.raises((TypeError, ValueError)) as caught:
        method_of(parts)
    assert f"`{argument}`" in str(caught.value)
    assert "Pass " in str(caught.value)


def check_held(axes, right, others):
    """Whatever values these axes can have are in one that is right."""
    held = {values for parts in right for values in combinations.held_by(parts, axes)}
    wrong = {values for parts in others for values in combinations.held_by(parts, axes)}
    assert held | wrong == combinations.all_values(axes)
    assert not any(map(combinations.refused, right))
    assert all(map(combinations.refused, others))
    possible = (p for p in combinations.product() if combinations.refused(p) is None)
    assert held.issuperset(v for p in possible for v in combinations.held_by(p, axes))


def test_the_few_hold_every_pair():
    """Those that can be right in one that is, and every other in one that is not."""
    check_held(2, FEW, REFUSED)
    one_alone = [parts._replace(**{"descent": "None"}) for parts in REFUSED]
    assert any(map(combinations.refused, one_alone))


# Half of them with one executable beside the plain one, where the mask picks.
@pytest.mark.parametrize("parts", FEW, ids=name_of)
def test_every_pair_of_parts_is_right(parts):
    check(parts, **({"max_executables": 2} if FEW.index(parts) % 2 else {}))


@pytest.mark.parametrize("parts", REFUSED, ids=name_of)
def test_or_refused_with_a_remedy(parts):
    check_refused(parts)


# --- every three ----------------------------------------------------------------------


CHUNKS = 100  # of some nine combinations each
THREES = functools.cache(lambda: combinations.few(3))


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
    for parts in combinations.product():
        if combinations.refused(parts) is not None:
            check_refused(parts)
