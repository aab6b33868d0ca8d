"""Strategies that stay near the honest sites' mean while some sites send whatever they like.

None of them trusts what a site says of itself: `num_examples` is not a weight here, every site counts once
(NormBounding can be told otherwise). None takes extras (optimizer moments), which would be a way around it. Integer
and boolean tensors become the lower median of the sites' values. All tensors of an update count, running statistics
included.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.base import WeightsStrategy
from fl_runtime.aggregation.fedavg import blocks
from fl_runtime.aggregation.gathered import Combine, Gathered, stacked, tensors
from fl_runtime.aggregation.spec import choice, number
from fl_runtime.errors import ConfigError, RoundFailedError, UpdateRefusedError
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, ServerState, Settings, Update, is_floating


@dataclass(frozen=True)
class RobustStrategy(WeightsStrategy):
    """What these strategies have in common: all updates at once, and no extras."""

    linear: ClassVar[bool] = False
    weighted: ClassVar[bool] = False

    def check(self, update: Update) -> None:
        """No extras."""
        if update.extras:
            raise UpdateRefusedError(
                f"the strategy {self.name} takes no tensors beside the weights, such as {next(iter(update.extras))}",
                where=f"update of {update.site}, round {update.round}",
                fix='use optimizer_state="keep" or "reset"',
            )

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Waits for all updates."""
        return Gathered(base, allocate, self.plan)

    @abstractmethod
    def plan(self, updates: Sequence[Update], base: Arrays) -> Combine:
        """What to do with each block of the updates."""


