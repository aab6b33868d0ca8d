"""Robust strategies: they limit the influence of sites that send arbitrary updates.

Every site has the same weight, since a hostile site could claim any number of examples (`NormBounding` has an option).
Extras are refused, since a hostile site could use them to bypass the strategy. Integer and boolean tensors become the
lower median of the sites' values. All tensors are covered, running statistics included.
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
from fl_runtime.aggregation.robust.gathered import Combine, Gathered, stacked, tensors
from fl_runtime.aggregation.spec import choice, number
from fl_runtime.errors import ConfigError, RoundFailedError, UpdateRefusedError
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, ServerState, Settings, Update, is_floating


@dataclass(frozen=True)
class RobustStrategy(WeightsStrategy):
    """Base of the robust strategies: it collects all updates and refuses extras. A subclass adds `name` and `plan`."""

    weighted: ClassVar[bool] = False

    def check(self, update: Update) -> None:
        """Refuse updates with extras."""
        if update.extras:
            raise UpdateRefusedError(
                f"the strategy {self.name} takes no tensors beside the weights, such as {next(iter(update.extras))}",
                where=f"update of {update.site}, round {update.round}",
                fix='use optimizer_state="keep" or "reset"',
            )

    def weights_of(self, updates: Sequence[Update]) -> Sequence[float]:
        """Return the same weight for every update, unless sites have weights; see `Strategy`."""
        return super().weights_of(updates) if self.weighted else [1.0] * len(updates)

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Return an aggregator that waits for all updates."""
        return Gathered(base, allocate, self.plan)

    @abstractmethod
    def plan(self, updates: Sequence[Update], base: Arrays) -> Combine:
        """Decide how the updates of a round are combined.

        Args:
            updates: All updates of the round.
            base: The global model of the round.

        Returns:
            The function that combines each block of float tensors.
        """


