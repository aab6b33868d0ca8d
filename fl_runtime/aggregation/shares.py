"""The cap on a site's share of an aggregate: how many updates it needs, and how weights are scaled down to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fl_runtime.errors import ConfigError, RoundFailedError
from fl_runtime.types import CohortRules, RunSettings, Strategy, Update

_TOLERANCE = 1e-9
"""Relative difference below which a share counts as equal to the cap, so that 3 sites can have a third each."""


def fewest_sites(max_share: float | None) -> int:
    """Return the least number of sites whose shares can all be within a cap.

    Args:
        max_share: The cap, above 0 and at most 1; None for no cap.

    Returns:
        1 / `max_share`, rounded up; 1 without a cap.
    """
    return 1 if max_share is None else math.ceil(1 / max_share - _TOLERANCE)


def sites_needed(rules: CohortRules) -> int:
    """Return the least number of sites with which an aggregate keeps to the rules of a site's policy.

    Args:
        rules: The rules.

    Returns:
        `min_cohort`, or more if the cap on shares needs it.
    """
    return max(rules.min_cohort, fewest_sites(rules.max_share))


def capped_weights(weights: Mapping[str, float], max_share: float) -> dict[str, float]:
    """Scale down the largest weights until no site's share of their sum exceeds a cap.

    With U the sum of the weights that stay and k the number of those that are scaled, each scaled weight becomes
    c U / (1 - k c), which is the share c of the new sum. k is the least number with which no other weight is above c of
    the new sum. The result does not depend on the order of the sites.

    Args:
        weights: Site name -> weight, above 0.
        max_share: The cap c, above 0 and at most 1.

    Returns:
        Site name -> weight, in the same order. Weights of sites within the cap are unchanged.

    Raises:
        RoundFailedError: There are fewer than `fewest_sites(max_share)` sites, or a weight is not a finite number.
    """
    descending = sorted(weights.values(), reverse=True)
    if not math.isfinite(sum(descending)):
        raise RoundFailedError("the weights of the updates are too large to be added", fix="lower site_weights")
    if len(weights) < fewest_sites(max_share):
        raise RoundFailedError(
            f"with the updates of {len(weights)} sites, one of them has a share above max_share={max_share:g}",
            where="max_share",
            fix=f"let at least {fewest_sites(max_share)} sites take part in every round: raise min_sites",
        )
    scaled, total = 0, math.fsum(descending)
    while scaled < len(weights) - 1 and descending[scaled] > max_share * total * (1 + _TOLERANCE):
        scaled += 1
        total = math.fsum(descending[scaled:]) / (1 - scaled * max_share)
    most = max_share * total
    larger = descending[scaled - 1] if scaled else math.inf
    return {site: most if weight >= larger else weight for site, weight in weights.items()}


def within_cap(
    updates: Sequence[Update], weights: Sequence[float], max_share: float
) -> tuple[list[Update], tuple[str, ...]]:
    """Scale down the updates of sites whose share of an aggregate exceeds a cap.

    Args:
        updates: The updates of the aggregate. A site may have several, which count together.
        weights: The weight of each, as the strategy counts it.
        max_share: The cap, above 0 and at most 1.

    Returns:
        The updates, those scaled down with another `site_weight`, and the names of the sites whose share was above the
        cap. (Where their weights become less, a further site may be held at the cap that its share has risen to.)

    Raises:
        RoundFailedError: As by `capped_weights`.
    """
    totals: dict[str, float] = {}
    for update, weight in zip(updates, weights, strict=True):
        totals[update.site] = totals.get(update.site, 0.0) + weight
    counted = {site: total for site, total in totals.items() if total > 0}
    limited = capped_weights(counted, max_share)
    factors = {site: limited[site] / total for site, total in counted.items() if limited[site] < total}
    scaled = [replace(u, site_weight=u.site_weight * factors[u.site]) if u.site in factors else u for u in updates]
    total = math.fsum(counted.values())
    return scaled, tuple(site for site in factors if counted[site] > max_share * total)


def check_max_share(settings: RunSettings, strategy: Strategy) -> None:
    """Check that the cap of a job can hold in every round.

    Args:
        settings: The job's settings.
        strategy: Its strategy.

    Raises:
        ConfigError: The strategy cannot scale down a site, or a round may close with too few updates.
    """
    if settings.max_share is None or settings.max_share >= 1:
        return
    if not strategy.scalable:
        raise ConfigError(
            f"the strategy {strategy.spec} sums over the rows of all sites, so no site can be scaled down to max_share",
            where="max_share",
            fix="leave max_share out of the job, or choose another strategy",
        )
    fewest, counted = fewest_sites(settings.max_share), strategy.cohort(settings.min_sites)
    if counted < fewest:
        chosen = "" if counted == settings.min_sites else f", of which the strategy {strategy.spec} counts {counted}"
        most = math.ceil(1e4 / counted) / 1e4
        raise ConfigError(
            f"max_share={settings.max_share:g} needs the updates of at least {fewest} sites in every model, but a "
            f"round of this job may close with {settings.min_sites}{chosen}",
            where="max_share",
            fix=f"raise max_share to at least {most:g}, "
            + (
                "or choose another strategy"
                if chosen
                else f"or let more sites take part and raise min_sites to {fewest}"
            ),
        )
