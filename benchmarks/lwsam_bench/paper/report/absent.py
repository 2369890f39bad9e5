"""What stands in a report for what has not run: the published numbers, empty cells."""

from lwsam_bench.paper import published
from lwsam_bench.paper.artefact import Table
from lwsam_bench.paper.setups import METHODS, TITLES


_CRITERIA = {
    "none": "None (SGD)",
    "high": "High-Norm",
    "low": "Low-Norm",
    "random": "Random",
}


def tables(name: str) -> tuple[Table, ...]:
    """Return the published tables of an artefact with room for ours; none for figures."""
    made = {"table1": _table1, "table2": _table2, "table3": _table3, "table4": _table4}
    if name not in made:
        return ()
    found = (made[name](benchmark) for benchmark in published.BENCHMARKS)
    return tuple(table for table in found if table.rows)


def _table1(benchmark: str) -> Table:
    rows = [
        (_method(benchmark, method), "", published.accuracy(*value))
        for (name, method), value in published.ACCURACY.items()
        if name == benchmark
    ]
    return _table(benchmark, "method", ("ours", "published"), rows)


def _table2(benchmark: str) -> Table:
    rows = [
        (_method(benchmark, method), "", str(speed))
        for (name, method), speed in published.THROUGHPUT.items()
        if name == benchmark
    ]
    return _table(benchmark, "method", ("images/s", "published"), rows)


def _table3(benchmark: str) -> Table:
    rows = [
        (_CRITERIA[criterion], "", published.accuracy(*value))
        for (name, criterion), value in published.CRITERION.items()
        if name == benchmark
    ]
    return _table(benchmark, "criterion", ("ours", "published"), rows)


def _table4(benchmark: str) -> Table:
    rows = [
        (str(k), "", published.accuracy(mean, spread), str(speed))
        for (name, k), (mean, spread, speed) in published.BY_K.items()
        if name == benchmark
    ]
    return _table(benchmark, "k", ("ours", "published", "published, images/s"), rows)


def _method(benchmark: str, method: str) -> str:
    """Return the title of a method, with Table 1's number in brackets."""
    recipe = published.RECIPES[benchmark]
    numbers = {"looksam": f" ({recipe.interval})", "lwsam": f" ({recipe.k})"}
    return METHODS[method] + numbers.get(method, "")


def _table(
    benchmark: str, first: str, others: tuple[str, ...], rows: list[tuple[str, ...]]
) -> Table:
    title = f"{TITLES[benchmark]}, {published.RECIPES[benchmark].model}"
    return Table(title, (first, *others), tuple(rows))
