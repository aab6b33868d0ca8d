"""Swarm rounds: a site, not the server, aggregates.

Sites send receipts: updates without tensors. The server journals and counts receipts like updates. When a round has all
of them, the server asks one of its sites to be the aggregator, and the others to send it their updates through the
relay. The mean that the aggregator submits is the next global model. If it fails, another site is asked. A site whose
update repeatedly fails to reach an aggregator is left out.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fl_runtime.aggregation.swarm import RECEIPT, in_turn, named_missing
from fl_runtime.errors import ProtocolError, QuorumError
from fl_runtime.server.courses.base import Offer, Status, UpdateChecks, Upload
from fl_runtime.server.courses.cross_site import CrossEvaluation
from fl_runtime.server.courses.initial import InitialModel
from fl_runtime.server.courses.rounds import Rounds
from fl_runtime.server.courses.sums.failures import SumFailedError
from fl_runtime.server.courses.synchronous import Synchronous
from fl_runtime.server.membership import Membership
from fl_runtime.server.models import Model
from fl_runtime.server.registration import Member
from fl_runtime.server.state import Accepted, OpenRound, RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal_entries import RoundEntry
from fl_runtime.types import PARTICIPANTS, Settings, Update
from fl_runtime.wire.manifest import Manifest

_PREFIX = "swarm-"
_MAX_FAILURES_PER_SITE = 3
"""Failures after which a site is no longer asked to aggregate, or its update is left out."""


class Swarm:
    """Course of a swarm run: sites send receipts, then one site aggregates the round. A `Course`."""

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
        order = self._current_order()
        if order is None:
            return self._receipts.offer(member, done)
        replaced = self._sum is not None and member.name in self._sum.replaced()  # its update was lost with its process
        return None if replaced else order.offer(member, done)

    def admit(self, site: str, attempt: int, round: int, stage: str) -> Status | None:
        order = self._current_order()
        if _is_aggregation_stage(stage):
            return None if order and order.admits(site, attempt, stage) else "late"
        return self._receipts.admit(site, attempt, round, stage)

    def accept(self, upload: Upload) -> Status:
        update, current, order = upload.update, self._state.open_round, self._current_order()
        if order is None or not _is_aggregation_stage(update.stage):
            return self._receipts.accept(upload)
        assert current is not None
        current.bytes_up[update.site] = current.bytes_up.get(update.site, 0) + upload.bytes_up
        order.take_answer(self._state, update, upload.blob)
        return "used"

    def task_sent(self, site: str, round: int, nbytes: int) -> None:
        self._receipts.task_sent(site, round, nbytes)

    def drive(self) -> None:
        self._receipts.drive()

    def recover(self, unfinished: Sequence[RoundEntry]) -> set[str]:
        return self._receipts.recover(unfinished)

    def _current_order(self) -> AggregationOrder | None:
        """Leave out receipts whose process has been replaced, then return the order that a site has now, if any."""
        if self._sum is None:
            return None
        self._sum.forget_lost_receipts()
        return self._sum.order

    def _begin_sum(self, current: OpenRound) -> SwarmSum:
        self._sum = SwarmSum(self._state, self._membership, self._rounds, current)
        return self._sum


@dataclass
class AggregationOrder:
    """One site's task of aggregating a round. Used under the run's lock.

    Attributes:
        stage: Name of this try at the aggregation; tasks and the answer carry it.
        round: Number of the round.
        aggregator: The site that aggregates.
        attempt: Number of the aggregator's process.
        sites: The sites whose updates are averaged, in the job's order.
        instructions: What the aggregator is told: strategy, sites and weights; JSON values.
        model: The mean, once the aggregator has submitted it.
        missing: The site whose update did not reach the aggregator, as the aggregator reported; else None.
    """

    stage: str
    round: int
    aggregator: str
    attempt: int
    sites: tuple[str, ...]
    instructions: Settings
    model: Blob | None = None
    missing: str | None = None

    def offer(self, member: Member, done: str) -> Offer | None:
        """The task that this site still has in the aggregation, or None."""
        if member.name not in self.sites or not member.active or done == self.stage:
            return None
        if member.name == self.aggregator:
            return Offer("aggregate", self.round, self.instructions, None, True, self.stage)
        return Offer(
            "share", self.round, {"to": self.aggregator, PARTICIPANTS: len(self.sites)}, None, True, self.stage
        )

    def admits(self, site: str, attempt: int, stage: str) -> bool:
        """Whether the aggregator's current process answers this stage for the first time."""
        return (site, attempt, stage) == (self.aggregator, self.attempt, self.stage) and not self._answered

    def take_answer(self, state: RunState, update: Update, blob: Blob) -> None:
        """Take what the aggregator has submitted, and its file: the mean, or which update is missing."""
        missing = named_missing(update.encoding)
        if missing is not None:
            state.blobs.free(blob)
            self.missing = missing
        else:
            state.blobs.rename(blob, f"model-{self.round}")
            self.model = blob
        state.changed.notify_all()

    def finished(self, member: Member) -> bool:
        """Whether the aggregator, `member`, has answered or can no longer answer."""
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
        """Refuse anything but a receipt, a mean, or a report of a missing update; check the values of a mean."""
        if update.round > 0:
            _check_kind(update)
            if _without_tensors(update.encoding):
                return
        self._tensors.check_values(update)


