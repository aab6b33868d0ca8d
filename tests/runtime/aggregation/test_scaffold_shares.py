"""SCAFFOLD when only some sites take part: c stays the weighted mean of all c_i, and the optimum is the right one.

The oracle is a loop in float64 with quadratic losses: site i minimises a_i (x - b_i)^2 / 2, so the optimum of the
federation has a closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fl_runtime.aggregation.corrections.local_terms import control_extras, control_of
from fl_runtime.aggregation.corrections.scaffold import Scaffold
from fl_runtime.aggregation.shares import within_cap
from fl_runtime.server.courses.sampling import sample_sites
from fl_runtime.types import Array, Arrays, RunSettings, ServerState, Update

SITES = tuple(f"site-{number}" for number in range(1, 7))
EXAMPLES = np.array([10, 400, 35, 90, 7, 150])
CURVATURE = np.array([1.0, 0.5, 2.0, 0.8, 1.5, 1.2])
MINIMUM = np.array([9.0, -3.0, 4.0, 20.0, -15.0, 7.0])
ROUNDS, STEPS, RATE = 1_000, 5, 0.1


@dataclass
class Federation:
    """Drives the strategy's aggregator as the server does; the sites are plain NumPy in float64."""

    strategy: Scaffold
    site_weights: Array = field(default_factory=lambda: np.ones(len(SITES)))
    examples: Array = field(default_factory=EXAMPLES.copy)
    x: Array = field(default_factory=lambda: np.zeros(1))
    c: Array = field(default_factory=lambda: np.zeros(1))
    own: Array = field(default_factory=lambda: np.zeros(len(SITES)))
    previous: Arrays = field(default_factory=dict)
    extras: Arrays = field(default_factory=dict)
    max_share: float | None = None

    def round(self, number: int, participants: list[int]) -> None:
        following: dict[str, Array] = {}

        def allocate_next(arrays: Arrays) -> Arrays:
            following.update({name: np.empty_like(array) for name, array in arrays.items()})
            return following

        state = ServerState(self.extras, self.previous, allocate_next, SITES, self.max_share)
        updates = []
        aggregator = self.strategy.aggregator({"w": self.x}, _allocate, {}, state)
        for i in participants:
            y = self.x.copy()
            for _ in range(STEPS):
                y -= RATE * (CURVATURE[i] * (y - MINIMUM[i]) + self.c - self.own[i])
            own = self.own[i] - self.c + (self.x - y) / (STEPS * RATE)
            share = control_extras({"w": (own - self.own[i]) / len(SITES)})
            self.own[i] = own[0]
            examples, factor = int(self.examples[i]), float(self.site_weights[i])
            update = Update("job", number, "", SITES[i], 1, number - 1, {"w": y}, examples, extras=share)
            updates.append(replace(update, site_weight=factor))
        if self.max_share is not None:
            updates, _ = within_cap(updates, self.strategy.weights_of(updates), self.max_share)
        for update in updates:
            aggregator.add(update)
        arrays, self.extras = aggregator.result()
        self.x, self.c, self.previous = arrays["w"], control_of(self.extras)["w"], following


