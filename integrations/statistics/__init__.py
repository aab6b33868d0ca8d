"""Statistics of tables over all sites, through sums alone: counts, moments, quantiles, histograms, categories."""

from __future__ import annotations

from fl_adapters.extras import needs_extra

with needs_extra("statistics", "narwhals"):
    from .federated import describe
    from .images import describe_images
    from .result import Absence, Categorical, Histogram, Numeric, SiteStatistics, Statistics

__all__ = [
    "Absence",
    "Categorical",
    "Histogram",
    "Numeric",
    "SiteStatistics",
    "Statistics",
    "describe",
    "describe_images",
]
