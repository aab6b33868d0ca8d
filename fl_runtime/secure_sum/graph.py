"""Who is whose neighbour in a secure sum: everybody below 32 sites, a sparse regular graph from 32 on.

The graph is that of Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", section 3:
the sites in pseudo-random order on a circle, each with the k / 2 next ones on both sides as its neighbours. Their three
events bound k. All tails are exact (hypergeometric, without replacement) and summed over the sites. Assumed are at most
1/10 of the sites colluding with the server and at most 3/10 dropping out, over all phases of a stage together, and the
default threshold t of k + 1 holders:

- secrecy, except with probability 2^-40: no honest site has 2t - (k + 1) or more colluding neighbours. So neither can
  they open its secrets (that takes t), nor can the server show two sets of survivors to two groups of its holders.
- secrecy, except with probability 2^-40: the honest sites that stay are connected. They fall apart only where k / 2
  sites in a row collude or have dropped out.
- success, except with probability 2^-20: each site keeps t holders.

At 3/10 dropouts and t above 6/10 of the holders the last one decides, and the graph becomes sparse slowly: 26
neighbours at 32 sites, 76 at 100, 146 at 200, 430 at 1000. The order depends on all public keys and the stage. A server
that colludes with sites may try many keys of theirs; each doubling of the tries costs one bit of the 40.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import accumulate
from math import comb

from fl_runtime.secure_sum.context import DEFAULT_THRESHOLD, needed_holders

COMPLETE_BELOW = 32
_COLLUDING, _DROPPING = (1, 10), (3, 10)
_SECRECY, _SUCCESS = 40, 20  # negative base-2 logarithms of the probabilities of failure


class Graph:
    """Who is whose neighbour. If v is a neighbour of u, u is one of v.

    Args:
        names: Names of the sites, in any order.
        seed: Bytes that decide on the order of the circle.
    """

    def __init__(self, names: Iterable[str], seed: bytes) -> None:
        self._circle = sorted(names, key=lambda name: hashlib.sha256(seed + name.encode()).digest())
        self._places = {name: place for place, name in enumerate(self._circle)}
        self._neighbours: dict[str, tuple[str, ...]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Return the neighbours of a site.

        Args:
            name: Name of the site.

        Returns:
            Their names in order.
        """
        if name not in self._neighbours:
            place, count = self._places[name], len(self._circle)
            size = degree(count)
            first = -(size // 2)
            others = (self._circle[(place + step) % count] for step in range(first, first + size + 1) if step)
            self._neighbours[name] = tuple(sorted(others))
        return self._neighbours[name]

    def count_left(self, survivors: Collection[str]) -> dict[str, int]:
        """Return how many of each survivor and its neighbours survive.

        Args:
            survivors: Names of sites.

        Returns:
            Survivor -> number, 1 for a site that has lost all of its neighbours.
        """
        count, size = len(self._circle), degree(len(self._circle))
        around = [name in survivors for name in (*self._circle, *self._circle)]
        before = [0, *accumulate(around)]  # survivors before each place; the circle is passed twice
        windows = ((name, (self._places[name] - size // 2) % count) for name in survivors)
        return {name: before[first + size + 1] - before[first] for name, first in windows}


@lru_cache(maxsize=256)
def degree(sites: int) -> int:
    """Return the number of neighbours of each site.

    Args:
        sites: Number of sites.

    Returns:
        An even number that satisfies the bounds of this module, or `sites` - 1 if the graph is complete.
    """
    complete = max(sites - 1, 0)
    if sites < COMPLETE_BELOW:
        return complete
    low, high = 1, (complete + 1) // 2  # halves of degrees: `low` is too small, `high` stands for the complete graph
    while high - low > 1:
        middle = (low + high) // 2
        if _suffices(sites, 2 * middle):
            high = middle
        else:
            low = middle
    return min(2 * high, complete)


def _suffices(sites: int, size: int) -> bool:
    threshold = needed_holders(DEFAULT_THRESHOLD, size + 1)
    colluding, dropping = (sites * part // whole for part, whole in (_COLLUDING, _DROPPING))
    others = sites - 1
    ways = comb(others, size)
    too_many = _ways_at_least(others, colluding, size, 2 * threshold - (size + 1))
    in_a_row = comb(colluding + dropping, size // 2)
    too_few_left = _ways_at_least(others, dropping, size, size + 1 - threshold + 1)
    return (
        sites * too_many << _SECRECY <= ways
        and sites * in_a_row << _SECRECY <= comb(others, size // 2)
        and sites * too_few_left << _SUCCESS <= ways
    )


def _ways_at_least(others: int, marked: int, drawn: int, least: int) -> int:
    """Return in how many ways `drawn` of `others` can be chosen such that `least` or more are marked."""
    return sum(
        comb(marked, hits) * comb(others - marked, drawn - hits) for hits in range(least, min(marked, drawn) + 1)
    )
