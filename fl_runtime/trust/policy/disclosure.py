"""What a site's policy says about what is its own alone: whether other sites may get it, or see it."""

from __future__ import annotations

from dataclasses import dataclass

from fl_runtime.trust.identity import Identity
from fl_runtime.trust.policy.refusal import POLICY_FILE, denied
from fl_runtime.types import OwnPart, RunSettings, Strategy

_SHOWN = {
    "updates": ("swarm", "which sends every site's updates to another site"),
    "trees": ("trees", "which hands every site's own trees or parts of its histograms to the others"),
}


@dataclass(frozen=True)
class DisclosurePolicy:
    """The rules of a policy on what other sites get or see of its site alone. Checks raise PermissionDeniedError.

    For `cross_site`, `swarm` and `trees`, None allows it if `min_cohort` is 1: whoever asks for company in every model
    does not hand out what is the site's alone.

    Attributes:
        min_cohort: Least number of sites whose updates are in every model that the site takes part in.
        initial: Whether the site's weights may become the initial model. None allows those with which its script
            begins, but no result of an earlier job that fewer than `min_cohort` sites have trained.
        cross_site: Whether other sites may evaluate the site's model.
        swarm: Whether another site may get the site's updates, to average them.
        trees: Whether other sites may get the site's own trees, or parts of its gradient histograms.
        site_metrics: Whether the site's own metrics and number of examples may be shown to others.
    """

    min_cohort: int = 1
    initial: bool | None = None
    cross_site: bool | None = None
    swarm: bool | None = None
    trees: bool | None = None
    site_metrics: bool = True

    @property
    def own_model_stays(self) -> bool:
        """Whether no other site may get this site's own model."""
        return not self._allows(self.cross_site)

    @property
    def stays(self) -> tuple[OwnPart, ...]:
        """What else of the site the server keeps from other sites."""
        kept: dict[OwnPart, bool] = {
            "initial": self.initial is False,
            "metrics": not self.site_metrics,
            "trees": not self._allows(self.trees),
            "updates": not self._allows(self.swarm),
        }
        return tuple(part for part, stays in kept.items() if stays)

    def check_cross_site(self, job: RunSettings, site: Identity) -> None:
        """Check whether the other sites of a job would get this site's own model, or see its metrics of every model.

        Args:
            job: Settings of the job.
            site: This site.
        """
        if job.cross_site and self.own_model_stays:
            action = f"take part in {job.name}, which sends every site's model to the others"
            raise denied(site, action, self._rule("cross_site", self.cross_site), fix=_fix("cross_site"))
        if job.cross_site and not self.site_metrics:
            action = f"take part in {job.name}, whose cross_site records the metrics of every site"
            raise denied(site, action, "site_metrics: false")

    def check_strategy(self, job: RunSettings, strategy: Strategy, site: Identity) -> None:
        """Check whether a strategy shows this site's own updates or trees to the other sites.

        Args:
            job: Settings of the job.
            strategy: Its strategy, or the script's.
            site: This site.
        """
        if not strategy.shows:
            return
        name, shows = _SHOWN[strategy.shows]
        value = self.swarm if strategy.shows == "updates" else self.trees
        if not self._allows(value):
            action = f"take part in {job.name} with the strategy {strategy.spec}, {shows}"
            raise denied(site, action, self._rule(name, value), fix=_fix(name))

    def check_initial(self, site: Identity) -> None:
        """Check whether the site's weights may become the initial model.

        Args:
            site: This site.
        """
        if self.initial is False:
            raise denied(site, "send its weights as the initial model", "initial: false")

    def check_earlier(self, job: RunSettings, site: Identity) -> None:
        """Check whether a job begins with an earlier result that is nearly this site's own.

        Args:
            job: Settings of the job.
            site: This site.
        """
        origin = job.initial_job or {}
        sites = str(origin.get("sites", "")).split()
        if site.name not in sites or self.initial or len(job.sites) == 1:
            return
        action = f"take part in {job.name}: it begins with a model of {origin.get('job')}, made of the updates of "
        if len(sites) < self.min_cohort:
            counted = "this site alone" if len(sites) == 1 else f"{len(sites)} sites"
            raise denied(site, action + counted, f"min_cohort: {self.min_cohort}", fix=_fix("initial"))
        if sites == [site.name] and self.initial is False:
            raise denied(site, action + "this site alone", "initial: false", fix=_fix("initial"))

    def _allows(self, value: bool | None) -> bool:
        return self.min_cohort == 1 if value is None else value

    def _rule(self, name: str, value: bool | None) -> str:
        return f"min_cohort: {self.min_cohort}" if value is None else f"{name}: false"


def _fix(name: str) -> str:
    return f"change the job, or write `{name}: true` into the site's {POLICY_FILE} if the other sites may have that"
