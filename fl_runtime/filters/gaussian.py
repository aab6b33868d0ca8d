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
)
from fl_runtime.filters.noise import bernoulli, blocks, gaussian, store_rounded
from fl_runtime.trainings import number_of
from fl_runtime.types import Allocate, Array, Arrays, Settings, Task, Update
from fl_runtime.types.tensor_names import is_statistic

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

    With `distributed`, in jobs with `secure_sum`, each site adds its share of that noise: a variance of
    (noise_multiplier clip)^2 / k, where k is the least number of sites in a sum. So the sum of the updates has at least
    the noise that the server would add at `server_in`, and nobody sees less. The guarantee holds against everyone,
    as long as k of the sites in the sum are honest.

    The unit of privacy is a site's whole update of a round, not a single record. Integer tensors are replaced by those
    of the global model. The running statistics of normalization layers stay at the site: noise would make variances
    negative. Metrics and numbers of examples are not covered; see `NoisyMetrics` and `Examples`.

    Every release is recorded in the ledger, also one that is repeated after a restart, and the total epsilon appears in
    the history. Noise is drawn from the operating system in float64 and rounded to float32 or narrower. Needs the extra
    `[dp]`.

    Sources: Dwork and Roth 2014, "The algorithmic foundations of differential privacy", appendix A; McMahan et al.
    2018, "Learning differentially private recurrent language models" (clipping of whole updates, fixed denominator);
    Kairouz, Liu, Steinke 2021, "The distributed discrete Gaussian mechanism for federated learning with secure
    aggregation" (noise in shares). Their noise is discrete. Here each share is drawn in float64 and rounded afterwards,
    to the tensor's dtype and to the whole numbers of the secure sum, whose steps must be far below the noise.

    Attributes:
        clip: Largest L2 norm of an update, in the unit of the weights, greater than 0.
        noise_multiplier: Standard deviation of the noise divided by `clip`, greater than 0. "auto" computes it from
            `epsilon`, `delta` and the number of rounds in which a site takes part, in all `trainings` of the job. A
            round that is repeated makes the noise of the rounds after it larger, up to four times.
        epsilon: Privacy budget, greater than 0. A job whose rounds would exceed it is refused when it is made. A single
            round that would exceed it is refused by the site at `site_out`, by the server at `server_in`. It counts for
            the job with all its trainings, or over all jobs if the filter is in the site's policy. None sets no limit
            and needs a number as `noise_multiplier`.
        delta: The delta at which epsilon is computed, between 0 and 1.
        adjacency: "replace" protects an update against replacement by any other (sensitivity 2 clip). "zero" protects
            it against replacement by zeros, with a public number of sites (sensitivity clip).
        sampling: Probability with which an update counts, greater than 0 and at most 1; only at `server_in`, and below
            1 only with adjacency "zero". The server keeps its draws secret, so amplification by Poisson sampling holds.
        distributed: Whether the noise is that of a secure sum, to which each site adds a share. Only at `site_out`, in
            the job's filters, and with equal weights of the sites (`fedavg:weights=equal`).

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
    distributed: bool = False

    def __post_init__(self) -> None:
        check_number(self, "clip", self.clip, above=0)
        if self.noise_multiplier != "auto":
            check_number(self, "noise_multiplier", self.noise_multiplier, above=0)
        check_number(self, "delta", self.delta, above=0, below=1)
        check_number(self, "sampling", self.sampling, above=0, most=1)
        if self.epsilon is not None:
            check_number(self, "epsilon", self.epsilon, above=0)
        elif self.noise_multiplier == "auto":
            raise refuse(
                "GaussianDP has neither a budget nor noise",
                "give epsilon, such as 8, from which the noise is computed; or noise_multiplier",
            )
        if self.adjacency not in ("replace", "zero"):
            raise refuse(f"GaussianDP: adjacency is {self.adjacency!r}", 'give "replace" or "zero"')
        if not isinstance(self.distributed, bool):
            raise refuse(f"GaussianDP: distributed is {self.distributed!r}", "give true or false")
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

    def multiplier(self, releases: int) -> float:
        """Return the noise multiplier for a number of releases.

        Args:
            releases: Number of releases that share the budget.

        Returns:
            `noise_multiplier` itself, or with "auto" the least one that stays within the budget.
        """
        if self.noise_multiplier != "auto":
            return self.noise_multiplier
        assert self.budget is not None
        return noise_for(self.budget, releases, self.release(1.0)) * self.sensitivity

    @property
    def budget(self) -> PrivacyBudget | None:
        """The filter's own budget."""
        return None if self.epsilon is None else PrivacyBudget(self.epsilon, self.delta)

    def releases(self, host: FilterHost) -> Releases:
        """Make the object that chooses the noise of each round and records it.

        Args:
            host: The site or server at which the filter runs.

        Returns:
            The releases of one training.
        """
        return Releases("GaussianDP", self.release(1.0), self.noise_multiplier, self.budget, host)

    def open(self, host: FilterHost) -> RunningFilter:
        """Make the filter of one site.

        Raises:
            ConfigError: If its noise is distributed, and nobody would add the other shares.
        """
        if self.distributed and not host.sharing:
            raise refuse(
                "GaussianDP: distributed adds a share of the noise, and without secure_sum the server sees each update",
                "set secure_sum in the job, or leave distributed out",
            )
        if self.distributed and host.from_policy:
            raise refuse(
                "GaussianDP: distributed is in this site's policy, and the other sites need not add their shares",
                "ask for it in the job, or leave distributed out of the policy",
            )
        return _LocalGaussian(self, host)