def _allocate(arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
    first, second = ({name: np.empty_like(a) for name, a in given.items()} for given in (arrays, extras))
    return first, second


def fraction(share: float) -> Callable[[], Iterator[list[int]]]:
    settings = RunSettings("job", SITES, 1, fraction=share)

    def rounds() -> Iterator[list[int]]:
        for number in range(1, ROUNDS + 1):
            yield [SITES.index(name) for name in sample_sites(settings, number, SITES)]

    return rounds


def missing() -> Iterator[list[int]]:
    """Sites that are away at random; one of them comes for the first time in round 300."""
    draw = np.random.default_rng(0)
    for number in range(1, ROUNDS + 1):
        there = [i for i in range(len(SITES)) if draw.random() < 0.6 and (i != 1 or number >= 300)]
        yield there or [0]


def everyone() -> Iterator[list[int]]:
    for _ in range(ROUNDS):
        yield list(range(len(SITES)))


@pytest.mark.parametrize("weights", ["examples", "equal"])
@pytest.mark.parametrize("rounds", [fraction(0.5), fraction(1 / 6), missing, everyone])
@pytest.mark.parametrize("factors", [np.ones(6), np.array([1.0, 2.0, 1.0, 0.5, 3.0, 1.0])])
def test_c_is_the_weighted_mean_over_all_sites(
    weights: str, rounds: Callable[[], Iterator[list[int]]], factors: Array
) -> None:
    federation = Federation(Scaffold(lr=0.5, weights=weights), factors)  # type: ignore[arg-type]
    weight = factors * (EXAMPLES if weights == "examples" else 1)
    p = weight / weight.sum()
    seen: set[int] = set()
    tail = []
    for number, participants in enumerate(rounds(), 1):
        federation.round(number, participants)
        seen.update(participants)
        if len(seen) == len(SITES):  # all weights are known
            np.testing.assert_allclose(federation.c, p @ federation.own, rtol=1e-9, atol=1e-9)
        tail.append(federation.x[0])
    optimum = (p * CURVATURE) @ MINIMUM / ((p * CURVATURE).sum())
    if len(participants) > 1 or rounds is everyone:
        np.testing.assert_allclose(np.mean(tail[-100:]), optimum, atol=0.02)


@pytest.mark.parametrize("rounds", [fraction(0.5), missing, everyone])
def test_under_a_cap_no_site_has_a_larger_share_in_c(rounds: Callable[[], Iterator[list[int]]]) -> None:
    federation = Federation(Scaffold(), examples=np.array([10, 4000, 35, 90, 7, 150_000]), max_share=0.4)
    seen: set[int] = set()
    for number, participants in enumerate(rounds(), 1):
        if len(participants) < 3:
            continue
        federation.round(number, participants)
        seen.update(participants)
        if len(seen) == len(SITES):
            weight = federation.previous["site_weights"]
            p = weight / weight.sum()
            assert p.max() <= 0.4 * (1 + 1e-9)
            np.testing.assert_allclose(federation.c, p @ federation.own, rtol=1e-9, atol=1e-9)
    assert len(seen) == len(SITES)


def test_the_first_number_of_examples_counts_for_c() -> None:
    federation, p = Federation(Scaffold()), EXAMPLES / EXAMPLES.sum()
    for number in range(1, 31):
        federation.round(number, list(range(len(SITES))))
        federation.examples = EXAMPLES + number * np.arange(len(SITES))
        np.testing.assert_allclose(federation.c, p @ federation.own, rtol=1e-9, atol=1e-9)


def test_with_all_sites_the_bits_are_those_of_the_mean_times_the_number_of_sites() -> None:
    draw, c = np.random.default_rng(1), np.zeros(50, np.float32)
    extras: Arrays = {}
    previous: dict[str, Array] = {}

    def allocate_next(arrays: Arrays) -> Arrays:
        previous.update({name: np.empty_like(array) for name, array in arrays.items()})
        return previous

    for number in range(1, 5):
        state = ServerState(extras, dict(previous), allocate_next, SITES)
        aggregator = Scaffold().aggregator({"w": c}, _allocate, {}, state)
        mean, total = np.zeros(50, np.float32), 0
        for name, count in zip(SITES, EXAMPLES, strict=True):
            share = draw.normal(size=50).astype(np.float32)
            extra = control_extras({"w": share})
            aggregator.add(Update("job", number, "", name, 1, number - 1, {"w": c}, int(count), extras=extra))
            total += int(count)
            mean = share if total == count else mean + np.float32(count / total) * (share - mean)
        _, extras = aggregator.result()
        c = mean * np.float32(len(SITES)) if number == 1 else mean * np.float32(len(SITES)) + c
        assert control_of(extras)["w"].tobytes() == c.tobytes()
