"""The filter `GaussianDP`: differential privacy with Gaussian noise, at the site or at the server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.errors import UpdateRefusedError
from fl_runtime.filters.base import FilterHost, FilterSettings, Point, RunningFilter, check_number, is_real, refuse
from fl_runtime.filters.calibration import noise_for
from fl_runtime.filters.ledger import (
    BudgetLimit,
    Ledger,
    Mechanism,
    PrivacyBudget,
    epsilon,
    need_accounting,
    training_of,
)
from fl_runtime.filters.noise import bernoulli, blocks, gaussian, store_rounded
from fl_runtime.tensor_names import is_statistic
from fl_runtime.types import Allocate, Array, Arrays, Settings, Task, Update

Auto = Literal["auto"]
_MOST_INCREASE = 4.0  # with more noise than this times the planned one, a round would rather spoil the model


@dataclass(frozen=True)
class GaussianDP(FilterSettings):
    """Clips an update d to an L2 norm of at most `clip` over all tensors together, and adds Gaussian noise:

        y = d min(1, clip / |d|) + N(0, (noise_multiplier clip)^2 I)

    `epsilon` alone is enough: the noise is then the least with which all rounds of the job stay within that budget.

    At `site_out` (default; local differential privacy) each site does this to its own update. The guarantee holds
    against the server and everyone else.

    At `server_in` (central differential privacy) the server clips each update and adds the noise once, to the sum of
    m updates. The new model is x + (sum of clipped d + noise) / (sampling m). All sites have the same weight, whatever
    their numbers of examples. The guarantee holds against everyone who sees the models, but not against the server.
    The strategy must be `fedavg` without arguments, and this must be the last filter at `server_in`.

    The unit of privacy is a site's whole update of a round, not a single record. Integer tensors are replaced by those
    of the global model. The running statistics of normalization layers stay at the site: noise would make variances
    negative. Metrics and numbers of examples are not covered; see `NoisyMetrics` and `Examples`.

    Every release is recorded in the ledger, also one that is repeated after a restart, and the total epsilon appears in
    the history. Noise is drawn from the operating system in float64 and rounded to float32 or narrower. Needs the extra
    `[dp]`.

    Sources: Dwork and Roth 2014, "The algorithmic foundations of differential privacy", appendix A; McMahan et al.
    2018, "Learning differentially private recurrent language models" (clipping of whole updates, fixed denominator).

    Attributes:
        clip: Largest L2 norm of an update, in the unit of the weights, greater than 0.
        noise_multiplier: Standard deviation of the noise divided by `clip`, greater than 0. "auto" computes it from
            `epsilon`, `delta` and the number of rounds in which a site takes part. A round that is repeated makes the
            noise of the rounds after it larger, up to four times.
        epsilon: Privacy budget, greater than 0. A job whose rounds would exceed it is refused when it is made. A single
            round that would exceed it is refused by the site at `site_out`, by the server at `server_in`. It counts for
            the job with all its trainings, or over all jobs if the filter is in the site's policy. None sets no limit
            and needs a number as `noise_multiplier`.
        delta: The delta at which epsilon is computed, between 0 and 1.
        adjacency: "replace" protects an update against replacement by any other (sensitivity 2 clip). "zero" protects
            it against replacement by zeros, with a public number of sites (sensitivity clip).
        sampling: Probability with which an update counts, greater than 0 and at most 1; only at `server_in`, and below
            1 only with adjacency "zero". The server keeps its draws secret, so amplification by Poisson sampling holds.
        trainings: Number of trainings of the job's script that share the budget, such as the folds of a
            cross-validation. For noise_multiplier "auto".

    Raises:
        ConfigError: If an argument is out of range.
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out", "server_in")
    clip: float = 1.0
    noise_multiplier: float | Auto = "auto"
    epsilon: float | None = None
    delta: float = 1e-5
    adjacency: Literal["replace", "zero"] = "replace"
    sampling: float = 1.0
    trainings: int = 1

    def __post_init__(self) -> None:
        check_number(self, "clip", self.clip, above=0)
        if self.noise_multiplier != "auto":
            check_number(self, "noise_multiplier", self.noise_multiplier, above=0)
        check_number(self, "delta", self.delta, above=0, below=1)
        check_number(self, "sampling", self.sampling, above=0, most=1)
        check_number(self, "trainings", self.trainings, least=1)
        if self.epsilon is not None:
            check_number(self, "epsilon", self.epsilon, above=0)
        elif self.noise_multiplier == "auto":
            raise refuse(
                "GaussianDP has neither a budget nor noise",
                "give epsilon, such as 8, from which the noise is computed; or noise_multiplier",
            )
        if self.adjacency not in ("replace", "zero"):
            raise refuse(f"GaussianDP: adjacency is {self.adjacency!r}", 'give "replace" or "zero"')
        if self.sampling < 1 and self.adjacency != "zero":
            raise refuse("GaussianDP: sampling below 1 needs adjacency zero", "use adjacency: zero")

    @property
    def sensitivity(self) -> float:
        """Largest change of the clipped update, in units of `clip`, that the guarantee covers."""
        return 2.0 if self.adjacency == "replace" else 1.0

    def release(self, noise_multiplier: float) -> Mechanism:
        """Return the release of one round, scaled to sensitivity 1.

        Args:
            noise_multiplier: Standard deviation of the noise divided by `clip`.

        Returns:
            The release.
        """
        return Mechanism("gaussian", noise_multiplier / self.sensitivity, self.sampling)

    def multiplier(self, releases: int, earlier: Sequence[Mechanism] = ()) -> float:
        """Return the noise multiplier for a number of releases.

        Args:
            releases: Number of releases that share the budget, or what is left of it.
            earlier: What has been released already, against the same budget.

        Returns:
            `noise_multiplier` itself, or with "auto" the least one that stays within the budget.

        Raises:
            PrivacyBudgetError: If nothing is left of the budget.
        """
        if self.noise_multiplier != "auto":
            return self.noise_multiplier
        assert self.epsilon is not None
        budget = PrivacyBudget(self.epsilon, self.delta)
        return noise_for(budget, releases, self.release(1.0), earlier) * self.sensitivity

    def limits(self, host: FilterHost) -> list[BudgetLimit]:
        """Return the limits that hold at a host: this filter's own budget, and the host's."""
        limits = [] if self.epsilon is None else [self._limit(self.epsilon, host)]
        return limits + ([host.budget] if host.budget else [])

    def _limit(self, epsilon: float, host: FilterHost) -> BudgetLimit:
        return BudgetLimit(PrivacyBudget(epsilon, self.delta), host.site or "the server", all_jobs=host.from_policy)

    def open(self, host: FilterHost) -> RunningFilter:
        """Make the filter of one site."""
        return _LocalGaussian(self, host)


