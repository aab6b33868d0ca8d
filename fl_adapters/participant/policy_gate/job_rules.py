"""What a policy refuses in the settings of a job, before its script runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from fl_runtime.aggregation import make_strategy
from fl_runtime.client.job_settings import run_settings
from fl_runtime.errors import FederationError
from fl_runtime.filters import check_repeatable
from fl_runtime.types import RunSettings, Settings

if TYPE_CHECKING:  # these need `cryptography`, which the base install does not bring
    from fl_runtime.trust.identity import Identity
    from fl_runtime.trust.policy import Policy


def job_refusals(
    policy: Policy, site: Identity, job: Settings, *, submitter_known: bool = True
) -> Iterator[FederationError]:
    """Yield what in a policy, of all that needs no script to decide, refuses a job: one error for each rule.

    Args:
        policy: The policy.
        site: The site whose policy it is.
        job: Settings of the job.
        submitter_known: Whether the settings say who submits the job; otherwise that is not checked.
    """
    from fl_runtime.trust.identity import Identity

    settings, cohort, own = run_settings(job), policy.cohort, policy.disclosure
    uri = str(job.get("submitted_by", ""))
    if submitter_known:
        submitter = Identity.from_uri(uri) if uri else None
        yield from _refused(lambda: policy.check_submitter(settings.name, submitter, site))
    about_all = (cohort.check_sampling, cohort.check_site_weights, cohort.check_sites)
    for check in (policy.check_secure_sum, own.check_cross_site, own.check_earlier, *about_all):
        yield from _refused(partial(check, settings, site))
    if settings.strategy is not None:
        yield from strategy_refusals(policy, site, settings, settings.strategy)
    if settings.exact_restart:
        yield from _refused(lambda: check_repeatable(policy.filters))


def strategy_refusals(policy: Policy, site: Identity, job: RunSettings, strategy: str) -> Iterator[FederationError]:
    """Yield what in a policy refuses a strategy: its name, what it shows, or of how few updates it makes a model."""
    yield from _refused(lambda: policy.check_strategy(job.name, strategy, site))
    for check in (policy.disclosure.check_strategy, policy.cohort.check_strategy):
        yield from _refused(partial(check, job, make_strategy(strategy), site))


def _refused(check: Callable[[], None]) -> Iterator[FederationError]:
    """Yield the error that a check raises, if any."""
    try:
        check()
    except FederationError as error:
        yield error