@dataclass(frozen=True)
class CoordinateMedian(RobustStrategy):
    """The median of the sites' values for every element; of an even number, the mean of the middle two.

    It is robust while less than half of the sites of a round are hostile. Every site has the same weight. It has no
    arguments and needs no special capability.

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", definition 1.
    """

    name: ClassVar[str] = "median"
    partial: ClassVar[bool] = True

    def plan(self, updates: Sequence[Update], base: Arrays) -> Combine:
        """Take the median of every element, see `RobustStrategy.plan`."""
        return lambda values, base, senders: _middle(values, (len(values) - 1) // 2)


@dataclass(frozen=True)
class TrimmedMean(RobustStrategy):
    """For every element, the mean of the n sites' values without the k largest and the k smallest, k = floor(trim n).

    It is robust while at most k sites of a round are hostile. Every site has the same weight. Sites need no special
    capability. The job's quorum must be large enough for k to be at least 1.

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", definition 2.

    Attributes:
        trim: Share of values to remove on each side, greater than 0 and below 0.5.

    Raises:
        ConfigError: If `trim` is out of range.
    """

    name: ClassVar[str] = "trimmed-mean"
    trim: float = number(0.2, above=0, below=0.5)

    def check_sites(self, fewest: int) -> None:
        """Raise ConfigError if k would be 0 for `fewest` updates."""
        if self.trimmed(fewest) == 0:
            raise ConfigError(
                f"the strategy {self.name} with trim={self.trim:g} removes no value of {fewest} updates, the fewest "
                "that a round may close with",
                where="strategy",
                fix=f"raise trim to at least {1 / fewest:.3g}, or min_sites"
                if fewest > 2
                else "use three sites or more, and raise min_sites to as many",
            )

    def plan(self, updates: Sequence[Update], base: Arrays) -> Combine:
        """Take the trimmed mean of every element, see `RobustStrategy.plan`."""
        return lambda values, base, senders: _middle(values, self.trimmed(len(values)))

    def trimmed(self, sites: int) -> int:
        """Return how many values are left out at each end.

        Args:
            sites: Number of updates in the round.

        Returns:
            `trim` times `sites`, rounded down.
        """
        return math.floor(self.trim * sites + 1e-9)


@dataclass(frozen=True)
class Krum(RobustStrategy):
    """Krum and Multi-Krum: the mean of the m updates that lie closest to the others.

    The score of an update is the sum of its squared distances to the n - f - 2 updates closest to it; the m updates
    with the lowest scores are averaged. With m = 1 (Krum) the result is one site's update, unchanged. Distances are
    over all float tensors, in float64. Every site has the same weight; of equal scores, the earlier site wins. Sites
    need no special capability. The job's quorum must be at least 2 f + 3 and at least m + f.

    Source: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent".

    Attributes:
        f: Number of hostile sites to withstand, at least 0.
        m: Number of updates to average, at least 1.

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "krum"
    f: int = number(1, least=0)
    m: int = number(1, least=1)

    def check_sites(self, fewest: int) -> None:
        """Raise ConfigError unless `fewest` is at least 2 f + 3 and at least m + f."""
        problem = None
        if fewest < 2 * self.f + 3:
            problem = f"needs at least 2 f + 3 = {2 * self.f + 3} updates a round to withstand f={self.f} hostile sites"
        elif self.m > fewest - self.f:
            problem = (
                f"cannot average m={self.m} updates when only {fewest - self.f} of {fewest} are known to be honest"
            )
        if problem:
            raise ConfigError(
                f"the strategy {self.name} {problem}; this job lets a round close with {fewest}",
                where="strategy",
                fix="add sites, raise min_sites, or lower f and m",
            )

    def cohort(self, updates: int) -> int:
        """Return m, or the number of updates if it is less."""
        return min(self.m, updates)

    def plan(self, updates: Sequence[Update], base: Arrays) -> Combine:
        """Average the m updates with the lowest scores, see `RobustStrategy.plan`."""
        if len(updates) < 2 * self.f + 3:
            raise RoundFailedError(
                f"Krum needs {2 * self.f + 3} updates, but this round has {len(updates)}", fix="raise min_sites"
            )
        chosen = set(self.chosen(_squared_distances(updates, base)))

        def combine(values: Array, base: Array, senders: Sequence[int]) -> Array:
            rows = [row for row, number in enumerate(senders) if number in chosen]
            return _mean(values[rows]) if rows else base

        return combine

    def chosen(self, squared: Array) -> list[int]:
        """Select the updates to average.

        Args:
            squared: Squared distances between all updates, float64 [n, n].

        Returns:
            Indices of the m updates with the lowest scores.
        """
        nearest = np.sort(squared, axis=1)[:, 1 : len(squared) - self.f - 1]  # 0 is the distance to itself
        return [int(index) for index in np.argsort(nearest.sum(axis=1), kind="stable")[: self.m]]


@dataclass(frozen=True)
class NormBounding(RobustStrategy):
    """Limits the norm of every site's change before averaging.

        x' = x + mean_i(d_i min(1, bound / |d_i|)),   d_i = x_i - x

    |d_i| is the Euclidean norm over all float tensors. Sites need no special capability.

    Source: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 4.

    Attributes:
        bound: Largest norm of one site's change, in the unit of the weights, greater than 0.
        weights: "equal" gives every site the same weight. "examples" weights by the numbers that the sites state, so a
            site that claims very many examples dominates the mean.

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "norm-bounding"
    partial: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    bound: float = number(1.0, above=0)
    weights: Literal["equal", "examples"] = choice("equal", "examples")

    def plan(self, updates: Sequence[Update], base: Arrays) -> Combine:
        """Average the limited differences, see `RobustStrategy.plan`."""
        norms = np.sqrt(_squared_norms(updates, base))
        factors = np.minimum(1.0, self.bound / np.maximum(norms, np.finfo(float).tiny))
        counts = np.array([u.site_weight if self.weights == "equal" else u.weight for u in updates])

        def combine(values: Array, base: Array, senders: Sequence[int]) -> Array:
            shares = factors[senders] * counts[senders] / counts[senders].sum()
            total: Array = np.zeros_like(base)
            for share, value in zip(shares, values, strict=True):
                value -= base
                value *= value.dtype.type(share)
                total += value
            total += base
            return total

        return combine


def _middle(values: Array, cut: int) -> Array:
    """Return the mean of each column without its `cut` smallest and `cut` largest values."""
    values.sort(axis=0)
    return _mean(values[cut : len(values) - cut])


def _mean(rows: Array) -> Array:
    """Return the mean of the rows, summed in their order and dtype; finite if all rows are."""
    total: Array = rows[0].copy()
    with np.errstate(over="ignore", invalid="ignore"):  # sums that overflow are computed again
        for row in rows[1:]:
            total += row
    total /= total.dtype.type(len(rows))
    overflown = ~np.isfinite(total)
    if overflown.any():
        total[overflown] = _mean_of_large(rows[:, overflown])
    return total


def _mean_of_large(rows: Array) -> Array:
    """Return the mean of finite rows whose sum overflows: they are divided by a power of two before summing."""
    dtype, scale = rows.dtype.type, 2.0 ** -math.ceil(math.log2(len(rows)))
    low, high, total = rows.min(axis=0), rows.max(axis=0), np.zeros(rows.shape[1], rows.dtype)
    for row in rows:
        total += row * dtype(scale)
    with np.errstate(over="ignore"):  # rounding may pass the largest number, to which it is limited
        mean: Array = np.clip(total / dtype(len(rows) * scale), low, high)
    return mean


def _squared_norms(updates: Sequence[Update], base: Arrays) -> Array:
    """Return |x_i - x|^2 over all float tensors, float64 [n]."""
    total = np.zeros(len(updates))
    for senders, difference in _differences(updates, base):
        total[senders] += _square_sums(difference)
    return total


def _squared_distances(updates: Sequence[Update], base: Arrays) -> Array:
    """Return |x_i - x_j|^2 over all float tensors, float64 [n, n].

    It is computed pair by pair, since a matrix product would depend on the number of threads and not give exact zeros.
    """
    total = np.zeros((len(updates), len(updates)))
    for senders, difference in _differences(updates, base):
        for row, one in enumerate(senders):
            total[one, senders[row + 1 :]] += _square_sums(difference[row + 1 :] - difference[row])
    both: Array = total + total.T
    return both


def _differences(updates: Sequence[Update], base: Arrays) -> Iterator[tuple[list[int], Array]]:
    """Yield (indices of updates, their x_i - x as float64 [n, elements]) for each block of the float tensors."""
    for _, x, senders, values in tensors(updates, base):
        if is_floating(x.dtype) and values:
            for block in blocks(x.size):
                yield senders, stacked(values, block, np.dtype(np.float64)) - x[block].astype(np.float64)


def _square_sums(rows: Array) -> Array:
    sums: Array = np.sum(rows * rows, axis=1)
    return sums
