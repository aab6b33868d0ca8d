"""The filter `GaussianDP`: differential privacy with Gaussian noise, at the site or at the server."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.errors import UpdateRefusedError
from fl_runtime.filters.base import FilterHost, FilterSettings, Point, RunningFilter, check_number, is_real, refuse
from fl_runtime.filters.ledger import BudgetLimit, Ledger, Mechanism, PrivacyBudget, need_accounting
from fl_runtime.filters.noise import bernoulli, blocks, gaussian, store_rounded
from fl_runtime.types import Allocate, Array, Arrays, Settings, Task, Update


@dataclass(frozen=True)
class GaussianDP(FilterSettings):
    """Clips an update d to an L2 norm of at most `clip` over all tensors together, and adds Gaussian noise:

        y = d min(1, clip / |d|) + N(0, (noise_multiplier clip)^2 I)

    At `site_out` (default; local differential privacy) each site does this to its own update. The guarantee holds
    against the server and everyone else.

    At `server_in` (central differential privacy) the server clips each update and adds the noise once, to the sum of
    m updates. The new model is x + (sum of clipped d + noise) / (sampling m). All sites have the same weight, whatever
    their numbers of examples. The guarantee holds against everyone who sees the models, but not against the server.
    The strategy must be `fedavg` without arguments, and this must be the last filter at `server_in`.

    The unit of privacy is a site's whole update of a round, not a single record. Integer tensors are replaced by those
    of the global model. Metrics and numbers of examples are not covered; see `NoisyMetrics` and `Examples`.

    Every release is recorded in the ledger, also one that is repeated after a restart, and the total epsilon appears in
    the history. Noise is drawn from the operating system in float64 and rounded to float32 or narrower. Needs the extra
    `[dp]`.

    Sources: Dwork and Roth 2014, "The algorithmic foundations of differential privacy", appendix A; McMahan et al.
    2018, "Learning differentially private recurrent language models" (clipping of whole updates, fixed denominator).

    Attributes:
        clip: Largest L2 norm of an update, in the unit of the weights, greater than 0.
        noise_multiplier: Standard deviation of the noise divided by `clip`, greater than 0.
        epsilon: Privacy budget, greater than 0. The round that would exceed it is refused: by the site at `site_out`,
            by the server at `server_in`. It counts for the job, or over all jobs if the filter is in the site's policy.
            None sets no limit.
        delta: The delta at which epsilon is computed, between 0 and 1.
        adjacency: "replace" protects an update against replacement by any other (sensitivity 2 clip). "zero" protects
            it against replacement by zeros, with a public number of sites (sensitivity clip).
        sampling: Probability with which an update counts, greater than 0 and at most 1; only at `server_in`, and below
            1 only with adjacency "zero". The server keeps its draws secret, so amplification by Poisson sampling holds.

    Raises:
        ConfigError: If an argument is out of range.
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out", "server_in")
    clip: float = 1.0
    noise_multiplier: float = 1.0
    epsilon: float | None = None
    delta: float = 1e-5
    adjacency: Literal["replace", "zero"] = "replace"
    sampling: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "clip", self.clip, above=0)
        check_number(self, "noise_multiplier", self.noise_multiplier, above=0)
        check_number(self, "delta", self.delta, above=0, below=1)
        check_number(self, "sampling", self.sampling, above=0, most=1)
        if self.epsilon is not None:
            check_number(self, "epsilon", self.epsilon, above=0)
        if self.adjacency not in ("replace", "zero"):
            raise refuse(f"GaussianDP: adjacency is {self.adjacency!r}", 'give "replace" or "zero"')
        if self.sampling < 1 and self.adjacency != "zero":
            raise refuse("GaussianDP: sampling below 1 needs adjacency zero", "use adjacency: zero")

    @property
    def mechanism(self) -> Mechanism:
        """The release of one round, scaled to sensitivity 1."""
        sensitivity = 2.0 if self.adjacency == "replace" else 1.0
        return Mechanism("gaussian", self.noise_multiplier / sensitivity, self.sampling)

    def limits(self, host: FilterHost) -> list[BudgetLimit]:
        """Return the limits that hold at a host: this filter's own budget, and the host's."""
        limits = [] if self.epsilon is None else [self._limit(self.epsilon, host)]
        return limits + ([host.budget] if host.budget else [])

    def _limit(self, epsilon: float, host: FilterHost) -> BudgetLimit:
        return BudgetLimit(PrivacyBudget(epsilon, self.delta), host.site or "the server", all_jobs=host.from_policy)

    def open(self, host: FilterHost) -> RunningFilter:
        """Make the filter of one site."""
        return _LocalGaussian(self, host)