@dataclass(frozen=True)
class CoordinateMedian(RobustStrategy):
    """x'_j = the median of the sites' x_ij, for every element j: of an even number, the mean of the middle two.

    Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", Definition 1. Holds
    while less than half of the sites are hostile. Every site counts once, whatever its number of examples.
    """

    name: ClassVar[str] = "median"

    def plan(self, updates: Sequence[Update], base: Arrays) -> Combine:
        """Element by element."""
        return lambda values, base, which: _middle(values, (len(values) - 1) // 2)


@dataclass(frozen=True)
class TrimmedMean(RobustStrategy):
    """x'_j = the mean of the sites' x_ij without the k largest and the k smallest, k = floor(trim n), for every j.

    Yin et al. 2018 (see CoordinateMedian), Definition 2. Holds while at most k of the n sites of a round are hostile.
    Every site counts once, whatever its number of examples.
    """

    name: ClassVar[str] = "trimmed-mean"
    trim: float = number(0.2, above=0, below=0.5)

    def check_sites(self, fewest: int) -> None:
        """Someone must be trimmed."""
        if self.trimmed(fewest) == 0:
            raise ConfigError(
                f"the strategy {self.name} with trim={self.trim:g} trims nobody of {fewest} updates, the fewest that "
                "a round may close with",
                where="strategy",
                fix=f"raise trim to at least {1 / fewest:.3g}, or min_sites"
                if fewest > 2
                else "give it three sites or more, and raise min_sites to as many",
            )

    def plan(self, updates: Sequence[Update], base: Arrays) -> Combine:
        """Element by element."""
        return lambda values, base, which: _middle(values, self.trimmed(len(values)))

    def trimmed(self, sites: int) -> int:
        """k of so many sites."""
        return math.floor(self.trim * sites + 1e-9)


@dataclass(frozen=True)
class Krum(RobustStrategy):
    """x' = the mean of the m updates with the lowest scores; the score of an update is the sum of its squared
    distances to the n - f - 2 updates that are closest to it.

    Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent"; with m = 1 it is
    Krum, which takes one site's update as it is, with more Multi-Krum. f: how many hostile sites it is to withstand,
    for which n >= 2 f + 3 updates are needed. Distances are over all float tensors, in float64. Every site counts
    once, whatever its number of examples; of equal scores the earlier site's counts.
    """

    name: ClassVar[str] = "krum"
    f: int = number(1, least=0)
    m: int = number(1, least=1)

    def check_sites(self, fewest: int) -> None:
        """n >= 2 f + 3, and no more are averaged than are honest."""
        problem = None
        if fewest < 2 * self.f + 3:
            problem = f"needs at least 2 f + 3 = {2 * self.f + 3} updates a round to withstand f={self.f} hostile sites"
        elif self.m > fewest - self.f:
            problem = f"cannot average m={self.m} updates where at most {fewest - self.f} of {fewest} are honest"
        if problem:
            raise ConfigError(
                f"the strategy {self.name} {problem}; this job lets a round close with {fewest}",
                where="strategy",
                fix="add sites, raise min_sites, or lower f and m",
            )

    def plan(self, updates: Sequence[Update], base: Arrays) -> Combine:
        """The mean over the chosen."""
        if len(updates) < 2 * self.f + 3:
            raise RoundFailedError(
                f"Krum needs {2 * self.f + 3} updates, and this round has {len(updates)}", fix="raise min_sites"
            )
        chosen = set(self.chosen(_squared_distances(updates, base)))

        def combine(values: Array, base: Array, which: Sequence[int]) -> Array:
            rows = [row for row, number in enumerate(which) if number in chosen]
            return _mean(values[rows]) if rows else base

        return combine

    def chosen(self, squared: Array) -> list[int]:
        """The m updates with the lowest scores. squared: distances between all, float64 [n, n]."""
        nearest = np.sort(squared, axis=1)[:, 1 : len(squared) - self.f - 1]  # 0 is the distance to itself
        return [int(index) for index in np.argsort(nearest.sum(axis=1), kind="stable")[: self.m]]


@dataclass(frozen=True)
class NormBounding(RobustStrategy):
    """x' = x + the mean of the sites' d_i min(1, bound / |d_i|),  d_i = x_i - x,  |d_i| over all float tensors.

    Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 4. bound: the longest step that one site
    may ask for, in the Euclidean norm over the whole model. weights: "equal" counts every site once; "examples"
    weighs by what the sites say, so a site that claims very many has the mean to itself.
    """

    name: ClassVar[str] = "norm-bounding"
    weighted: ClassVar[bool] = True
    bound: float = number(1.0, above=0)
    weights: Literal["equal", "examples"] = choice("equal", "examples")

    def plan(self, updates: Sequence[Update], base: Arrays) -> Combine:
        """A weighted sum of the differences."""
        norms = np.sqrt(_squared_norms(updates, base))
        factors = np.minimum(1.0, self.bound / np.maximum(norms, np.finfo(float).tiny))
        counts = np.array([u.site_weight if self.weights == "equal" else u.weight for u in updates])

        def combine(values: Array, base: Array, which: Sequence[int]) -> Array:
            shares = factors[which] * counts[which] / counts[which].sum()
            total: Array = np.zeros_like(base)
            for share, value in zip(shares, values, strict=True):
                value -= base
                value *= value.dtype.type(share)
                total += value
            total += base
            return total

        return combine


def _middle(values: Array, cut: int) -> Array:
    """The mean over the rows, without the `cut` smallest and the `cut` largest of each column."""
    values.sort(axis=0)
    return _mean(values[cut : len(values) - cut])


def _mean(rows: Array) -> Array:
    """In the order of the rows, in their dtype."""
    total: Array = rows[0].copy()
    for row in rows[1:]:
        total += row
    total /= total.dtype.type(len(rows))
    return total


def _squared_norms(updates: Sequence[Update], base: Arrays) -> Array:
    """|x_i - x|^2 over all float tensors, float64 [n]."""
    total = np.zeros(len(updates))
    for which, difference in _differences(updates, base):
        total[which] += _square_sums(difference)
    return total


def _squared_distances(updates: Sequence[Update], base: Arrays) -> Array:
    """|x_i - x_j|^2 over all float tensors, float64 [n, n]. Computed pair by pair rather than as a matrix product:
    the same bits with every number of threads, and zero where two are equal."""
    total = np.zeros((len(updates), len(updates)))
    for which, difference in _differences(updates, base):
        for row, one in enumerate(which):
            total[one, which[row + 1 :]] += _square_sums(difference[row + 1 :] - difference[row])
    both: Array = total + total.T
    return both


def _differences(updates: Sequence[Update], base: Arrays) -> Iterator[tuple[list[int], Array]]:
    """(which updates, their x_i - x as float64 [n, elements]), block by block over all float tensors."""
    for _, x, which, values in tensors(updates, base):
        if is_floating(x.dtype) and values:
            for block in blocks(x.size):
                yield which, stacked(values, block, np.dtype(np.float64)) - x[block].astype(np.float64)


def _square_sums(rows: Array) -> Array:
    sums: Array = np.sum(rows * rows, axis=1)
    return sums
