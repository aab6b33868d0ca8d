"""Filters for metrics and for numbers of examples and steps, in updates and in reports.

Some adapters send a metric as a `Summary`, which can be pooled over all sites (XGBoost's AUC). A summary reveals the
number of examples and more. Filters that change numbers therefore replace it by the site's own value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fl_runtime.filters.base import Facts, FilterHost, FilterSettings, check_number, matches, refuse
from fl_runtime.filters.ledger import Ledger, Mechanism
from fl_runtime.filters.noise import laplace
from fl_runtime.types import Summary


@dataclass(frozen=True)
class AllowMetrics(FilterSettings):
    """Lets only metrics leave whose names match a pattern.

    Attributes:
        names: Name patterns (`fnmatch`), such as "loss" or "eval_*". The default, an empty list, lets no metric leave.

    Raises:
        ConfigError: If `names` is not a list of patterns.
    """

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.names, (list, tuple)) or not all(isinstance(name, str) for name in self.names):
            raise refuse(f"AllowMetrics: names is {self.names!r}", 'give a list of patterns such as ["loss"]')
        object.__setattr__(self, "names", tuple(self.names))

    def facts(self, facts: Facts, host: FilterHost) -> Facts:
        """Remove the metrics that match no pattern."""
        return replace(facts, metrics={n: v for n, v in facts.metrics.items() if matches(n, self.names)})


@dataclass(frozen=True)
class RoundMetrics(FilterSettings):
    """Rounds metrics to the nearest multiple of 10^-decimals, ties to even.

    A `Summary` is replaced by the site's own value, rounded.

    Attributes:
        decimals: Digits after the decimal point, 0 to 12.

    Raises:
        ConfigError: If `decimals` is out of range.
    """

    decimals: int = 2

    def __post_init__(self) -> None:
        check_number(self, "decimals", self.decimals, least=0, most=12)

    def facts(self, facts: Facts, host: FilterHost) -> Facts:
        """Round every metric to `decimals` digits."""
        return replace(facts, metrics={n: round(v, int(self.decimals)) for n, v in plain(facts).items()})


@dataclass(frozen=True)
class NoisyMetrics(FilterSettings):
    """Adds Laplace noise to every metric, with pure differential privacy.

    A metric v leaves as clip(clip(v, low, high) + Lap((high - low) / epsilon), low, high). Unit of privacy: a site's
    value, replaced by any other. The bounds hold for every metric in its own unit; remove metrics that do not fit with
    `AllowMetrics` before this filter. A metric that is NaN does not leave. Every metric of every update and report is
    recorded in the ledger, and their costs add up. Needs the extra `[dp]` if the site has a privacy budget.

    Source: Dwork et al. 2006, "Calibrating noise to sensitivity in private data analysis".

    Attributes:
        low: Lower bound of the metrics.
        high: Upper bound of the metrics, greater than `low`.
        epsilon: Privacy cost of one metric in one update or report, greater than 0.

    Raises:
        ConfigError: If an argument is out of range.
    """

    low: float = 0.0
    high: float = 1.0
    epsilon: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "low", self.low)
        check_number(self, "high", self.high, above=self.low)
        check_number(self, "epsilon", self.epsilon, above=0)

    def facts(self, facts: Facts, host: FilterHost) -> Facts:
        """Add noise to every metric, after recording its cost in the ledger."""
        metrics = {name: value for name, value in plain(facts).items() if not math.isnan(value)}
        if not metrics:
            return replace(facts, metrics={})
        mechanisms = [Mechanism("laplace", 1 / self.epsilon)] * len(metrics)
        ledger = Ledger(host.folder)
        try:
            ledger.spend(host.job, facts.round, "NoisyMetrics", mechanisms, [host.budget] if host.budget else [])
        finally:
            ledger.close()
        noise = laplace(len(metrics)) * (self.high - self.low) / self.epsilon
        limited = {name: min(max(value, self.low), self.high) for name, value in metrics.items()}
        noisy = {
            n: min(max(v + float(x), self.low), self.high) for (n, v), x in zip(limited.items(), noise, strict=True)
        }
        return replace(facts, metrics=noisy)


@dataclass(frozen=True)
class Examples(FilterSettings):
    """Hides the exact number of examples, which is a site's weight in averages.

    The number is rounded up to a multiple of `multiple`, then limited to the range from `least` to `most`. The number
    of local steps reveals nearly the same and leaves as 0. All sites should use the same arguments, so that their
    weights stay comparable.

    Attributes:
        equal: Send 1 in every case, so that all sites have the same weight. The other arguments are then ignored.
        least: Smallest number that leaves, at least 1.
        most: Largest number that leaves, at least `least`; None for no limit.
        multiple: The number is rounded up to a multiple of this, at least 1.

    Raises:
        ConfigError: If an argument is out of range.
    """

    equal: bool = False
    least: int = 1
    most: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        check_number(self, "least", self.least, least=1)
        check_number(self, "multiple", self.multiple, least=1)
        if self.most is not None:
            check_number(self, "most", self.most, least=self.least)
        if not isinstance(self.equal, bool):
            raise refuse(f"Examples: equal is {self.equal!r}", "give true or false")

    def facts(self, facts: Facts, host: FilterHost) -> Facts:
        """Replace the numbers of examples and local steps."""
        count = -(-facts.num_examples // int(self.multiple)) * int(self.multiple)
        count = max(count, int(self.least))
        if self.most is not None:
            count = min(count, int(self.most))
        return replace(facts, metrics=plain(facts), num_examples=1 if self.equal else count, local_steps=0)


def plain(facts: Facts) -> dict[str, float]:
    """Return the metrics as plain numbers, which may be NaN: of a `Summary` the site's own value."""
    numbers = {}
    for name, metric in facts.metrics.items():
        try:
            numbers[name] = float(metric.value if isinstance(metric, Summary) else metric)
        except (TypeError, ValueError):
            continue
    return numbers
