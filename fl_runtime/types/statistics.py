"""What a site allows of statistics over its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StatisticsRules:
    """What a site allows of statistics over its rows. The defaults allow all, as in a simulation.

    Attributes:
        allowed: Whether the site takes part at all.
        smallest_count: Least number of rows behind any number that leaves the site.
        features: Name patterns (`fnmatch`) of the columns that may be described; None allows all.
        per_site: Whether others may see the statistics of this site alone.
        min_cohort: Least number of sites whose rows are in a number that the site takes part in.
        epsilon: Epsilon of the noise on all counts of one call; None adds none.
        bounds: Column -> lowest and highest value; with noise, columns of numbers need them.
    """

    allowed: bool = True
    smallest_count: int = 1
    features: tuple[str, ...] | None = None
    per_site: bool = True
    min_cohort: int = 1
    epsilon: float | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