class SwarmSum:
    """Closes a round by having one of its sites aggregate. A `RoundSum`.

    Attributes:
        order: The order that a site has now, or None.
    """

    strategy_state: Blob | None = None
    base: Model | None = None

    def __init__(self, state: RunState, membership: Membership, rounds: Rounds, current: OpenRound) -> None:
        self._state, self._membership, self._rounds, self._current = state, membership, rounds, current
        self._aggregation_failures: Counter[str] = Counter()
        self._delivery_failures: Counter[str] = Counter()
        self.order: AggregationOrder | None = None

    def forget_lost_receipts(self) -> None:
        """Leave out receipts whose process has been replaced: its update was lost with it."""
        current = self._current
        if current is self._state.open_round and not current.collected:
            for name in self.replaced():
                self._rounds.leave_out(current, name)

    def next_in_order(self) -> Accepted | None:
        """Always None: the server has no tensors to sum."""
        self.forget_lost_receipts()
        return None

    def add(self, accepted: Accepted) -> None:
        """Never called, since `next_in_order` returns nothing to add."""
        raise NotImplementedError

    def give_up(self) -> None:
        """Do nothing: the server holds no sum."""

    def to_blame(self, failure: SumFailedError) -> Sequence[str]:
        """Return nobody: the server has no updates to sum again. Aggregators name those that they cannot use."""
        return ()

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
                if self._reopen_for_restarted_sites():
                    return None
                order = self.order = self._next_order()
                state.events.emit("aggregator", order.round, order.aggregator, sites=list(order.sites))
                state.published.notify_all()
                aggregator = membership.members[order.aggregator]
                try:
                    membership.wait_until(
                        lambda o=order, a=aggregator: o.finished(a) or bool(self.replaced()),  # type: ignore[misc]
                        state.settings.deadline_s,
                    )
                finally:
                    self.order = None
                if order.model is not None:
                    return order.model
                if self.replaced():
                    continue
                self._aggregation_failures[order.aggregator] += 1
                if order.missing in order.sites:
                    self._delivery_failures[order.missing] += 1

    def _settled(self) -> bool:
        """Whether every site of the round is connected or gone. Disconnected sites get `rejoin_s` to return."""
        members = [self._membership.members[name] for name in self._current.accepted]
        return all(member.attending or member.gone for member in members)

    def _reopen_for_restarted_sites(self) -> bool:
        """Take receipts again from sites that were restarted: they have nothing to share, and train the round again."""
        current = self._current
        members = self._membership.members
        restarted = [name for name in self.replaced() if not members[name].gone]
        for name in restarted:
            self._rounds.leave_out(current, name)
        if restarted:
            current.collected = False
            self._state.published.notify_all()
        return bool(restarted)

    def replaced(self) -> list[str]:
        """Sites whose receipt was sent by a process that another one has replaced."""
        members, accepted = self._membership.members, self._current.accepted
        return [name for name, item in accepted.items() if members[name].attempt != item.update.attempt]

    def _next_order(self) -> AggregationOrder:
        """An order for the site with the fewest failures; among equals, the next in turn."""
        state, current, members = self._state, self._current, self._membership.members
        for name in [name for name in current.accepted if not self._can_share(name)]:
            self._rounds.leave_out(current, name)
        sites = tuple(name for name in members if name in current.accepted)
        self._rounds.leave_unmet(current, sites)
        able = [name for name in sites if self._aggregation_failures[name] < _MAX_FAILURES_PER_SITE]
        needed = max(state.settings.min_sites, 2)
        if len(sites) < needed or not able:
            raise QuorumError(
                f"round {current.round} cannot be aggregated: {len(sites)} of its sites still have their updates "
                f"(at least {needed} are needed), and {len(able)} of them can still aggregate",
                where=self._membership.reasons(),
                fix="look at the logs of these sites; under swarm every site must reach the server's relay",
            )
        turns = in_turn(list(members), current.round, state.settings.seed or 0)
        aggregator = min(able, key=lambda name: (self._aggregation_failures[name], turns.index(name)))
        factors = state.settings.site_weights
        receipts = [replace(current.accepted[name].update, site_weight=factors.get(name, 1.0)) for name in sites]
        weights = [[u.site, u.num_examples, u.site_weight] for u in self._membership.quorum.within_share(receipts)]
        instructions = {"strategy": state.plan.strategy.spec, "sites": weights, PARTICIPANTS: len(sites)}
        stage = f"{_PREFIX}{current.round}-{secrets.token_hex(8)}"
        return AggregationOrder(stage, current.round, aggregator, members[aggregator].attempt, sites, instructions)

    def _can_share(self, name: str) -> bool:
        """Whether a site is still there, and its update has not failed to reach an aggregator too often."""
        return not self._membership.members[name].gone and self._delivery_failures[name] < _MAX_FAILURES_PER_SITE


def _is_aggregation_stage(stage: str) -> bool:
    """Whether an update of this stage is an aggregator's answer."""
    return stage.startswith(_PREFIX)


def _without_tensors(encoding: str) -> bool:
    """Whether this encoding is that of a receipt, or of a report of a missing update."""
    return encoding == RECEIPT or named_missing(encoding) is not None


def _check_kind(update: Update) -> None:
    """Raise ProtocolError for anything but a receipt, a mean, or a report of a missing update."""
    if _is_aggregation_stage(update.stage):
        expected = bool(update.arrays) or named_missing(update.encoding) is not None
    else:
        expected = update.encoding == RECEIPT
    if not expected:
        raise ProtocolError(
            f"{update.site} sent its update to the server; with strategy swarm only receipts and the mean go there",
            fix="run the same version of fl-adapters at every site",
        )
