"""What an aggregate of a run must be made of: how many sites' updates, and no site's share above the cap."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fl_runtime.aggregation.shares import fewest_sites, sites_needed, within_cap
from fl_runtime.errors import PermissionDeniedError
from fl_runtime.server.records.site_metrics import ShownMetrics
from fl_runtime.server.state import RunState
from fl_runtime.types import CohortRules, OwnPart, Update

log = logging.getLogger(__name__)


class Quorum:
    """Holds the aggregates of one run to what the job and the policies of its sites ask of them.

    The policies that count are those of the sites whose updates are in the aggregate. So the result depends on the set
    of updates alone. Methods are called under the run's lock, except `within_share`.

    Attributes:
        rules: What each site asked for when it last registered, by name.
        shown: Which metrics others may see by these rules.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self.rules: dict[str, CohortRules] = {}
        self.shown = ShownMetrics(self.rules)
        self._named: set[str] = set()  # sites whose share has been reported as scaled down
        self._kept: set[str] = set()  # tensors that have been reported as kept

    # -- how many ---------------------------------------------------------------------------------------------

    def needed(self, sites: Iterable[str]) -> int:
        """The least number of sites in an aggregate with these, as their policies ask for it."""
        return max((sites_needed(self._rules(site)) for site in sites), default=1)

    def unmet(self, sites: Sequence[str], when: str, of: int | None = None) -> dict[str, PermissionDeniedError]:
        """Find the sites whose policy asks for more than an aggregate has.

        Args:
            sites: The sites whose policies count.
            when: The round or another time, for the errors.
            of: Number of sites in the aggregate; None if it is made of these.

        Returns:
            Site -> the error with which it leaves.
        """
        counted = self._state.plan.strategy.cohort(len(sites) if of is None else of)
        asked = {site: self._rules(site) for site in sites}
        return {s: _unmet(s, rules, counted, when) for s, rules in asked.items() if not self._met(rules, counted)}

    def check_latecomer(self, site: str, rules: CohortRules) -> None:
        """Raise PermissionDeniedError if no round of this run can have as many sites as a policy asks for, or if the
        run shows what the policy keeps."""
        self.check_shown(site, rules)
        counted = self._state.plan.strategy.cohort(self._state.settings.sites_per_round)
        if not self._met(rules, counted):
            raise _unmet(site, rules, counted, "this run")

    def check_shown(self, site: str, rules: CohortRules) -> None:
        """Raise PermissionDeniedError if other sites of this run get or see what a policy keeps from them."""
        for part, rule, what in self._shown():
            if part in rules.stays:
                raise PermissionDeniedError(
                    f"{site} may not take part in this run, {what}",
                    where=f"rule {rule} (policy.yml of {site})",
                    fix="change the job, or ask the site to change its policy",
                )

    def keeps_initial(self, site: str) -> bool:
        """Whether a site's policy keeps its weights from being the initial model."""
        return "initial" in self._rules(site).stays

    def withheld(self, senders: Mapping[str, Iterable[str]], round: int) -> list[str]:
        """Find the tensors that come from fewer sites than the policies of these ask for. They keep their global value.

        They are reported once.

        Args:
            senders: Site -> names of the tensors in its update.
            round: The round, for the report.

        Returns:
            The names of these tensors.
        """
        by_tensor: dict[str, list[str]] = {}
        for site, names in senders.items() if self.needed(senders) > 1 else ():
            for name in names:
                by_tensor.setdefault(name, []).append(site)
        found = {n: sites for n, sites in by_tensor.items() if len(sites) < len(senders) and self.unmet(sites, "")}
        new = [name for name in found if name not in self._kept]
        self._kept.update(new)
        if new:
            shown = f"{', '.join(new[:3])}{', ...' if new[3:] else ''}"
            text = (
                f"{shown} came from {', '.join(found[new[0]])} alone and keeps its global value: a policy asks for the "
                f"updates of {self.needed(found[new[0]])} sites"
            )
            log.warning("%s", text)
            self._state.events.emit("warning", round, text=text)
        return list(found)

    def _shown(self) -> Iterator[tuple[OwnPart, str, str]]:
        """What of single sites this run shows to others: the part, the rule of a policy that keeps it, and how."""
        settings, strategy = self._state.settings, self._state.plan.strategy
        if strategy.initial == "all" and not settings.names_initial:
            yield "initial", "initial: false", "whose initial model is made of the contributions of all sites"
        if settings.cross_site:
            yield "metrics", "site_metrics: false", "whose cross_site records the metrics of every site"
        if strategy.shows == "trees":
            yield "trees", "trees", f"in which {strategy.spec} shows its trees or histograms to the other sites"
        if strategy.shows == "updates":
            yield "updates", "swarm", f"in which {strategy.spec} sends its updates to another site"

    def _met(self, rules: CohortRules, counted: int) -> bool:
        capped = self._state.plan.strategy.scalable or (rules.max_share or 1) >= 1
        return capped and sites_needed(rules) <= counted

    def _rules(self, site: str) -> CohortRules:
        return self.rules.get(site) or CohortRules()

    # -- how much ---------------------------------------------------------------------------------------------

    def max_share(self, sites: Iterable[str]) -> float | None:
        """The largest share that one of these sites may have in their aggregate; None for no cap."""
        caps = [self._state.settings.max_share, *(self._rules(site).max_share for site in sites)]
        return min((cap for cap in caps if cap is not None and cap < 1), default=None)

    @property
    def may_scale(self) -> bool:
        """Whether a cap may hold in this run, so that all weights must be known before the first update is summed."""
        return self.max_share(self._state.settings.sites) is not None

    def within_share(self, updates: Sequence[Update]) -> list[Update]:
        """Scale down the updates of an aggregate to the cap. A site that is scaled down is reported once.

        Raises RoundFailedError if so few updates cannot be within the cap.
        """
        cap = self.max_share([update.site for update in updates])
        if cap is None:
            return list(updates)
        equal = self._state.filters.counts_equally
        weights = [1.0] * len(updates) if equal else self._state.plan.strategy.weights_of(updates)
        limited, scaled = within_cap(updates, weights, cap)
        with self._state.lock:
            new = [site for site in scaled if site not in self._named]
            self._named.update(new)
            for site in new:
                self._report(site, updates, weights, cap)
        return limited

    def _report(self, site: str, updates: Sequence[Update], weights: Sequence[float], cap: float) -> None:
        own = sum(weight for update, weight in zip(updates, weights, strict=True) if update.site == site)
        share = "too large a share" if self.shown.pooled_alone else f"a share of {own / sum(weights):.3g}"
        text = (
            f"{site} would have {share} in the model of round {updates[0].round}; it is "
            f"scaled down to max_share={cap:g}, here and in later rounds"
        )
        log.warning("%s", text)
        self._state.events.emit("warning", updates[0].round, site, text=text)


def _unmet(site: str, rules: CohortRules, counted: int, when: str) -> PermissionDeniedError:
    updates = "1 site" if counted == 1 else f"{counted} sites"
    return PermissionDeniedError(
        f"{site} may not take part in {when}: its models would be made of the updates of {updates}",
        where=_rule(site, rules),
        fix="let more sites take part, choose another strategy, or ask the site to change its policy",
    )


def _rule(site: str, rules: CohortRules) -> str:
    """The rule of a policy that asks for most sites."""
    by_share = fewest_sites(rules.max_share) > rules.min_cohort
    by_share |= rules.max_share is not None and rules.min_cohort == 1
    rule = f"max_share: {rules.max_share:g}" if by_share else f"min_cohort: {rules.min_cohort}"
    return f"rule {rule} (policy.yml of {site})"
