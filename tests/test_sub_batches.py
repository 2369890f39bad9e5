"""A split of the batch beside every part of the other axes, against the walk's oracle."""

import itertools

import numpy as np
import pytest

import family_reference as family
import lwsam_jax as lwsam
import reference
import walk_parts
import walk_reference as walk
from plain import enable_x64
from walk_combinations import Parts
from walk_parts import BATCHES, differs, from_tree, method_of
from walk_reference import SIZE, STEPS


COUNT = 2
EACH = SIZE // COUNT
COMBINATIONS = [
    Parts(),
    Parts(which="top_k", ascent="fraction", shape="raw", combine="mix", when="every"),
    Parts(which="named", shape="normalized all", combine="surrogate_gap", when="last"),
    Parts(which="random_k", shape="adaptive", descent="sharpest", when="predicate"),
    Parts(which="function", ascent="momentum", shape="relative layer", when="between"),
    Parts(ascent="previous", shape="relative filter"),
    Parts(combine="function", descent="sharpest"),
    Parts(combine="match_norm"),
    Parts(which="named", combine="flatness"),
    Parts(which="nothing", ascent="random"),
]
# They keep something, which every part of the batch would change.
REFUSED = [Parts(shape="chain"), Parts(combine="reuse")]


def run(parts, **options):
    with enable_x64(True):
        method = method_of(parts, split=lwsam.sub_batches(COUNT))
        step, found = walk_parts.trained(method, **options)
    return step, found


def blocks_of(parts):
    """The examples that the ascent of each part may see."""
    if parts.ascent != "fraction":
        return [[slice(0, EACH)]] * COUNT
    count = int((walk.COUNTS["fraction"] / SIZE + 0.01) * EACH)
    return [[slice(i, i + count) for i in range(0, EACH - count + 1, count)]] * COUNT


@pytest.mark.parametrize("parts", COMBINATIONS, ids=walk_parts.name_of)
def test_each_part_is_the_oracles_step_and_their_mean_is_taken(parts):
    step, found = run(parts, max_executables=3)
    last = walk.first(reference.mlp_params())
    zero = family.zeros(last.params)
    for number, (params, _, info) in enumerate(found):
        assert step.layers is not None
        layers = step.layers.selected(info.mask)
        expected = walk.layers_of(parts, number, last)
        if parts.which not in ("top_k", "function", "random_k"):
            assert set(layers) == set(expected or ())
        batch, rows_of = BATCHES[number], family.rows_of
        pieces = [rows_of(batch, slice(i * EACH, (i + 1) * EACH)) for i in range(COUNT)]
        if not layers:
            tried = [[walk.step(parts, last, batch, (), slice(0), zero)]]
        else:
            tried = [
                [
                    walk.step(parts, last, piece, layers, rows, zero)
                    for piece, rows in zip(pieces, chosen, strict=True)
                ]
                for chosen in itertools.product(*blocks_of(parts))
            ]
        ours = from_tree(params)
        right = []
        for steps in tried:
            update = zero
            for each in steps:
                update = family.added(update, 1 / len(steps), each.update)
            velocity = family.added(update, walk.MOMENTUM, last.velocity)
            new = family.added(last.params, -walk.RATE, velocity)
            if not differs(ours, new):
                right.append((steps, update, velocity, new))
        assert len(right) == 1, f"{parts}, step {number}: {len(right)} are right"
        ((steps, update, velocity, new),) = right
        value = np.mean([each.value for each in steps])
        perturbed_value = np.mean([each.perturbed_value for each in steps])
        np.testing.assert_allclose(info.value, value)
        np.testing.assert_allclose(info.perturbed_value, perturbed_value)
        assert info.metrics["losses"].shape == (SIZE,)
        last = last._replace(params=new, velocity=velocity, update=update)
    assert len(found) == STEPS


@pytest.mark.parametrize("parts", REFUSED, ids=walk_parts.name_of)
def test_or_refused_with_a_remedy(parts):
    with pytest.raises(ValueError, match="no `split`"):
        run(parts, steps=1)
