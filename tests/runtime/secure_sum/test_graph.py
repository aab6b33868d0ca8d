"""The graph of neighbours: regular, symmetric, the same for all, and within its bounds."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from fl_runtime.secure_sum.context import needed_holders
from fl_runtime.secure_sum.graph import Graph, degree


def neighbours(names: list[str], seed: bytes) -> dict[str, tuple[str, ...]]:
    graph = Graph(names, seed)
    return {name: graph.neighbours(name) for name in sorted(names)}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 31])
def test_few_sites_are_all_neighbours(count: int) -> None:
    names = [f"site-{number}" for number in range(count)]
    assert all(set(of) == set(names) - {name} for name, of in neighbours(names, b"seed").items())


@pytest.mark.parametrize("count", [32, 33, 100, 200, 1000])
def test_a_sparse_graph_is_regular_and_symmetric(count: int) -> None:
    names = [f"site-{number}" for number in range(count)]
    graph = neighbours(names, b"seed")
    assert {len(set(of) - {name}) for name, of in graph.items()} == {degree(count)} and degree(count) < count - 1
    pairs = {(name, other) for name, of in graph.items() for other in of}
    assert pairs == {(other, name) for name, other in pairs}
    assert graph == neighbours(names[::-1], b"seed") != neighbours(names, b"other seed")


@pytest.mark.parametrize("count", [32, 64, 200])
def test_thirty_percent_dropouts_leave_enough_holders(count: int) -> None:
    """The oracle: the tail as SciPy would sum it, in floats, and 300 draws of the dropouts."""
    size, dropping = degree(count), count * 3 // 10
    needed = needed_holders(0.6, size + 1)
    tail = sum(
        comb(dropping, lost) / comb(count - 1, size) * comb(count - 1 - dropping, size - lost)
        for lost in range(size + 2 - needed, min(dropping, size) + 1)
    )
    assert count * tail <= 2**-20
    names = [f"site-{number}" for number in range(count)]
    graph, random = neighbours(names, b"seed"), np.random.default_rng(0)
    for _ in range(300):
        gone = set(random.choice(names, dropping, replace=False))
        assert all(size + 1 - len(gone & set(graph[name])) >= needed for name in names if name not in gone)


def test_a_degree_is_not_chosen_larger_than_needed() -> None:
    assert [degree(count) for count in (31, 32, 100, 200, 1000)] == [30, 26, 76, 146, 430]


@pytest.mark.parametrize("count", [3, 8, 31, 32, 33, 100])
def test_survivors_among_neighbours_are_counted(count: int) -> None:
    names = [f"site-{number}" for number in range(count)]
    graph = Graph(names, b"seed")
    survivors = set(np.random.default_rng(count).choice(names, count * 2 // 3, replace=False))
    expected = {name: len(survivors & {name, *graph.neighbours(name)}) for name in survivors}
    assert graph.count_left(survivors) == expected
