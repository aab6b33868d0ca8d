"""Scoring of global models: sites report metrics, the server pools them and tells every site."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator

from fl_runtime.aggregation.metrics.pooling import plain, to_json
from fl_runtime.aggregation.metrics.ranking import WITHHELD, Ranking
from fl_runtime.errors import ConfigError, ProtocolError
from fl_runtime.server.courses.scores import Scores
from fl_runtime.server.membership import Membership
from fl_runtime.server.models import Model
from fl_runtime.server.state import RunState
from fl_runtime.types import Metrics, Report, Terms

_LISTED = 8


class Scoring:
    """The scores of one run's global models, and the choice of the best model.

    Called under the run's lock, except `wait_for`.

    Attributes:
        scores: All metrics so far.
        on_settled: Called with a version when its scores are complete. A course sets it; None does nothing.
    """

    def __init__(self, state: RunState, membership: Membership) -> None:
        self._state, self._membership = state, membership
        self._shown = membership.quorum.shown
        self.scores = Scores(self._shown)
        self.on_settled: Callable[[int], None] | None = None
        self._metric_checked = False

    def report(self, report: Report) -> None:
        """Take a site's report on a global model. Raises ProtocolError if there is no such model yet."""
        newest = self._state.models.version
        if report.version > newest:
            raise ProtocolError(f"a site sent a score of model {report.version}, but the newest is {newest}")
        self.record(report, "report")
        expected = self.evaluators(report.version)
        if expected and expected <= self.scores.reported(report.version):
            self.settle(report.version)

    def record(self, report: Report, kind: str) -> None:
        """Keep a report, first in the journal. `kind` names its event."""
        state = self._state
        state.journal.scored(report.version, report.site, to_json(report.metrics), report.num_examples)
        self.scores.report(report.version, report.site, report.metrics, report.num_examples)
        metrics = plain(report.metrics)
        state.events.emit(kind, report.version, report.site, metrics=metrics, num_examples=report.num_examples)

    def wait_for(
        self, name: str, attempt: int, version: int, beat_s: float | None
    ) -> Iterator[tuple[Metrics, bool] | None]:
        """Wait until all sites have reported on a version; at most for half of a round's deadline.

        Yields:
            None every `beat_s` seconds of waiting, then the pooled metrics and whether the run ends with this version.
        """
        state = self._state
        began, half_s = self._membership.clock.now(), state.settings.deadline_s / 2
        while True:
            with state.lock:
                self._membership.caller(name, attempt)
                if version > state.models.version:  # the run was restored from a backup that is older
                    yield {}, False
                    return
                if not self.scores.settled(version):
                    too_late = self._membership.outages.left_s(began, half_s) <= 0
                    if self.evaluators(version) <= self.scores.reported(version) or too_late:
                        self.settle(version)
                    else:
                        state.published.wait(min(1.0, half_s, beat_s or math.inf))
                settled = self.scores.settled(version)
                rounds = state.plan.rounds
                answer = self.scores.of(version), rounds is not None and version >= rounds
            if settled:
                yield answer
                return
            if beat_s is not None:
                yield None

    def evaluators(self, version: int) -> set[str]:
        """Names of the active sites that are expected to score this version, and to which the model goes.

        They have promised to at the handshake, or they have scored the version before.
        """
        current = self._state.open_round
        recipients = current if current and current.round == version + 1 else None
        before = self.scores.reported(version - 1)
        return {
            m.name
            for m in self._membership.members.values()
            if m.active
            and (recipients is None or recipients.takes(m.name))
            and m.registration is not None
            and (m.registration.evaluates or (m.name in before and m.attempt > 0))  # virtual sites make no attempt
        }

    def settle(self, version: int) -> None:
        """Close the scores of a version, once, and tell the listeners and the sites that wait for them.

        ConfigError, which ends the run at every site, if the sites report other metrics than the one that was named.
        """
        if self.scores.settle(version):
            best = self._state.models.best_version
            leading = version if self.better(version, best) else best
            named, scores = self._ranking().metric, self.scores.of(version)
            self._state.events.emit("scored", version, metrics=scores, best_round=leading, best_metric=named)
            self._tell_hidden(version)
            self._check_metric(version)
            if self.on_settled is not None:
                self.on_settled(version)
            self._state.published.notify_all()

    def _tell_hidden(self, version: int) -> None:
        """Say once which metrics are in no result, because they came from too few sites."""
        if names := self._shown.newly_hidden():
            text = f"{', '.join(names[:_LISTED])} came from too few sites and is in no result: a policy has "
            self._state.events.emit("warning", version, text=text + "site_metrics: false")

    def keep_better(self, model: Model) -> None:
        """Keep a model that is no longer the newest if it is the best so far; recycle the loser."""
        models = self._state.models
        if model.version == 0:
            models.retire(model)
            return
        self.settle(model.version)
        if self.better(model.version, models.best_version):
            model, models.best = models.best or model, model
        if model is not models.best:
            models.retire(model)

    def better(self, challenger: int, champion: int | None) -> bool:
        """Whether the model of round `challenger` beats that of round `champion`. Without a score it never does."""
        return self.scores.better(self._ranking(), challenger, champion)

    def no_best(self) -> str:
        """Why no round is the best one so far, as a human-readable message; "" if there is a best round."""
        state, metric = self._state, self._ranking().metric
        if state.models.best is not None or state.plan.strategy.open_ended:  # totals are not scored
            return ""
        names = self._names(range(1, state.models.version + 1))
        if metric in self._shown.hidden:
            return f"{metric!r} came from fewer sites than their policies ask for (site_metrics: false)"
        if metric in names:
            return f"{metric!r} has no finite value in any round"
        others = f"; reported: {', '.join(sorted(names))}" if names else ""
        return f"no site reported {metric!r}{self._withheld(metric)}{others}"

    def out_of_patience(self, version: int) -> bool:
        """Whether the job's patience, or else that of the sites' terms, is spent with this version."""
        settings = self._state.settings
        source = settings if settings.patience else self._state.plan.terms
        if not source.patience:
            return False
        return self.scores.patience_spent(self._ranking(), version, source.patience, source.min_delta)

    def _ranking(self) -> Ranking:
        settings = self._state.settings
        return Ranking.of(self._state.plan.terms, settings.best_metric, settings.best_mode)

    def _check_metric(self, version: int) -> None:
        """Fail the run at its first scores if they lack the best metric that the job or the sites' terms named.

        A metric of the terms that filters withhold is no mistake of the script: the run goes on without a best round.
        """
        state, metric = self._state, self._ranking().metric
        named = state.settings.best_metric is not None or metric != Terms().best_metric
        if self._metric_checked or not named or version < 1 or not any(self.scores.by_site(version).values()):
            return
        self._metric_checked = True
        names = sorted(self._names(range(version + 1)))
        withheld = self._withheld(metric)
        if metric in names or (withheld and state.settings.best_metric is None):
            return
        nearest = difflib.get_close_matches(metric, names, n=1, cutoff=0.4)
        error = ConfigError(
            f"the best round is to be chosen by {metric!r}, but no site reports a metric of this name{withheld}; "
            f"reported: {', '.join(names)}",
            where=f"best_metric, scores of round {version}",
            fix=(f"did you mean {nearest[0]!r}? " if nearest else "")
            + "Name one of these metrics with --best-metric or Job(best_metric=)",
        )
        state.fail(error)
        raise error

    def _withheld(self, metric: str) -> str:
        """Which sites' filters withhold a metric, as a part of a message; "" if none do."""
        members = self._membership.members.values()
        sites = [m.name for m in members if m.registration and m.registration.info.get(WITHHELD) == metric]
        if not sites:
            return ""
        more = f" and {len(sites) - _LISTED} more" if len(sites) > _LISTED else ""
        return f" (withheld by AllowMetrics at {', '.join(sites[:_LISTED])}{more})"

    def _names(self, versions: Iterable[int]) -> set[str]:
        """Names of all metrics that these versions have, from training and from any site's report."""
        names = set(self._shown.hidden)
        for version in versions:
            names.update(self.scores.of(version), *self.scores.by_site(version).values())
        return names
