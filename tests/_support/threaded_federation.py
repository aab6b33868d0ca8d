"""A federation of threads: sums by NumPy, without processes or messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Place:
    """Which of the sites a thread is."""

    name: str
    index: int
    count: int


@dataclass
class Meeting:
    """Where the threads of one federation leave their values and take the result."""

    count: int
    values: dict[int, Any] = field(default_factory=dict)
    rounds: int = 0
    largest: int = 0

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count)

    def exchange(self, index: int, value: Any) -> list[Any]:
        self.values[index] = value
        self.barrier.wait(timeout=60)
        everyone = [self.values[number] for number in range(self.count)]
        self.barrier.wait(timeout=60)
        return everyone


@dataclass(frozen=True)
class ThreadedFederation:
    """The federation as one of its threads sees it."""

    site: Place
    meeting: Meeting

    def sum(self, arrays: Mapping[str, Any], *, integers: bool = False) -> dict[str, Any]:
        for name, array in arrays.items():
            assert not integers or np.array_equal(array, np.rint(array)), f"{name} is not whole"
            assert np.isfinite(array).all(), f"{name} is not finite"
        everyone = self.meeting.exchange(self.site.index, {k: np.array(v, np.float64) for k, v in arrays.items()})
        if self.site.index == 0:
            self.meeting.rounds += 1
            self.meeting.largest = max(self.meeting.largest, sum(np.size(a) for a in arrays.values()) * 8)
        assert len({tuple((k, v.shape) for k, v in one.items()) for one in everyone}) == 1, (
            "the sites add different things"
        )
        return {name: sum(one[name] for one in everyone[1:]) + everyone[0][name] for name in everyone[0]}

    def union(self, texts: Sequence[str]) -> list[str]:
        return sorted({text for one in self.meeting.exchange(self.site.index, list(texts)) for text in one})


def run_sites(count: int, function: Callable[[ThreadedFederation], Any]) -> list[Any]:
    """Run a function at each site of a federation of threads, and return what each has returned."""
    meeting = Meeting(count)

    def site(index: int) -> Any:
        try:
            return function(ThreadedFederation(Place(f"site-{index + 1}", index, count), meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(site, index) for index in range(count)]
    errors = [future.exception() for future in futures]
    own = [error for error in errors if error is not None and not isinstance(error, threading.BrokenBarrierError)]
    if own:
        raise own[0]
    return [future.result() for future in futures]