class Releases:
    """The releases of one `GaussianDP` in one training: their noise, and the ledger that they are recorded in.

    Args:
        settings: The filter.
        host: The site or server at which it runs.

    Raises:
        ConfigError: If a package is missing, or the noise cannot be computed since the job sets no number of rounds.
    """

    def __init__(self, settings: GaussianDP, host: FilterHost) -> None:
        need_accounting()
        if settings.noise_multiplier == "auto" and host.participation is None:
            raise refuse(
                "GaussianDP computes its noise from the number of rounds, which the job does not set",
                "give --rounds or Job(rounds=), or a number as noise_multiplier",
            )
        self._settings, self._host = settings, host
        self._ledger = Ledger(host.folder)
        self._limits = settings.limits(host)
        self._planned: float | None = None

    def afford(self, round: int) -> None:
        """Check the budget before a round; before the first round of a job, for all its rounds.

        Args:
            round: The round that begins.

        Raises:
            PrivacyBudgetError: If the budget does not allow it.
        """
        release = self._settings.release(self._next(round))
        job, plan = self._host.job, self._host.participation
        ahead = plan.left(round) if plan is not None and not self._ledger.releases(job) else 1
        last = plan.rounds[-1] if plan is not None and ahead > 1 else round
        self._ledger.afford(job, round, [replace(release, count=ahead)], self._limits, until=last)

    def spend(self, round: int) -> float:
        """Record the release of a round that is about to leave.

        Args:
            round: The round.

        Returns:
            The noise multiplier of this release.

        Raises:
            PrivacyBudgetError: If the budget does not allow it. Nothing is recorded then.
        """
        noise = self._next(round)
        self._ledger.spend(self._host.job, round, "GaussianDP", [self._settings.release(noise)], self._limits)
        return noise

    def spent(self) -> float:
        """Return the epsilon of all releases so far that count against this filter's budget."""
        return self._ledger.spent(self._host.job, self._settings.delta, all_jobs=self._host.from_policy)

    def _next(self, round: int) -> float:
        """Return the noise multiplier of the next release: as planned, or more if something was repeated."""
        settings, host, plan = self._settings, self._host, self._host.participation
        if settings.noise_multiplier != "auto":
            return settings.noise_multiplier
        assert plan is not None and settings.epsilon is not None
        trainings = int(settings.trainings)
        if self._planned is None:
            self._planned = settings.multiplier(max(1, plan.most) * trainings)
        left = plan.left(round) + max(0, trainings - training_of(host.job)) * len(plan.rounds)
        earlier = self._ledger.releases(host.job, all_jobs=host.from_policy)
        planned = replace(settings.release(self._planned), count=left)
        if not earlier or epsilon([*earlier, planned], settings.delta) <= settings.epsilon:
            return self._planned
        if epsilon(earlier, settings.delta) >= settings.epsilon:
            return self._planned  # nothing is left: `Ledger.afford` says so
        needed = settings.multiplier(left, earlier)
        return needed if needed < _MOST_INCREASE * self._planned else self._planned


