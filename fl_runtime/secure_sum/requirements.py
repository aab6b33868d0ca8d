"""What a job must not ask for beside a secure sum."""

from __future__ import annotations

from collections.abc import Iterator

from fl_runtime.errors import ConfigError
from fl_runtime.secure_sum.context import distributed_noise
from fl_runtime.types import RunSettings, Strategy

_ENCODING = ("Quantize", "TopK", "HomomorphicCKKS")


def check_secure_sum(settings: RunSettings, strategy: Strategy | None) -> None:
    """Check that the sum of the updates is all that a job needs of them.

    Args:
        settings: The job's settings.
        strategy: Its strategy; None if the scripts choose it.

    Raises:
        ConfigError: The job has `secure_sum` and needs more.
    """
    shared = distributed_noise(settings.filters)
    if shared and not settings.secure_sum:
        raise ConfigError(
            "GaussianDP with distributed adds a share of the noise at each site, and the server would see each update",
            where="filters",
            fix="set secure_sum: true, or leave distributed out",
        )
    if shared and (settings.site_weights or (strategy is not None and getattr(strategy, "weights", "") != "equal")):
        raise ConfigError(
            "GaussianDP with distributed needs a sum in which all sites count the same",
            where="filters",
            fix="use strategy: fedavg:weights=equal, without site_weights",
        )
    reason = next(_reasons(settings, strategy), None) if settings.secure_sum else None
    if reason is not None:
        raise ConfigError(
            f"with secure_sum the server learns the sum of the updates alone, but {reason}",
            where="secure_sum",
            fix="leave that out of the job, or secure_sum",
        )


def _reasons(settings: RunSettings, strategy: Strategy | None) -> Iterator[str]:
    if strategy is not None and not strategy.summable:
        yield f"the strategy {strategy.spec} needs every single one"
    if settings.cross_site:
        yield "cross_site evaluates the models of single sites"
    if settings.late == "carry":
        yield "late: carry adds an update to another round than it was masked for"
    if settings.max_share is not None and settings.max_share < 1:
        yield "max_share compares the sites' numbers of examples"
    if settings.optimizer_state == "average":
        yield "optimizer_state: average sends moments, which are too small for sums of whole numbers"
    for item in settings.filters:
        if item.get("name") in _ENCODING:
            yield f"the filter {item['name']} encodes each update in its own way"
