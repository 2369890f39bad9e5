"""The published numbers: as printed, and at odds where the notes say so, only there."""

import pytest

from lwsam_bench.paper import published
from lwsam_bench.paper.published import (
    ACCURACY,
    BENCHMARKS,
    BY_K,
    CRITERIA,
    CRITERION,
    KS,
    METHODS,
    NOTES,
    RECIPES,
    THROUGHPUT,
)


# The bodies of the tables in the order of their cells.
TABLE_1 = {
    "cifar10": "128 0.1 150 91.96±0.3 92.64±0.4 92.14±0.4 (3) 92.81±0.3 (4)",
    "cifar100": "128 0.1 200 79.41±0.4 80.83±0.5 80.13±0.3 (2) 81.25±0.4 (4)",
    "flowers": "40 0.1 100 69.82±0.4 74.77±0.5 73.53±0.6 (3) 75.56±0.6 (2)",
    "vit": "128 0.001 10 90.73±0.5 91.46±0.9 91.15±0.7 (2) 91.36±0.5 (1)",
}
TABLE_2 = {
    "cifar10": "659.2 459.5 595.2 604.2",
    "cifar100": "229.1 139.5 151.0 190.7",
    "flowers": "604.2 401.9 473.6 463.4",
    "vit": "77.28 49.82 50.32 53.97",
}
TABLE_3 = {
    "cifar10": "91.63±0.3 92.81±0.3 91.40±0.5 92.46±0.2",
    "cifar100": "79.41±0.4 81.25±0.4 80.01±0.9 80.67±0.5",
    "flowers": "69.82±0.4 75.36±0.6 71.76±1.1 72.45±0.9",
}
TABLE_4 = {
    "cifar10": "92.51±0.5 628.5 92.57±0.4 617.0 92.81±0.3 604.2 92.77±0.5 564.5"
    " 92.64±0.4 459.5",
    "cifar100": "80.12±0.3 229.1 80.81±0.7 194.6 81.25±0.4 190.7 81.93±0.5 160.0"
    " 80.83±0.5 139.5",
    "flowers": "74.93±0.5 482.6 75.56±0.6 463.4 76.31±1.1 442.9 76.70±0.9 427.5"
    " 74.77±0.5 401.9",
}
THREE = ("cifar10", "cifar100", "flowers")


def cell(pair):
    return f"{pair[0]:.2f}±{pair[1]}"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_tables_1_and_2_are_as_printed(name):
    recipe = RECIPES[name]
    sgd, gsam, looksam, lwsam = (cell(ACCURACY[name, method]) for method in METHODS)
    assert TABLE_1[name] == (
        f"{recipe.batch_size} {recipe.learning_rate} {recipe.epochs} {sgd} {gsam}"
        f" {looksam} ({recipe.interval}) {lwsam} ({recipe.k})"
    )
    speeds = [THROUGHPUT[name, method] for method in METHODS]
    assert speeds == [float(x) for x in TABLE_2[name].split()]


@pytest.mark.parametrize("name", THREE)
def test_tables_3_and_4_are_as_printed(name):
    found = [cell(CRITERION[name, criterion]) for criterion in CRITERIA]
    assert found == TABLE_3[name].split()
    cells = [x for k in KS for x in (cell(BY_K[name, k][:2]), str(BY_K[name, k][2]))]
    assert cells == TABLE_4[name].split()


def test_nothing_more_is_published():
    assert (
        set(ACCURACY) == set(THROUGHPUT) == {(b, m) for b in RECIPES for m in METHODS}
    )
    assert set(CRITERION) == {(b, c) for b in THREE for c in CRITERIA}
    assert set(BY_K) == {(b, k) for b in THREE for k in KS}


def test_the_tables_agree_but_where_the_notes_say():
    """A number that stands in two tables is the same, or both are in a note."""
    for name in THREE:
        lwsam = ACCURACY[name, "lwsam"]
        k = RECIPES[name].k
        assert BY_K[name, k] == (*lwsam, THROUGHPUT[name, "lwsam"])
        everything = (
            *ACCURACY[name, "generalized_sam"],
            THROUGHPUT[name, "generalized_sam"],
        )
        assert BY_K[name, "all"] == everything
        for criterion, other in (("none", ACCURACY[name, "sgd"]), ("high", lwsam)):
            if CRITERION[name, criterion] != other:
                values = f"{CRITERION[name, criterion][0]} here and {other[0]}"
                assert any(values in note for note in NOTES["table3"])
    assert CRITERION["cifar10", "high"] == BY_K["cifar10", 4][:2]


def test_the_notes_hold():
    assert BY_K["cifar100", 1][2] == THROUGHPUT["cifar100", "sgd"]
    for name in ("cifar100", "flowers"):
        assert max(BY_K[name, k][0] for k in KS) == BY_K[name, 8][0]
    assert ACCURACY["vit", "generalized_sam"][0] > ACCURACY["vit", "lwsam"][0]
    drops = [1 - THROUGHPUT[n, "lwsam"] / THROUGHPUT[n, "sgd"] for n in THREE]
    assert [f"{x:.1%}" for x in drops] == ["8.3%", "16.8%", "23.3%"]
    assert [r.interval for r in RECIPES.values()] == [3, 2, 3, 2]


def test_a_cell():
    assert published.accuracy(*ACCURACY["cifar10", "sgd"]) == "91.96 ± 0.3 %"
