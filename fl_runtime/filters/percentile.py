"""Sending only the larger changes, and those bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fl_runtime.filters.base import FilterHost, FilterSettings, Point, RunningFilter, check_number, is_real
from fl_runtime.filters.noise import blocks
from fl_runtime.types import Settings, Task, Update


@dataclass(frozen=True)
class PercentilePrivacy(FilterSettings):
    """Of the differences d to the global model, those below the percentile of |d| over the whole update become
    zero, the others are limited to [-gamma, gamma].

    percentile: in percent, 0 <= percentile < 100, by linear interpolation between ranks; with 10, the default, the
    smallest tenth stays at host. gamma: in the unit of the weights, > 0, default 0.01. Integer tensors are left as
    they are. A heuristic: it bounds what one site can say, and proves nothing; it has no epsilon.

    Shokri and Shmatikov 2015, "Privacy-preserving deep learning", section 4 (selective sharing); the arguments are
    those of `PercentilePrivacy` in NVIDIA FLARE.
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out", "server_in")
    record: ClassVar[Settings] = {}
    percentile: float = 10.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        check_number(self, "percentile", self.percentile, least=0, below=100)
        check_number(self, "gamma", self.gamma, above=0)

    def open(self, host: FilterHost) -> RunningFilter:
        return self

    def __call__(self, update: Update, task: Task) -> Update:
        flat = [array.reshape(-1) for array in update.arrays.values() if is_real(array.dtype) and array.size]
        if not flat:
            return update
        cut = np.percentile(np.concatenate([np.abs(part) for part in flat]), self.percentile)
        for part in flat:
            for block in blocks(part.size):
                piece = part[block]
                piece[np.abs(piece) < cut] = 0
                np.clip(piece, -self.gamma, self.gamma, out=piece)
        return update