class Releases:
    """The releases of Gaussian noise in one training: how much noise each has, and the ledger that records them.

    `GaussianDP` uses it, and DP-SGD in the adapters for torch.

    Args:
        name: Name of the filter for the ledger and for messages.
        kind: The release of one round at a noise multiplier of 1.
        noise_multiplier: The noise multiplier of every round; "auto" computes it from the budget.
        budget: The own budget; None for none.
        host: The site or server at which the releases happen.

    Raises:
        ConfigError: If a package is missing, or the noise cannot be computed since the job sets no number of rounds.
    """

    def __init__(
        self,
        name: str,
        kind: Mechanism,
        noise_multiplier: float | Auto,
        budget: PrivacyBudget | None,
        host: FilterHost,
    ) -> None:
        need_accounting()
        if noise_multiplier == "auto" and host.participation is None:
            raise refuse(
                f"{name} computes its noise from the number of rounds, which the job does not set",
                "give --rounds or Job(rounds=), or a number as noise_multiplier",
            )
        self._name, self._kind, self._fixed, self._budget = name, kind, noise_multiplier, budget
        self._host = host
        self._ledger = Ledger(host.folder)
        own = [BudgetLimit(budget, host.site or "the server", all_jobs=host.from_policy)] if budget else []
        self._limits = own + ([host.budget] if host.budget else [])
        self._planned: float | None = None

    def afford(self, round: int) -> float:
        """Check the budget before a round; before the first round of a job, for all its rounds.

        Args:
            round: The round that begins.

        Returns:
            The noise multiplier that the round will have.

        Raises:
            PrivacyBudgetError: If the budget does not allow it.
        """
        noise = self.noise(round)
        job, plan = self._host.job, self._host.participation
        ahead = plan.left(round) if plan is not None and not self._earlier() else 1
        last = plan.rounds[-1] if plan is not None and ahead > 1 else round
        self._ledger.afford(job, round, [self._release(noise, ahead)], self._limits, until=last)
        return noise

    def spend(self, round: int, noise: float | None = None) -> float:
        """Record the release of a round that is about to leave.

        Args:
            round: The round.
            noise: Its noise multiplier, if it was chosen before the round.

        Returns:
            The noise multiplier of this release.

        Raises:
            PrivacyBudgetError: If the budget does not allow it. Nothing is recorded then.
        """
        noise = self.noise(round) if noise is None else noise
        self._ledger.spend(self._host.job, round, self._name, [self._release(noise)], self._limits)
        return noise

    def spent(self, delta: float) -> float:
        """Return the epsilon of all releases so far that count against the own budget.

        Args:
            delta: The delta at which epsilon is stated.

        Returns:
            The epsilon.
        """
        return epsilon(self._earlier(), delta)

    def noise(self, round: int) -> float:
        """Return the noise multiplier of a round: as planned, or more if something was repeated.

        Args:
            round: The round.

        Returns:
            The noise multiplier.

        Raises:
            PrivacyBudgetError: If no noise is enough.
        """
        if self._fixed != "auto":
            return self._fixed
        plan, budget = self._host.participation, self._budget
        assert plan is not None and budget is not None
        if self._planned is None:
            self._planned = self._multiplier(budget, max(1, plan.most) * plan.trainings)
        left = plan.left(round) + max(0, plan.trainings - number_of(self._host.job)) * len(plan.rounds)
        earlier = self._earlier()
        if not earlier or epsilon([*earlier, self._release(self._planned, left)], budget.delta) <= budget.epsilon:
            return self._planned
        if epsilon(earlier, budget.delta) >= budget.epsilon:
            return self._planned  # nothing is left: `Ledger.afford` says so
        needed = self._multiplier(budget, left, earlier)
        return needed if needed < _MOST_INCREASE * self._planned else self._planned

    def _multiplier(self, budget: PrivacyBudget, times: int, earlier: Sequence[Mechanism] = ()) -> float:
        return noise_for(budget, times, self._kind, earlier) / self._kind.noise

    def _release(self, noise: float, times: int = 1) -> Mechanism:
        return replace(self._kind, noise=self._kind.noise * noise, count=self._kind.count * times)

    def _earlier(self) -> list[Mechanism]:
        return self._ledger.releases(self._host.job, all_jobs=self._host.from_policy, unit=self._kind.unit)


class _LocalGaussian:
    """Clips and adds noise at a site."""

    def __init__(self, settings: GaussianDP, host: FilterHost) -> None:
        self._settings, self._releases = settings, settings.releases(host)
        self._share = 1 / math.sqrt(host.sharing) if settings.distributed else 1.0
        self.record: Settings = {}

    def afford(self, round: int) -> None:
        """Raise PrivacyBudgetError if this round's update could not leave."""
        self._releases.afford(round)

    def __call__(self, update: Update, task: Task) -> Update:
        clip = self._settings.clip
        factor = clipping(update, clip)
        multiplier = self._releases.spend(update.round)
        noise = multiplier * clip * self._share
        for name, array in update.arrays.items():
            if is_real(array.dtype):
                flat = array.reshape(-1)
                for block in blocks(flat.size):
                    values = flat[block].astype(np.float64) * factor
                    store_rounded(flat[block], values + gaussian(len(values)) * noise)
            else:
                array[...] = task.arrays[name]
        self.record = {
            "noise_multiplier": round(multiplier, 6),
            "spent": round(self._releases.spent(self._settings.delta), 6),
            "delta": self._settings.delta,
        }
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