class _LocalGaussian:
    """Clips and adds noise at a site."""

    def __init__(self, settings: GaussianDP, host: FilterHost) -> None:
        need_accounting()
        self._settings, self._host = settings, host
        self._ledger = Ledger(host.folder)
        self.record: Settings = {}

    def afford(self, round: int) -> None:
        """Raise PrivacyBudgetError if this round's update could not leave."""
        self._ledger.afford(self._host.job, round, [self._settings.mechanism], self._settings.limits(self._host))

    def __call__(self, update: Update, task: Task) -> Update:
        settings, host = self._settings, self._host
        factor = clipping(update, settings.clip)
        self._ledger.spend(host.job, update.round, "GaussianDP", [settings.mechanism], settings.limits(host))
        for name, array in update.arrays.items():
            if is_real(array.dtype):
                flat = array.reshape(-1)
                for block in blocks(flat.size):
                    values = flat[block].astype(np.float64) * factor
                    noise = gaussian(len(values)) * (settings.noise_multiplier * settings.clip)
                    store_rounded(flat[block], values + noise)
            else:
                array[...] = task.arrays[name]
        spent = self._ledger.spent(host.job, settings.delta, all_jobs=host.from_policy)
        self.record = {"spent": round(spent, 6)}
        return update


class NoisyMean:
    """Central differential privacy: the aggregator of one round at the server. It sums differences in float64.

    Args:
        settings: The filter.
        ledger: The server's ledger.
        host: The server.
        base: The global model of this round.
        allocate: Makes the arrays of the next global model.
    """

    def __init__(
        self, settings: GaussianDP, ledger: Ledger, host: FilterHost, base: Arrays, allocate: Allocate
    ) -> None:
        self._settings, self._ledger, self._host = settings, ledger, host
        self._base, self._allocate = base, allocate
        self._round, self._count = 0, 0
        self._sums: dict[str, Array] = {n: np.zeros(a.size) for n, a in base.items() if is_real(a.dtype)}

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
        self._ledger.spend(self._host.job, self._round, "GaussianDP", [settings.mechanism], settings.limits(self._host))
        arrays, extras = self._allocate(self._base, {})
        expected = settings.sampling * self._count
        for name, out in arrays.items():
            flat, base = out.reshape(-1), self._base[name].reshape(-1)
            if name not in self._sums:
                flat[...] = base
                continue
            for block in blocks(flat.size):
                noise = gaussian(flat[block].size) * (settings.noise_multiplier * settings.clip)
                store_rounded(
                    flat[block], base[block].astype(np.float64) + (self._sums[name][block] + noise) / expected
                )
        return arrays, extras


def clipping(update: Update, clip: float) -> float:
    """Compute the factor that limits the L2 norm of an update.

    Args:
        update: An update with content "delta".
        clip: Largest norm over all real tensors together.

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
        if is_real(array.dtype):
            flat = array.reshape(-1)
            for block in blocks(flat.size):
                values = flat[block].astype(np.float64)
                total += float(np.dot(values, values))
    norm = math.sqrt(total)
    return min(1.0, clip / norm) if norm > 0 else 1.0
