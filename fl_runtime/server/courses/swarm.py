"""Swarm rounds: a site, not the server, aggregates.

Sites send receipts in place of updates. The server journals and counts receipts like updates. When a round has all of
them, the server asks one of its sites to be the aggregator, and the others to send it their updates through the relay.
The mean that the aggregator submits is the next global model. If it fails, another site is asked; a site whose update
does not reach the aggregator is left out.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fl_runtime.aggregation.swarm import RECEIPT, in_turn, named_missing
from fl_runtime.errors import ProtocolError, QuorumError
from fl_runtime.server.courses.base import Offer, Status, UpdateChecks, Upload
from fl_runtime.server.courses.cross_site import CrossEvaluation
from fl_runtime.server.courses.initial import InitialModel
from fl_runtime.server.courses.rounds import Rounds
from fl_runtime.server.courses.synchronous import Synchronous
from fl_runtime.server.membership import Membership
from fl_runtime.server.registration import Member
from fl_runtime.server.state import Accepted, OpenRound, RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal_entries import RoundEntry
from fl_runtime.types import Settings, Update
from fl_runtime.wire.manifest import Manifest

_PREFIX = "swarm-"
_TRIES = 3
"""How often a site that is present may fail as an aggregator, or its update on the way to one."""


class Swarm:
    """Synchronous rounds of receipts, each closed by a site that aggregates. A `Course`."""

    def __init__(
        self,
        state: RunState,
        membership: Membership,
        rounds: Rounds,
        initial: InitialModel,
        cross_site: CrossEvaluation,
    ) -> None:
        self._state, self._membership, self._rounds = state, membership, rounds
        self._receipts = Synchronous(state, membership, rounds, initial, cross_site, self._begin_sum)
        self._sum: SwarmSum | None = None  # the sum of the round that was opened last
        self.checks = ReceiptChecks(self._receipts.checks)

    def offer(self, member: Member, done: str) -> Offer | None:
        mandate = self._mandate
        return self._receipts.offer(member, done) if mandate is None else mandate.offer(member, done)

    def admit(self, site: str, attempt: int, round: int, stage: str) -> Status | None:
        mandate = self._mandate
        if _is_mandate(stage):
            return None if mandate and mandate.admits(site, attempt, stage) else "late"
        return self._receipts.admit(site, attempt, round, stage)

    def accept(self, upload: Upload) -> Status:
        update, current, mandate = upload.update, self._state.open_round, self._mandate
        if mandate is None or not _is_mandate(update.stage):
            return self._receipts.accept(upload)
        assert current is not None
        current.bytes_up[update.site] = current.bytes_up.get(update.site, 0) + upload.bytes_up
        mandate.answer(self._state, update, upload.blob)
        return "used"

    def task_sent(self, site: str, round: int, nbytes: int) -> None:
        self._receipts.task_sent(site, round, nbytes)

    def drive(self) -> None:
        self._receipts.drive()

    def recover(self, unfinished: Sequence[RoundEntry]) -> set[str]:
        return self._receipts.recover(unfinished)

    @property
    def _mandate(self) -> Mandate | None:
        """The mandate that a site has now. Receipts of processes that are gone are left out first."""
        if self._sum is None:
            return None
        self._sum.forget_lost_receipts()
        return self._sum.mandate

    def _begin_sum(self, current: OpenRound) -> SwarmSum:
        self._sum = SwarmSum(self._state, self._membership, self._rounds, current)
        return self._sum


@dataclass
class Mandate:
    """One site's mandate to aggregate a round. Used under the run's lock.

    Attributes:
        stage: Name of this try at the aggregation; tasks and the answer carry it.
        round: Number of the round.
        aggregator: The site that aggregates.
        attempt: Number of the aggregator's process.
        sites: The sites whose updates are averaged, in the job's order.
        order: The aggregator's instructions: strategy, sites and weights; JSON values.
        model: The mean, once the aggregator has submitted it.
        missing: The site whose update did not reach the aggregator, if it says so.
    """

    stage: str
    round: int
    aggregator: str
    attempt: int
    sites: tuple[str, ...]
    order: Settings
    model: Blob | None = None
    missing: str | None = None

    def offer(self, member: Member, done: str) -> Offer | None:
        """A site's part in the aggregation, unless it has done that already."""
        if member.name not in self.sites or not member.active or done == self.stage:
            return None
        if member.name == self.aggregator:
            return Offer("aggregate", self.round, self.order, None, True, self.stage)
        return Offer("share", self.round, {"to": self.aggregator}, None, True, self.stage)

    def admits(self, site: str, attempt: int, stage: str) -> bool:
        """Whether this is the answer that the mandate waits for."""
        return (site, attempt, stage) == (self.aggregator, self.attempt, self.stage) and not self._answered

    def answer(self, state: RunState, update: Update, blob: Blob) -> None:
        """Take what the aggregator has submitted, and its file: the mean, or which update is missing."""
        named = named_missing(update.encoding)
        if named is not None:
            state.blobs.free(blob)
            self.missing = named
        else:
            state.blobs.rename(blob, f"model-{self.round}")
            self.model = blob
        state.changed.notify_all()

    def over(self, member: Member) -> bool:
        """Whether there is an answer, or none can come any more. `member` is the aggregator."""
        return self._answered or not member.active or member.attempt != self.attempt

    @property
    def _answered(self) -> bool:
        return self.model is not None or self.missing is not None


