"""What a site's policy allows of statistics over its rows."""

from __future__ import annotations

from pathlib import Path

from fl_adapters.participant.kit import Kit
from fl_runtime.types import StatisticsRules


def statistics_rules(kit: Kit | None) -> StatisticsRules:
    """Return what the policy of a site's startup kit allows now.

    Args:
        kit: The kit; None without a federation. A simulation's kit has no policy.

    Returns:
        The rules; those that allow all, if there is no policy.

    Raises:
        ConfigError: The policy cannot be read.
    """
    if kit is None or not kit.credentials:
        return StatisticsRules()
    from fl_runtime.trust.kits import read_kit
    from fl_runtime.trust.policy import read_policy

    policy = read_policy(read_kit(Path(kit.credentials), kind="site").policy_file)
    return policy.statistics.rules(policy.min_cohort)
