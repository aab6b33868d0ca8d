"""Filters of what leaves beside the tensors: metrics, numbers of examples and of steps; in updates and in reports.

A metric that adapters send as a `Summary`, to be pooled over all sites (XGBoost's AUC), tells the number of examples
and more. Filters that change numbers let the site's own value of it leave, and no summary.
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
    """Only metrics whose name matches one of `names` leave the site. An empty list lets none leave.

    names: patterns as the shell knows them, such as "loss" or "eval_*".
    """

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.names, (list, tuple)) or not all(isinstance(name, str) for name in self.names):
            raise refuse(f"AllowMetrics: names is {self.names!r}", 'give a list of patterns such as ["loss"]')
        object.__setattr__(self, "names", tuple(self.names))

    def facts(self, facts: Facts, host: FilterHost) -> Facts:
        return replace(facts, metrics={n: v for n, v in facts.metrics.items() if matches(n, self.names)})


@dataclass(frozen=True)
class RoundMetrics(FilterSettings):
    """Metrics leave rounded to the nearest multiple of 10^-decimals, halves to the even one.

    decimals: digits behind the point, 0 to 12, default 2. Of a `Summary` the site's own value leaves, rounded.
    """

    decimals: int = 2

    def __post_init__(self) -> None:
        check_number(self, "decimals", self.decimals, least=0, most=12)

    def facts(self, facts: Facts, host: FilterHost) -> Facts:
        return replace(facts, metrics={n: round(v, int(self.decimals)) for n, v in plain(facts).items()})


@dataclass(frozen=True)
class NoisyMetrics(FilterSettings):
    """Every metric leaves as clip(v, low, high) + Lap((high - low) / epsilon), limited to [low, high] again.

    epsilon: of one metric in one sending (an update or a score), pure, default 1; all of them add up in the ledger.
    Unit and adjacency: a site's value in place of any other. low, high: bounds that hold for every metric, in its own
    unit; AllowMetrics before it takes out those that do not fit.

    Dwork et al. 2006, "Calibrating noise to sensitivity in private data analysis".
    """

    low: float = 0.0
    high: float = 1.0
    epsilon: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "low", self.low)
        check_number(self, "high", self.high, above=self.low)
        check_number(self, "epsilon", self.epsilon, above=0)

    def facts(self, facts: Facts, host: FilterHost) -> Facts:
        metrics = plain(facts)
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
    """What leaves as num_examples, the weight of a site in averages, in place of the true count.

    equal: always 1, so that every site weighs the same. Else the count is rounded up to a multiple of `multiple`
    (default 1) and then kept between `least` (default 1) and `most` (default none). The number of local steps, which
    tells nearly the same, leaves as 0. All sites should use the same arguments: the weights of a mean must compare.
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
        count = -(-facts.num_examples // int(self.multiple)) * int(self.multiple)
        count = max(count, int(self.least))
        if self.most is not None:
            count = min(count, int(self.most))
        return replace(facts, metrics=plain(facts), num_examples=1 if self.equal else count, local_steps=0)


def plain(facts: Facts) -> dict[str, float]:
    """The metrics as numbers, each the site's own value; what is no number is left out."""
    found = {}
    for name, metric in facts.metrics.items():
        try:
            value = float(metric.value if isinstance(metric, Summary) else metric)
        except (TypeError, ValueError):
            continue
        if not math.isnan(value):
            found[name] = value
    return found