class ReceiptChecks:
    """Checks of receipts and of aggregators' answers. See the protocol `UpdateChecks`."""

    def __init__(self, tensors: UpdateChecks) -> None:
        self._tensors = tensors

    def check_layout(self, manifest: Manifest, content: str, encoding: str) -> None:
        """Refuse a receipt that has tensors; check the tensors of everything else."""
        if not _without_tensors(encoding):
            self._tensors.check_layout(manifest, content, encoding)
        elif manifest.tensors:
            raise ProtocolError("a swarm receipt must not hold tensors", fix="run the same version at every site")

    def check_values(self, update: Update) -> None:
        """Refuse an update where a receipt, a mean or word of a missing update belongs; check the values of a mean."""
        if update.round > 0:
            _check_kind(update)
            if _without_tensors(update.encoding):
                return
        self._tensors.check_values(update)


class SwarmSum:
    """Closes a round by having one of its sites aggregate. A `RoundSum`.

    Attributes:
        mandate: The mandate that a site has now, or None.
    """

    kept: Blob | None = None

    def __init__(self, state: RunState, membership: Membership, rounds: Rounds, current: OpenRound) -> None:
        self._state, self._membership, self._rounds, self._current = state, membership, rounds, current
        self._failed_to_form: Counter[str] = Counter()
        self._failed_to_come: Counter[str] = Counter()
        self.mandate: Mandate | None = None

    def forget_lost_receipts(self) -> None:
        """Leave out the receipts of processes that are gone: the updates that they stand for are gone with them."""
        current = self._current
        if current is self._state.open_round and not current.closing:
            for name in self._outlived():
                self._rounds.leave_out(current, name)

    def next_in_order(self) -> Accepted | None:
        """None: the server sums nothing."""
        self.forget_lost_receipts()
        return None

    def add(self, accepted: Accepted) -> None:
        """Never called, since `next_in_order` returns nothing to add."""
        raise NotImplementedError

    def give_up(self) -> None:
        """Do nothing: the server has made nothing that could be freed."""

    def finish(self) -> Blob | None:
        """Have sites aggregate until one submits the mean.

        Returns:
            The mean, or None if the round must take receipts again, because a site that had sent one was restarted.

        Raises:
            QuorumError: Too few sites are left, or none of them could aggregate.
        """
        state, membership = self._state, self._membership
        with state.lock:
            while True:
                membership.wait_until(self._settled, state.settings.rejoin_s)
                if self._reopened():
                    return None
                mandate = self.mandate = self._next_mandate()
                state.events.emit("aggregator", mandate.round, mandate.aggregator, sites=list(mandate.sites))
                state.published.notify_all()
                aggregator = membership.members[mandate.aggregator]
                try:
                    membership.wait_until(lambda m=mandate, a=aggregator: m.over(a), state.settings.deadline_s)  # type: ignore[misc]
                finally:
                    self.mandate = None
                if mandate.model is not None:
                    return mandate.model
                self._failed_to_form[mandate.aggregator] += 1
                if mandate.missing in mandate.sites:
                    self._failed_to_come[mandate.missing] += 1

    def _settled(self) -> bool:
        """Whether each site is present or gone for good. One whose connection is broken has its time to come back."""
        members = [self._membership.members[name] for name in self._current.accepted]
        return all(member.attending or member.gone for member in members)

    def _reopened(self) -> bool:
        """Take receipts again from sites that were restarted: they have nothing to share, and train the round again."""
        current = self._current
        members = self._membership.members
        restarted = [name for name in self._outlived() if not members[name].gone]
        for name in restarted:
            self._rounds.leave_out(current, name)
        if restarted:
            current.closing = False
            self._state.published.notify_all()
        return bool(restarted)

    def _outlived(self) -> list[str]:
        """Sites whose receipt was sent by a process that another one has replaced."""
        members, accepted = self._membership.members, self._current.accepted
        return [name for name, item in accepted.items() if members[name].attempt != item.update.attempt]

    def _next_mandate(self) -> Mandate:
        """A mandate for the able site that has failed least and whose turn comes first."""
        state, current, members = self._state, self._current, self._membership.members
        for name in [name for name in current.accepted if not self._can_share(name)]:
            self._rounds.leave_out(current, name)
        sites = tuple(name for name in members if name in current.accepted)
        able = [name for name in sites if self._failed_to_form[name] < _TRIES]
        needed = max(state.settings.min_sites, 2)
        if len(sites) < needed or not able:
            raise QuorumError(
                f"round {current.round} has the updates of {len(sites)} of at least {needed} sites, and "
                f"{len(able)} of them could form the mean",
                where=self._membership.reasons(),
                fix="look at the logs of these sites; under swarm every site must reach the server's relay",
            )
        turns = in_turn(list(members), current.round, state.settings.seed or 0)
        aggregator = min(able, key=lambda name: (self._failed_to_form[name], turns.index(name)))
        weights = state.settings.site_weights
        shares = [[name, current.accepted[name].update.num_examples, weights.get(name, 1.0)] for name in sites]
        order = {"strategy": state.plan.strategy.spec, "sites": shares}
        stage = f"{_PREFIX}{current.round}-{secrets.token_hex(8)}"
        return Mandate(stage, current.round, aggregator, members[aggregator].attempt, sites, order)

    def _can_share(self, name: str) -> bool:
        """Whether a site is still there, and its update has not failed to reach an aggregator too often."""
        return not self._membership.members[name].gone and self._failed_to_come[name] < _TRIES


def _is_mandate(stage: str) -> bool:
    """Whether an update of this stage is an aggregator's answer."""
    return stage.startswith(_PREFIX)


def _without_tensors(encoding: str) -> bool:
    """Whether this encoding is that of a receipt, or of word that an update is missing."""
    return encoding == RECEIPT or named_missing(encoding) is not None


def _check_kind(update: Update) -> None:
    """ProtocolError for anything but a receipt, a mean, or word that an update is missing."""
    if _is_mandate(update.stage):
        good = bool(update.arrays) or named_missing(update.encoding) is not None
    else:
        good = update.encoding == RECEIPT
    if not good:
        raise ProtocolError(
            f"{update.site} has sent an update, but under swarm the server takes only receipts and means",
            fix="run the same version of fl-adapters at every site",
        )
