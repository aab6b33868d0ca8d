"""What a job must not ask for beside a secure sum, and the run that its masks belong to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from fl_runtime.errors import ConfigError
from fl_runtime.secure_sum.context import Context
from fl_runtime.trainings import job_of
from fl_runtime.types import RunSettings, Settings, Strategy

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


def distributed_noise(filters: Iterable[Settings]) -> list[Settings]:
    """Return the filters of a job whose noise is divided among its sites.

    Args:
        filters: Settings of the job's filters.

    Returns:
        Those of `GaussianDP` with `distributed`.
    """
    return [dict(item) for item in filters if item.get("name") == "GaussianDP" and item.get("distributed")]


def context_of(job: str, filters: Iterable[Settings] = ()) -> Context:
    """Return the run that masks belong to.

    Sites whose jobs ask for other shares of noise are in other runs, so no sum has less noise than a site was told.

    Args:
        job: Name of the training, such as "diagnosis" or "diagnosis/2".
        filters: The job's filters.

    Returns:
        Its context: one training is one run.
    """
    shared = distributed_noise(filters)
    return Context(job_of(job), job, json.dumps(shared, sort_keys=True) if shared else "")


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
