"""What a site's policy asks of every aggregate: of how many sites it is made, and how much of it one site may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fl_runtime.errors import ConfigError
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.policy.refusal import denied
from fl_runtime.types import PARTICIPANTS, UPDATES, RunSettings, Strategy, Task


@dataclass(frozen=True)
class CohortPolicy:
    """The rules of a policy on who must be in an aggregate with its site. Every check raises PermissionDeniedError.

    Attributes:
        min_cohort: Least number of sites whose updates are in every model that the site takes part in.
        max_share: Largest share of one site in the weights of such a model; None sets no cap.
        site_weights: Largest ratio between the factors of two sites in a job's `site_weights`; None accepts every one.
        fraction: Smallest `fraction` of a job; None accepts every one.
    """

    min_cohort: int = 1
    max_share: float | None = None
    site_weights: float | None = None
    fraction: float | None = None

    def check_sampling(self, job: RunSettings, site: Identity) -> None:
        """Check which fraction of the sites a job draws.

        Args:
            job: Settings of the job.
            site: This site.
        """
        if self.fraction is not None and job.fraction < self.fraction:
            action = f"take part in {job.name}, which draws a fraction of {job.fraction:g} of the sites for a round"
            raise denied(site, action, f"fraction: {self.fraction:g}")

    def check_site_weights(self, job: RunSettings, site: Identity) -> None:
        """Check how unequally a job weights the sites.

        Args:
            job: Settings of the job.
            site: This site.
        """
        factors = [job.site_weights.get(name, 1.0) for name in job.sites]
        if self.site_weights is not None and not max(factors) <= self.site_weights * min(factors):
            action = f"take part in {job.name}, whose site_weights are from {min(factors):g} to {max(factors):g}"
            raise denied(site, action, f"site_weights: {self.site_weights:g}")

    def check_sites(self, job: RunSettings, site: Identity) -> None:
        """Check whether the rounds of a job have enough sites.

        Args:
            job: Settings of the job.
            site: This site.
        """
        self._check_count(job.name, job.sites_per_round, site)

    def check_strategy(self, job: RunSettings, strategy: Strategy, site: Identity) -> None:
        """Check of how many updates of a round a strategy makes a model, and whether it can hold to the cap on shares.

        Args:
            job: Settings of the job.
            strategy: Its strategy, or the script's.
            site: This site.
        """
        capped = strategy.scalable or (self.max_share or 1) >= 1
        try:
            counted = strategy.cohort(job.sites_per_round) if capped else 1
        except ConfigError:
            return  # the strategy cannot work with so few sites: the job is refused for that
        self._check_count(f"{job.name} with the strategy {strategy.spec}", counted, site)

    def check_task(self, task: Task, site: Identity) -> None:
        """Check of how many updates the model of a task is made, and how many its round will have.

        Args:
            task: The task as the server sent it.
            site: This site.
        """
        counts = [(task.round, task.config.get(PARTICIPANTS)), (task.version, task.config.get(UPDATES))]
        sites = task.config.get("sites")
        if task.kind == "aggregate" and isinstance(sites, list):  # this site sees for itself whose updates it averages
            counts.append((task.round, len({str(item[0]) for item in sites if _has_weight(item)})))
        for round, count in counts:
            if isinstance(count, int):
                self._check_count(f"round {round} of {task.job}", count, site)

    def _check_count(self, what: str, sites: int, site: Identity) -> None:
        count = f"{sites} site" if sites == 1 else f"{sites} sites"
        action = f"take part in {what}, whose models are made of the updates of {count}"
        if sites < self.min_cohort:
            raise denied(site, action, f"min_cohort: {self.min_cohort}")
        if self.max_share is not None and sites * self.max_share < 1 - 1e-9:
            raise denied(site, action, f"max_share: {self.max_share:g}")


def _has_weight(item: Any) -> bool:
    """Whether an entry of a server's list, [site, number of examples, factor], counts in a mean."""
    try:
        return float(item[1]) * float(item[2]) > 0
    except (TypeError, ValueError, LookupError, OverflowError):
        return False
