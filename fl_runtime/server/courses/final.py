"""The end of a run: every site gets the final model, and its scores decide which round was the best."""

from __future__ import annotations

from fl_runtime.aggregation.metrics.pooling import to_json
from fl_runtime.capabilities import FINAL_SCORE
from fl_runtime.server.courses.base import Offer, leased, made_of
from fl_runtime.server.courses.scoring import Scoring
from fl_runtime.server.membership import Membership
from fl_runtime.server.registration import Member
from fl_runtime.server.state import RunState


class FinalModel:
    """The final and the best model, as the sites get them. Called under the run's lock, except `conclude`."""

    def __init__(self, state: RunState, membership: Membership, scoring: Scoring) -> None:
        self._state, self._membership, self._scoring = state, membership, scoring
        self._exporter = ""
        self._without_score: set[str] = set()

    def expect_no_score(self, site: str) -> None:
        """Do not wait for this site's score of the final model: it has asked for the best model already."""
        self._without_score.add(site)
        self._state.changed.notify_all()

    def offer(self, member: Member, best: bool) -> Offer | None:
        """The final model or, with `best`, the best one, or no model if there is no best. None while it is unknown."""
        state, rounds = self._state, self._state.plan.rounds or 0
        if best:
            champion = state.models.best
            if state.phase != "done":
                return None
            if champion is None:
                return Offer("best", rounds, {}, None, layout_known=False)
            metrics = to_json(self._scoring.scores.of(champion.version))
            cohort = made_of(state, champion.version)
            return leased("best", rounds, {"metrics": metrics, **cohort}, champion, member)
        if state.phase not in ("final", "done"):
            return None
        config = {"export": member.name == self._exporter, **made_of(state, state.models.version)}
        return leased("final", rounds, config, state.models.newest, member)

    def conclude(self) -> None:
        """Offer the final model, wait for its scores, and decide which round was the best."""
        state, scoring = self._state, self._scoring
        with state.lock:
            self._exporter = next(iter(self._membership.known()), "")
            state.enter("final")
            models, last = state.models, state.models.version
            self._membership.wait_until(
                lambda: self._expected() <= scoring.scores.reported(last) | self._without_score,
                state.settings.deadline_s,
            )
            scoring.settle(last)
            if scoring.better(last, models.best_version):
                models.best = models.newest
            state.journal.ended(None)
            best, why_not = models.best_version, scoring.no_best()
            state.events.emit("finished", rounds=state.plan.rounds, best_round=best, no_best=why_not)
            state.enter("done")

    def _expected(self) -> set[str]:
        """Names of the active sites that will or may score the final model."""
        members = self._membership.members.values()
        may = {m.name for m in members if m.active and m.registration and FINAL_SCORE in m.registration.capabilities}
        return may | self._scoring.evaluators(self._state.models.version)
