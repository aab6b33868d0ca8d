"""What a site's policy says about statistics of its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fl_runtime.types import StatisticsRules


class StatisticsPolicy(BaseModel):
    """The rules of a policy on statistics (`fl_adapters.statistics`). The defaults hold where the file says nothing.

    Attributes:
        allowed: Whether the site takes part. In the file, `statistics: false` says that it does not.
        smallest_count: Least number of rows behind any number that leaves the site.
        features: Name patterns (`fnmatch`) of the columns that may be described; None allows all.
        per_site: Whether others may see the statistics of this site alone.
        epsilon: Epsilon of the noise on all counts of one call of `describe`; None adds none.
        bounds: Column -> lowest and highest value. With noise, columns of numbers need them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    allowed: bool = True
    smallest_count: int = Field(default=10, ge=1)
    features: tuple[str, ...] | None = None
    per_site: bool = False
    epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    bounds: Mapping[str, tuple[float, float]] = Field(default_factory=dict)

    @field_validator("bounds")
    @classmethod
    def _in_order(cls, value: Mapping[str, tuple[float, float]]) -> Mapping[str, tuple[float, float]]:
        for name, (low, high) in value.items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"the bounds of {name} are not a lower and a higher number")
        return value

    def rules(self, min_cohort: int) -> StatisticsRules:
        """Return the rules as `describe` follows them.

        Args:
            min_cohort: Least number of sites whose rows are in a number that the site takes part in.
        """
        return StatisticsRules(
            allowed=self.allowed,
            smallest_count=self.smallest_count,
            features=self.features,
            per_site=self.per_site,
            min_cohort=min_cohort,
            epsilon=self.epsilon,
            bounds=dict(self.bounds),
        )
