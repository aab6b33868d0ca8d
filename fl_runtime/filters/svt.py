"""The sparse vector technique: a few coordinates of an update, with a privacy loss that can be stated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fl_runtime.filters.base import FilterHost, FilterSettings, Point, RunningFilter, check_number, is_real, refuse
from fl_runtime.filters.ledger import Ledger, Mechanism
from fl_runtime.filters.noise import chosen, laplace
from fl_runtime.types import Array, Settings, Task, Update


@dataclass(frozen=True)
class SVTPrivacy(FilterSettings):
    """Sends at most c = max(1, floor(fraction * n)) of the n differences d_i, each with noise; the others become zero.

    With x_i = clip(d_i, -gamma, gamma), rho ~ Lap(gamma / e1) and v_i ~ Lap(2 c gamma / e2): the coordinates with
    |x_i| + v_i >= tau + rho are taken in an order that is random and secret until there are c of them; of each,
    clip(x_i + Lap(2 c gamma / e3), -gamma, gamma) leaves. The round's epsilon is e1 + e2 + e3, with e3 half of it and
    e1 : e2 = 1 : (2c)^(2/3), the split with the least noise.

    Unit: a whole site's update; adjacency: any update in place of any other (so every |x_i| may change by gamma and
    every x_i by 2 gamma at once). Pure epsilon, delta 0; rounds add up. epsilon: of a round, default 8. fraction:
    default 0.0001. gamma, tau: in the unit of the weights, default 0.01 and 0. Integer tensors go back as they came.

    An honest epsilon is expensive here: the noise grows with c, and by default outweighs single coordinates. The
    defaults of FLARE's filter of this name (a tenth of all coordinates, with the noise of one) amount to an epsilon
    of thousands a round. Where utility counts, GaussianDP needs far less noise for the same statement.

    Lyu, Su, Li 2017, "Understanding the sparse vector technique for differential privacy", algorithm 7 (whose
    privacy proof holds) and section 5.2 (the split); for federated learning Li et al. 2019, "Privacy-preserving
    federated brain tumour segmentation".
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out",)
    fraction: float = 0.0001
    epsilon: float = 8.0
    gamma: float = 0.01
    tau: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "fraction", self.fraction, above=0, most=1)
        check_number(self, "epsilon", self.epsilon, above=0)
        check_number(self, "gamma", self.gamma, above=0)
        check_number(self, "tau", self.tau, least=0)
        if self.tau > self.gamma:
            raise refuse(f"SVTPrivacy: tau={self.tau:g} is above gamma={self.gamma:g}", "lower tau")

    def split(self, count: int) -> tuple[float, float, float]:
        """(e1, e2, e3) for `count` released coordinates."""
        half = self.epsilon / 2
        share = (2 * count) ** (2 / 3)
        return half / (1 + share), half * share / (1 + share), half

    def open(self, host: FilterHost) -> RunningFilter:
        return _SparseVector(self, host)


class _SparseVector:
    def __init__(self, settings: SVTPrivacy, host: FilterHost) -> None:
        self._settings, self._host = settings, host
        self._ledger = Ledger(host.folder)
        self._mechanism = Mechanism("pure", settings.epsilon)
        self._limits = [host.budget] if host.budget else []
        self.record: Settings = {}

    def afford(self, round: int) -> None:
        """PrivacyBudgetError if this round's update could not leave."""
        self._ledger.afford(self._host.job, round, [self._mechanism], self._limits)

    def __call__(self, update: Update, task: Task) -> Update:
        parts = [array for array in update.arrays.values() if is_real(array.dtype) and array.size]
        for name, array in update.arrays.items():
            if not is_real(array.dtype):
                array[...] = task.arrays[name]
        if not parts:
            return update
        self._ledger.spend(self._host.job, update.round, "SVTPrivacy", [self._mechanism], self._limits)
        flat = [part.reshape(-1) for part in parts]
        count = max(1, int(self._settings.fraction * sum(part.size for part in flat)))
        first, second, third = self._settings.split(count)
        gamma = self._settings.gamma
        bar = self._settings.tau + laplace(1)[0] * gamma / first
        above = [self._above(part, bar, 2 * count * gamma / second) for part in flat]
        ends = np.cumsum([len(found) for found in above])
        picked = chosen(count, int(ends[-1]))
        for part, found, end in zip(flat, above, ends, strict=True):
            mine = found[picked[(picked >= end - len(found)) & (picked < end)] - (end - len(found))]
            kept = np.clip(part[mine].astype(np.float64), -gamma, gamma)
            part[...] = 0
            part[mine] = np.clip(kept + laplace(len(mine)) * 2 * count * gamma / third, -gamma, gamma)
        self.record = {"epsilon": self._settings.epsilon, "sent": len(picked)}
        return update

    def _above(self, part: Array, bar: float, scale: float) -> Array:
        """Indices of the coordinates that pass the noisy test."""
        gamma = self._settings.gamma
        found = []
        for start in range(0, part.size, 2**16):
            size = np.minimum(np.abs(part[start : start + 2**16].astype(np.float64)), gamma)
            found.append(start + np.flatnonzero(size + laplace(len(size)) * scale >= bar))
        return np.concatenate(found)
