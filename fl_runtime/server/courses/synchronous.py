"""Synchronous rounds: the participants train on the same global model, and their updates make the next one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from fl_runtime.errors import FederationError, ProtocolError, RoundFailedError
from fl_runtime.server.calls import limits
from fl_runtime.server.courses.base import Offer, RoundSum, Status, Upload
from fl_runtime.server.courses.cross_site import CrossEvaluation
from fl_runtime.server.courses.initial import InitialModel
from fl_runtime.server.courses.rounds import Rounds
from fl_runtime.server.courses.sums.failures import SumFailedError, checked_digests
from fl_runtime.server.courses.sums.summing import Summing
from fl_runtime.server.courses.sums.suspects import Suspects
from fl_runtime.server.membership import Membership
from fl_runtime.server.registration import Member
from fl_runtime.server.state import Accepted, OpenRound, RunState
from fl_runtime.server.update_checks import TensorChecks
from fl_runtime.store.journal_entries import RoundEntry, UpdateEntry

log = logging.getLogger(__name__)

_MAX_FAILED_TRIES = 4
"""Failures of one round after which the run fails. Those for which a site is to blame do not count."""


class Synchronous:
    """The course of most runs: one round after the other, each with a quorum and a deadline. A `Course`."""

    def __init__(
        self,
        state: RunState,
        membership: Membership,
        rounds: Rounds,
        initial: InitialModel,
        cross_site: CrossEvaluation,
        summing: Callable[[OpenRound], RoundSum] | None = None,
    ) -> None:
        """Compose the course.

        Args:
            state: The run's state.
            membership: Its sites.
            rounds: Opens and commits the rounds.
            initial: Where the initial model comes from.
            cross_site: Takes over the files of updates whose round is closed.
            summing: Makes the sum of a round's updates; by default the server sums them in a fixed order.
        """
        self._state, self._membership, self._rounds = state, membership, rounds
        self._initial, self._cross_site = initial, cross_site
        self._suspects = Suspects(state, membership)
        self._summing = summing or (lambda current: Summing(state, membership.quorum, current))
        self.checks = TensorChecks(state, membership)

    def offer(self, member: Member, done: str) -> Offer | None:
        self._rounds.silent.discard(member.name)
        current, name = self._state.open_round, member.name
        if current is None or not self._collecting(current) or not current.takes(name) or name in current.accepted:
            return None
        if name not in current.participants:  # the site came back while the round is open
            current.participants.append(name)
        if current.round == 0:
            return Offer("initial", 0, current.config, None, True, current.stage)
        return self._rounds.offer(member, current)

    def admit(self, site: str, attempt: int, round: int, stage: str) -> Status | None:
        state = self._state
        if round <= self._rounds.last_used.get(site, -1):
            return "duplicate"
        while state.phase == "training" and (state.open_round is None or state.open_round.collected):
            state.published.wait()
            self._membership.caller(site, attempt)
        current = state.open_round
        if round == 0 and (current is None or current.round != 0):
            return "duplicate"  # the initial model is there, or another site's is wanted
        if current is None or (round < current.round and state.settings.late == "drop"):
            return "late"
        if not self._collecting(current) or (round == current.round and stage != current.stage):
            return "late"  # the run ends before this round, or it has been opened again
        if round == current.round and not current.takes(site):
            return "late"  # the site was not selected for this round
        if round > current.round:
            raise ProtocolError(f"an update is for round {round}, but round {current.round} is open")
        return "duplicate" if site in current.accepted else None

    def accept(self, upload: Upload) -> Status:
        state, update, blob = self._state, upload.update, upload.blob
        current = state.open_round
        assert current is not None
        try:
            sent = [item.update for item in current.accepted.values()]
            limits.check_extras(update, sent, len(current.participants))
        except FederationError:
            state.blobs.free(blob)
            raise
        if update.site not in current.participants:  # a late update is carried in by a site that missed the opening
            current.participants.append(update.site)
        current.bytes_up[update.site] = upload.bytes_up
        state.blobs.rename(blob, f"update-{current.round}-{self._membership.members[update.site].index}")
        state.blobs.settle(blob)
        layout = blob.manifest.layout
        entry = UpdateEntry(current.round, update.site, upload.digest, blob.name, layout, upload.header)
        state.journal.accepted(entry)
        current.accepted[update.site] = Accepted(update, blob, upload.digest)
        self._rounds.last_used[update.site] = update.round
        status: Status = "used" if update.round == current.round else "carried"
        state.emit_update(
            update,
            status,
            round=current.round,
            seconds=self._membership.clock.now() - current.began,
            bytes_up=upload.bytes_up,
            bytes_down=current.bytes_down.get(update.site, 0),
        )
        return status

    def task_sent(self, site: str, round: int, nbytes: int) -> None:
        current = self._state.open_round
        if current and current.round == round:
            current.bytes_down[site] = current.bytes_down.get(site, 0) + nbytes

    def drive(self) -> None:
        state = self._state
        if state.plan.strategy.initial == "all" and not state.settings.names_initial:
            while state.models.newest is None:
                self._round(0)
        else:
            self._initial.obtain()
        assert state.plan.rounds is not None
        while state.models.version < state.plan.rounds:  # a round may find that the run ends before it
            self._round(state.models.version + 1)

    def recover(self, unfinished: Sequence[RoundEntry]) -> set[str]:
        return self._rounds.recover(unfinished)

    def _collecting(self, current: OpenRound) -> bool:
        """Whether the open round takes updates: it is not collected, and the run does not end before it."""
        return self._state.phase == "training" and not current.collected and not self._rounds.not_needed(current)

    def _round(self, number: int) -> None:
        """One round: open, collect updates in any order, sum them in fixed order, commit."""
        state, rounds = self._state, self._rounds
        with state.lock:
            current = rounds.open(number)
            summing = self._summing(current)
        blob = None
        try:
            while blob is None:
                while not self._sum_next(current, summing):
                    pass
                if rounds.not_needed(current):
                    summing.give_up()
                    rounds.drop()
                    return
                blob = summing.finish()
            updates = [accepted.update for accepted in current.accepted.values()]
            digests = checked_digests(blob, summing.strategy_state, number, updates, summing.base)
        except SumFailedError as failure:
            suspects = summing.to_blame(failure)
            summing.give_up()
            self._try_again(current, failure if suspects else failure.error, suspects)
            return
        except RoundFailedError as error:
            summing.give_up()
            self._try_again(current, error)
            return
        with state.lock:
            rounds.commit(current, blob, digests, summing.strategy_state)
            for accepted in current.accepted.values():
                unneeded = self._cross_site.keep(accepted) if current.round > 0 else accepted.blob
                if unneeded is not None:
                    state.blobs.free(unneeded)

    def _try_again(self, current: OpenRound, error: FederationError, suspects: Sequence[str] = ()) -> None:
        """Drop a round that failed. It is opened again with the sites that are present then and are not silent.

        Raises the error if that would not help, or has not helped.
        """
        state, number = self._state, current.round
        log.warning("round %s failed: %s", number, error.what)
        if not isinstance(error, RoundFailedError):
            raise error  # the updates do not fit each other, which further ones would not either
        with state.lock:
            failures = state.journal.failures.tries(number) + 1
            unexplained = failures - state.journal.failures.blamed(number)
            if not suspects and unexplained == _MAX_FAILED_TRIES:
                raise RoundFailedError(f"round {number} failed {unexplained} times: {error.what}", fix=error.fix)
            if isinstance(error, SumFailedError):
                self._suspects.blame(suspects, number, error)
            self._rounds.silent |= set(current.participants) - set(current.accepted)
            self._rounds.drop(again=failures, suspects=suspects)

    def _sum_next(self, current: OpenRound, summing: RoundSum) -> bool:
        """Wait for an update to sum, and sum it without the lock. True when the round can close."""
        rounds, membership = self._rounds, self._membership
        due: Accepted | None = None

        def ready() -> bool:
            nonlocal due
            due = summing.next_in_order()
            return due is not None or rounds.not_needed(current) or self._complete(current)

        with self._state.lock:
            left_s = membership.outages.left_s(current.began, self._state.settings.deadline_s)
            in_time = membership.wait_until(ready, left_s)
            if due is None:
                if not in_time:
                    rounds.check_deadline(current)
                current.collected = True
                return True
        summing.add(due)
        return False

    def _complete(self, current: OpenRound) -> bool:
        """Whether the round has all the updates that it waits for: those of a quorum, or as many as are wanted."""
        membership = self._membership
        pending = [n for n in current.participants if n not in current.accepted and not membership.members[n].gone]
        counted = [*current.accepted, *pending]
        when = f"in round {current.round}"
        if not current.drawn:
            if len(counted) < membership.outages.needed:  # others may still come into the round
                pending += [name for name in membership.known() if name not in current.participants]
                counted = [*current.accepted, *pending]
            if not membership.check_quorum(counted, when):
                return False
        elif len(counted) < self._rounds.needed(current):
            if not membership.check_quorum(membership.present(), when):
                return False
            raise RoundFailedError(f"only {len(counted)} of the chosen sites are left", fix="look at their logs")
        self._rounds.leave_unmet(current, counted)
        wanted = max(current.answers or 0, membership.quorum.needed(current.accepted))
        return not pending or (current.answers is not None and len(current.accepted) >= wanted)
