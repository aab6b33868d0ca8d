"""Differential privacy with Gaussian noise, at the site or at the server."""

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
    """Differences are clipped by their L2 norm over the whole update, then Gaussian noise is added:

        y = d min(1, clip / |d|) + N(0, (noise_multiplier clip)^2 I)

    At `site_out` (local) each site does this to its own update, and its epsilon holds against the server and
    everybody else. At `server_in` (central) the server clips each update and adds the noise once, to the sum over m
    updates: the new model is x + (sum of clipped d + noise) / (sampling m), all sites weighing the same, whatever
    their num_examples. That epsilon holds against whoever sees the models, not against the server.

    Unit of privacy: a whole site's update of a round, not a record within it. adjacency "replace" (default): any
    update in place of any other, sensitivity 2 clip; "zero": an update in place of none (all zeros), the number of
    sites being public, sensitivity clip. delta: default 1e-5.

    sampling (at `server_in` alone, with adjacency "zero"): each update counts with this probability, drawn by the
    server and told to nobody, so that amplification by Poisson sampling holds; default 1, no sampling. At a site
    nothing is claimed for sampling: the server knows who takes part.

    epsilon: the budget. The round that would exceed it is refused: at `site_out` by the site, for the job, or over
    all jobs where the filter is in the site's policy; at `server_in` by the server, for the job. None (default):
    no limit, the ledger is kept all the same. The running epsilon counts each sending, also one that is repeated
    after a restart. It is in the history with every update. clip: in the unit of the weights, default 1.

    Integer tensors go back as they came. num_examples and metrics are not covered: see Examples and NoisyMetrics.
    The noise is drawn from the operating system, in float64, and rounded to float32 or narrower.

    Dwork and Roth 2014, "The algorithmic foundations of differential privacy", appendix A; McMahan et al. 2018,
    "Learning differentially private recurrent language models" (clipping of whole updates, fixed denominator).
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
            raise refuse("GaussianDP: sampling is accounted for adjacency zero alone", "use adjacency: zero")

    @property
    def mechanism(self) -> Mechanism:
        """One round, with the sensitivity scaled to 1."""
        sensitivity = 2.0 if self.adjacency == "replace" else 1.0
        return Mechanism("gaussian", self.noise_multiplier / sensitivity, self.sampling)

    def limits(self, host: FilterHost) -> list[BudgetLimit]:
        mine = [] if self.epsilon is None else [self._limit(self.epsilon, host)]
        return mine + ([host.budget] if host.budget else [])

    def _limit(self, epsilon: float, host: FilterHost) -> BudgetLimit:
        return BudgetLimit(PrivacyBudget(epsilon, self.delta), host.site or "the server", all_jobs=host.from_policy)

    def open(self, host: FilterHost) -> RunningFilter:
        return _Local(self, host)


class _Local:
    """At a site."""

    def __init__(self, settings: GaussianDP, host: FilterHost) -> None:
        need_accounting()
        self._settings, self._host = settings, host
        self._ledger = Ledger(host.folder)
        self.record: Settings = {}

    def afford(self, round: int) -> None:
        """PrivacyBudgetError if this round's update could not leave."""
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
    """At the server: the aggregator of one round. Takes differences; the sum is in float64."""

    def __init__(
        self, settings: GaussianDP, ledger: Ledger, host: FilterHost, base: Arrays, allocate: Allocate
    ) -> None:
        self._settings, self._ledger, self._host = settings, ledger, host
        self._base, self._allocate = base, allocate
        self._round, self._answered = 0, 0
        self._sums: dict[str, Array] = {n: np.zeros(a.size) for n, a in base.items() if is_real(a.dtype)}

    def add(self, update: Update) -> None:
        if update.extras:
            raise UpdateRefusedError("tensors beside the weights are not covered by GaussianDP", where=update.site)
        self._round, self._answered = update.round, self._answered + 1
        if self._settings.sampling < 1 and not bernoulli(self._settings.sampling):
            return
        factor = clipping(update, self._settings.clip)
        for name, total in self._sums.items():
            if name in update.arrays:
                flat = update.arrays[name].reshape(-1)
                for block in blocks(flat.size):
                    total[block] += flat[block].astype(np.float64) * factor

    def result(self) -> tuple[Arrays, Arrays]:
        settings = self._settings
        self._ledger.spend(self._host.job, self._round, "GaussianDP", [settings.mechanism], settings.limits(self._host))
        arrays, extras = self._allocate(self._base, {})
        expected = settings.sampling * self._answered
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
    """The factor that brings the L2 norm of all real tensors together to `clip` at most."""
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