class _LocalGaussian:
    """Clips and adds noise at a site."""

    def __init__(self, settings: GaussianDP, host: FilterHost) -> None:
        self._settings, self._releases = settings, Releases(settings, host)
        self.record: Settings = {}

    def afford(self, round: int) -> None:
        """Raise PrivacyBudgetError if this round's update could not leave."""
        self._releases.afford(round)

    def __call__(self, update: Update, task: Task) -> Update:
        clip = self._settings.clip
        factor = clipping(update, clip)
        multiplier = self._releases.spend(update.round)
        for name, array in update.arrays.items():
            if is_real(array.dtype):
                flat = array.reshape(-1)
                for block in blocks(flat.size):
                    values = flat[block].astype(np.float64) * factor
                    store_rounded(flat[block], values + gaussian(len(values)) * (multiplier * clip))
            else:
                array[...] = task.arrays[name]
        self.record = {"noise_multiplier": round(multiplier, 6), "spent": round(self._releases.spent(), 6)}
        return update


class NoisyMean:
    """Central differential privacy: the aggregator of one round at the server. It sums differences in float64.

    Args:
        settings: The filter.
        releases: Its releases.
        base: The global model of this round.
        allocate: Makes the arrays of the next global model.
    """

    def __init__(self, settings: GaussianDP, releases: Releases, base: Arrays, allocate: Allocate) -> None:
        self._settings, self._releases = settings, releases
        self._base, self._allocate = base, allocate
        self._round, self._count = 0, 0
        noisy = {n: a for n, a in base.items() if is_real(a.dtype) and not is_statistic(n)}
        self._sums: dict[str, Array] = {n: np.zeros(a.size) for n, a in noisy.items()}

    def add(self, update: Update) -> None:
        """Add one clipped update to the sum, unless sampling leaves it out."""
        if update.extras:
            raise UpdateRefusedError(
                "the update has tensors beside the weights, which GaussianDP does not cover", where=update.site
            )
        self._round, self._count = update.round, self._count + 1
        if self._settings.sampling < 1 and not bernoulli(self._settings.sampling):
            return
        factor = clipping(update, self._settings.clip)
        for name, total in self._sums.items():
            if name in update.arrays:
                flat = update.arrays[name].reshape(-1)
                for block in blocks(flat.size):
                    total[block] += flat[block].astype(np.float64) * factor

    def result(self) -> tuple[Arrays, Arrays]:
        """Record the release in the ledger, add the noise, and return the next global model."""
        settings = self._settings
        multiplier = self._releases.spend(self._round)
        arrays, extras = self._allocate(self._base, {})
        expected = settings.sampling * self._count
        for name, out in arrays.items():
            flat, base = out.reshape(-1), self._base[name].reshape(-1)
            if name not in self._sums:
                flat[...] = base
                continue
            for block in blocks(flat.size):
                noise = gaussian(flat[block].size) * (multiplier * settings.clip)
                store_rounded(
                    flat[block], base[block].astype(np.float64) + (self._sums[name][block] + noise) / expected
                )
        return arrays, extras


def clipping(update: Update, clip: float) -> float:
    """Compute the factor that limits the L2 norm of an update.

    Args:
        update: An update with content "delta".
        clip: Largest norm over all real tensors together. Running statistics do not count: they are not released.

    Returns:
        A factor of at most 1.

    Raises:
        UpdateRefusedError: If a tensor is complex.
    """
    total = 0.0
    for name, array in update.arrays.items():
        if array.dtype.kind == "c":
            raise UpdateRefusedError(
                f"tensor {name!r} is complex, which GaussianDP does not cover",
                where=f"update of {update.site}, round {update.round}",
                fix=f"keep it at the site with keep_local=[{name!r}]",
            )
        if is_real(array.dtype) and not is_statistic(name):
            flat = array.reshape(-1)
            for block in blocks(flat.size):
                values = flat[block].astype(np.float64)
                total += float(np.dot(values, values))
    norm = math.sqrt(total)
    return min(1.0, clip / norm) if norm > 0 else 1.0
