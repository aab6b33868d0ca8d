"""By what the best round is picked, at the server and at the sites alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fl_runtime.types import Terms

WITHHELD = "withheld best metric"
"""Key in the `info` of a site's registration: the metric of the best round, if the site's filters withhold it."""


@dataclass(frozen=True)
class Ranking:
    """How models are compared.

    Attributes:
        metric: Name of the metric.
        mode: Whether a lower ("min") or a higher ("max") value is better.
    """

    metric: str
    mode: Literal["min", "max"]

    @classmethod
    def of(cls, terms: Terms, metric: str | None, mode: Literal["min", "max"] | None) -> Ranking:
        """The job's metric and mode, else those of the terms. A proposed mode belongs to the proposed metric alone."""
        name = metric or terms.best_metric
        return cls(name, mode or (terms.best_mode if name == terms.best_metric else "min"))

    def cost(self, metrics: Mapping[str, float]) -> float | None:
        """The metric as a number of which less is better; None if it is missing or NaN."""
        value = metrics.get(self.metric)
        if value is None or math.isnan(value):
            return None
        return value if self.mode == "min" else -value
