"""What a site's own policy says to its script, beside what runs are checked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.extras import needs_trust_extra
from fl_adapters.participant.kit import Kit
from fl_runtime.types import StatisticsRules

if TYPE_CHECKING:
    from fl_runtime.trust.policy import Policy


def own_policy(kit: Kit | None) -> Policy | None:
    """Read the policy of a site's startup kit.

    Args:
        kit: The kit; None without a federation.

    Returns:
        The policy as it is now; None without a federation, and in a simulation, whose kits have none.

    Raises:
        ConfigError: The policy cannot be read.
    """
    if kit is None or not kit.credentials:
        return None
    with needs_trust_extra():
        from fl_runtime.trust.kits import read_kit
        from fl_runtime.trust.policy import read_policy
    return read_policy(read_kit(Path(kit.credentials), kind="site").policy_file)


def statistics_rules(kit: Kit | None) -> StatisticsRules:
    """Return what the policy of a site's startup kit allows now.

    Args:
        kit: The kit; None without a federation. A simulation's kit has no policy.

    Returns:
        The rules; those that allow all, if there is no policy.

    Raises:
        ConfigError: The policy cannot be read.
    """
    policy = own_policy(kit)
    return StatisticsRules() if policy is None else policy.statistics.rules(policy.min_cohort)
