"""The filter `PercentilePrivacy`: send only the larger changes, limited in size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fl_runtime.filters.base import FilterHost, FilterSettings, Point, RunningFilter, check_number, is_real
from fl_runtime.filters.noise import blocks
from fl_runtime.types import Settings, Task, Update


@dataclass(frozen=True)
class PercentilePrivacy(FilterSettings):
    """Sets small differences to zero and limits the others.

    With d the differences to the global model: those with |d| below the given percentile of |d| over the whole update
    become 0, the others are clipped to [-gamma, gamma]. Integer tensors are not changed. It runs at `site_out`
    (default) or `server_in`. This is a heuristic without a privacy guarantee: it has no epsilon.

    Source: Shokri and Shmatikov 2015, "Privacy-preserving deep learning", section 4 (selective sharing). The arguments
    are those of `PercentilePrivacy` in NVIDIA FLARE.

    Attributes:
        percentile: In percent, at least 0 and below 100, with linear interpolation between ranks. With 10, the smallest
            tenth of the differences becomes 0.
        gamma: Largest difference, in the unit of the weights, greater than 0.

    Raises:
        ConfigError: If an argument is out of range.
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out", "server_in")
    record: ClassVar[Settings] = {}
    percentile: float = 10.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        check_number(self, "percentile", self.percentile, least=0, below=100)
        check_number(self, "gamma", self.gamma, above=0)

    def open(self, host: FilterHost) -> RunningFilter:
        """Return the filter itself, which has no state."""
        return self

    def __call__(self, update: Update, task: Task) -> Update:
        """Filter the differences of one update in place."""
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
