"""Which sets get an executable: against all others, and whatever their order."""

import itertools
import random

import pytest

from lwsam_jax import _promotion


L = 5
COVERS = [0b11111, 0b11110, 0b11100, 0b11000, 0b10000, 0]  # layer 0 is the input-most


def price(bits):
    """A cost that grows with the depth that is reached, and with each layer."""
    reach = max((L - i for i in range(L) if bits >> i & 1), default=0)
    weights = sum((i + 1) * 0.02 for i in range(L) if bits >> i & 1)
    return 1 + 0.1 * reach + weights


def selections(seed, k=2):
    draw = random.Random(seed)
    every = [sum(1 << i for i in c) for c in itertools.combinations(range(L), k)]
    return {bits: draw.choice((0.0, 1.0, 3.0, 10.0)) for bits in every}


def own_cover(bits):
    return min(c for c in COVERS if not bits & ~c)


def saving(candidate, counts):
    return sum(
        n * max(0.0, price(own_cover(bits)) - price(candidate))
        for bits, n in counts.items()
        if not bits & ~candidate
    )


def find(counts, taken=frozenset()):
    weights = {bits: round(n * _promotion._UNIT) for bits, n in counts.items()}
    now = {bits: price(own_cover(bits)) for bits in counts}
    return _promotion.best_set(weights, now, COVERS, price, taken)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_of_all_sets_is_found(seed):
    """Dropping layers one by one is greedy; on few layers it misses little."""
    counts = selections(seed)
    best = max(saving(candidate, counts) for candidate in range(1 << L))
    found, bits = find(counts)
    assert found == pytest.approx(saving(bits, counts), rel=1e-3)
    assert found >= 0.9 * best


def test_a_set_that_is_taken_is_not_proposed_again():
    counts = {0b10001: 5.0}
    assert find(counts)[1] == 0b10001
    assert find(counts, frozenset({0b10001}))[1] != 0b10001


def test_covers_save_nothing():
    assert find({0b11000: 5.0, 0b10000: 3.0}) == (0, 0)
    assert find({0: 5.0}) == (0, 0)


def test_neighbours_share_the_weight_of_a_selection():
    counts = {0b00011: 8.0, 0b00101: 8.0, 0b11000: 8.0}
    weights = _promotion.expected(counts, L)
    total = sum(weights.values()) / _promotion._UNIT
    assert total == pytest.approx(24.0, rel=1e-4)
    for bits in counts:
        assert weights[bits] > max(weights[b] for b in weights if b not in counts)
    assert weights[0b01001] > 0  # 0b00011 and 0b11000 are known, so this one may come
    assert all(bits.bit_count() == 2 for bits in weights)


def test_selections_that_never_vary_have_no_neighbours():
    assert set(_promotion.expected({0b00011: 7.0}, L)) == {0b00011}
    assert set(_promotion.expected({0: 7.0}, L)) == {0}


def test_weights_do_not_depend_on_the_order_of_the_selections():
    """A resumed run reads them sorted, an unbroken one has them as they came."""
    draw = random.Random(0)
    counts = {bits: draw.random() for bits in range(1, 1 << L)}
    turned = dict(sorted(counts.items(), reverse=True))
    assert _promotion.expected(counts, L) == _promotion.expected(turned, L)


def test_reviews_become_rare():
    reviews = [step for step in range(1, 2000) if _promotion.is_review(step)]
    assert reviews[:48] == list(range(4, 193, 4))
    assert reviews[48:] == [256, 384, 512, 768, 1024, 1536]


def test_late_reviews_add_one_set():
    assert [_promotion.sets_of(step) for step in (4, 192, 256, 1536)] == [2, 2, 1, 1]


def test_many_layers_do_not_make_a_review_long():
    """Its time is that of these products; the heaviest are looked at."""
    draw, layers = random.Random(1), 150
    sets = [draw.sample(range(layers), 75) for _ in range(40)]
    counts = {sum(1 << i for i in chosen): 1.0 for chosen in sets}
    weights = _promotion.expected(counts, layers)
    assert set(counts) <= set(weights)
    assert len(weights) <= _promotion._SELECTIONS * _promotion._LAYERS // layers
    assert sum(weights.values()) <= len(counts) * _promotion._UNIT
