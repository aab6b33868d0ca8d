"""Rounds of a run: how one is opened, dropped and committed. Synchronous, swarm and virtual courses have rounds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fl_runtime.errors import QuorumError, RoundFailedError
from fl_runtime.server.broadcast import Broadcast
from fl_runtime.server.courses.base import Offer, leased, made_of
from fl_runtime.server.courses.sampling import choose_participants, open_round
from fl_runtime.server.courses.scoring import Scoring
from fl_runtime.server.courses.sums.same_data import hint_at_same_data
from fl_runtime.server.membership import Membership
from fl_runtime.server.models import Model
from fl_runtime.server.records.results import RoundResult
from fl_runtime.server.recovery import load_model, load_update
from fl_runtime.server.registration import Member
from fl_runtime.server.state import OpenRound, RunState, stage_of
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal_entries import ModelEntry, RoundEntry, StrategyStateEntry
from fl_runtime.types import PARTICIPANTS


class Rounds:
    """The rounds of one run. Its methods are called under the run's lock.

    Attributes:
        last_used: The last round whose task each site has answered with an update that counts.
        silent: Sites that missed the deadline of a failed round and have not called since.
    """

    def __init__(self, state: RunState, membership: Membership, scoring: Scoring) -> None:
        self._state, self._membership, self._scoring = state, membership, scoring
        self._broadcast = Broadcast(state)
        self.last_used: dict[str, int] = {}
        self.silent: set[str] = set()
        scoring.on_settled = self._stop_out_of_patience

    def offer(self, member: Member, current: OpenRound) -> Offer:
        """The task of training in the open round, with the global model as it travels to this site.

        It says how many sites take part, and how many made the model, so that a site can hold both to its policy.
        """
        model, encoding = self._broadcast.model_for(member)
        cohort = {PARTICIPANTS: len(current.participants), **made_of(self._state, model.version if model else 0)}
        return leased("train", current.round, {**current.config, **encoding, **cohort}, model, member, current.stage)

    def open(self, number: int) -> OpenRound:
        """The round that the journal knows as open, or a new one for the sites that are present.

        Raises PrivacyBudgetError if the server's own budget does not allow another round.
        """
        state, membership, settings = self._state, self._membership, self._state.settings
        state.phase = "training"
        if state.open_round is None:
            participants = self._choose(number)
            stage, now = stage_of(state.journal.failures.tries(number)), membership.clock.now()
            state.open_round = open_round(settings, state.plan.strategy, number, participants, stage, now)
            state.journal.round_opened(number, tuple(participants), time.time())
        if state.models.newest is not None:  # else this is round 0, which makes the first model
            state.filters.afford(state.models.version + 1)
            self._broadcast.prepare()
        if number > 0:
            state.events.emit("round_started", number, sites=list(state.open_round.participants))
        state.published.notify_all()
        return state.open_round

    def _choose(self, number: int) -> list[str]:
        """The participants of a new round: a quorum, and as many as their policies ask for."""
        membership, settings, strategy = self._membership, self._state.settings, self._state.plan.strategy
        while True:
            membership.wait_for_quorum()
            present = membership.present()
            if membership.check_quorum(present, f"at the start of round {number}"):
                punctual = [name for name in present if name not in self.silent]
                present = punctual if len(punctual) >= settings.min_sites else present
                participants = choose_participants(settings, strategy, number, present)
                if not leave_unmet(membership, participants, f"round {number}"):
                    return participants

    def drop(self, again: int = 0, suspects: Sequence[str] = ()) -> None:
        """Drop the open round.

        Args:
            again: How many times it has failed; 0 if it is not to be opened again.
            suspects: The sites that were to blame for the failure.
        """
        state = self._state
        with state.lock:
            assert state.open_round is not None
            state.journal.round_dropped(state.open_round.round, again, suspects)
            state.events.emit("round_dropped", state.open_round.round)
            for name, accepted in state.open_round.accepted.items():
                state.blobs.free(accepted.blob)
                self.last_used[name] = state.open_round.round - 1
            state.open_round = None

    def leave_out(self, current: OpenRound, site: str) -> None:
        """Remove a site's update from the round, so that the site may send another one."""
        if site in current.accepted:
            self._state.blobs.free(current.accepted.pop(site).blob)
            self.last_used[site] = current.round - 1

    def not_needed(self, current: OpenRound) -> bool:
        """Whether the run has ended before this round, because it was out of patience."""
        rounds = self._state.plan.rounds
        return rounds is not None and current.round > rounds

    def needed(self, current: OpenRound) -> int:
        """The fewest updates that the round may close with."""
        least = max(min(self._state.settings.min_sites, len(current.participants)), 1)
        return max(least, self._membership.quorum.needed(current.accepted))

    def leave_unmet(self, current: OpenRound, sites: Sequence[str]) -> None:
        """Let sites leave whose policy asks for more updates than the round can get from these sites.

        Raises RoundFailedError if any has left, since its update must not count.
        """
        left = leave_unmet(self._membership, sites, f"round {current.round}")
        if left:
            raise RoundFailedError(
                f"too few sites are left in round {current.round} for the policies of {', '.join(left)}",
                where=self._membership.reasons(),
                fix="look at the logs of the sites that left before",
            )

    def check_deadline(self, current: OpenRound) -> None:
        """Raise QuorumError, which names the sites that are late, if the round has too few updates at its deadline."""
        if len(current.accepted) < self.needed(current):
            late = [n for n in current.participants if n not in current.accepted]
            raise QuorumError(
                f"round {current.round} has {len(current.accepted)} of {self.needed(current)} updates after "
                f"{self._state.settings.deadline_s:g} s; none came from {', '.join(late)}",
                fix="raise deadline_s, lower min_sites, or look at the logs of these sites",
            )

    def commit(self, current: OpenRound, blob: Blob, digests: bytes, strategy_state: Blob | None) -> None:
        """Make the round's result the global model: first in the journal, then for the sites."""
        state = self._state
        result = self._result(current)
        entry = ModelEntry(current.round, blob.name, blob.manifest.layout, digests)
        state_entry = None
        if strategy_state:
            state_entry = StrategyStateEntry(strategy_state.name, strategy_state.manifest.layout)
        for file in filter(None, (blob, strategy_state)):
            state.blobs.settle(file)
        state.journal.committed(entry, current.round, result.to_json(), state_entry)
        previous, state.models.newest, state.open_round = state.models.newest, Model(entry, blob, strategy_state), None
        self._stop_if_finished()
        if current.round > 0:
            state.results.append(result)
            self._scoring.scores.record_training(current.round, result.metrics)
            facts: dict[str, Any] = {}
            if pooled := current.pooled:
                facts |= {"num_examples": pooled.num_examples, "local_steps": pooled.local_steps}
            if spent := state.filters.spent():
                facts["privacy"] = dict(spent)
            state.events.emit("round_finished", current.round, **event_fields(result), **facts)
        if current.round == 1:
            hint_at_same_data(state, list(current.accepted.values()), self._membership.quorum.shown)
        state.published.notify_all()
        if previous is not None:
            if previous.strategy_state is not None:
                state.blobs.free(previous.strategy_state)
                previous.strategy_state = None
            self._scoring.keep_better(previous)
        scoring, number = self._scoring, current.round
        if number > 0 and not scoring.evaluators(number) and not scoring.scores.reported(number - 1):
            self._stop_out_of_patience(number)  # no site scores models: the metrics of training are all there is

    def recover(self, unfinished: Sequence[RoundEntry]) -> set[str]:
        """Restore the open round, its updates and the best model; returns the names of the updates' files."""
        state = self._state
        self.last_used = state.journal.reader.last_used()
        for entry in unfinished:
            stage = stage_of(state.journal.failures.tries(entry.round))
            strategy, now = state.plan.strategy, self._membership.clock.now()
            state.open_round = open_round(state.settings, strategy, entry.round, entry.participants, stage, now)
            for update in state.journal.reader.updates(entry.round):
                if update.site not in self._membership.quorum.rules:
                    continue  # the site was expelled, and the server killed before it dropped the round
                state.open_round.accepted[update.site] = load_update(state, update)
        self._stop_if_finished()  # the server may have been killed before it noted the end
        self._recover_best(state.journal.reader.models()[:-1])
        return {accepted.blob.name for accepted in state.open_round.accepted.values()} if state.open_round else set()

    def _recover_best(self, older: Sequence[ModelEntry]) -> None:
        """Restore the best model among the older ones: one, or two after a kill between commit and recycling."""
        state, models = self._state, self._state.models
        for entry in older:
            if entry.version > 0 and self._scoring.better(entry.version, models.best_version):
                if models.best:
                    state.journal.forget_model(models.best.version)
                models.best = load_model(state, entry)
            else:
                state.journal.forget_model(entry.version)

    def _result(self, current: OpenRound) -> RoundResult:
        updates = [a.update for a in current.accepted.values()]
        if current.pooled is not None:
            metrics = current.pooled.metrics
        else:
            metrics = self._membership.quorum.shown.of_updates(sorted(updates, key=lambda u: u.site))
        sites = tuple(n for n in self._membership.members if n in current.accepted)
        results = self._state.results
        if results and results[-1].sites == sites:
            sites = results[-1].sites  # results are kept: thousands of rounds should not hold thousands of copies
        return RoundResult(
            round=current.round,
            seconds=self._membership.clock.now() - current.began,
            metrics=metrics,
            sites=sites,
            missing=tuple(n for n in current.participants if n not in current.accepted),
            bytes_up=sum(current.bytes_up.values()),
            bytes_down=sum(current.bytes_down.values()),
        )

    def _stop_if_finished(self) -> None:
        """End the run with its newest model if the strategy says so."""
        state, model = self._state, self._state.models.newest
        rounds = state.plan.rounds or 0
        if model is not None and model.version < rounds and state.plan.strategy.finished(model.blob.views()[0]):
            state.stop_after(model.version)

    def _stop_out_of_patience(self, version: int) -> None:
        """End the run with its newest model if the rounds up to this version bring no improvement any more.

        The newest model is a later version if the scores of this one came after the next round had been committed.
        """
        state, rounds = self._state, self._state.plan.rounds
        newest = state.models.version
        if rounds is not None and newest < rounds and self._scoring.out_of_patience(version):
            state.stop_after(newest)


def event_fields(result: RoundResult) -> dict[str, Any]:
    """The fields of a "round_finished" event; the event itself carries the round."""
    fields = {**result.to_json(), "metrics": dict(result.metrics)}
    return {k: v for k, v in fields.items() if k != "round"}


def leave_unmet(membership: Membership, sites: Sequence[str], when: str) -> list[str]:
    """Let the sites leave whose policy asks for more sites than an aggregate of these has. Called under the lock.

    Returns their names. Where some leave, the policies of others may not be met either, until none is left or all are.
    """
    left: dict[str, None] = {}
    while unmet := membership.quorum.unmet([site for site in sites if site not in left], when):
        for site, error in unmet.items():
            membership.expel(site, error)
        left |= dict.fromkeys(unmet)
    return list(left)
