"""Rounds whose mean one of the sites forms (`Swarm`): who does it, and what comes back.

Sites send receipts in place of updates, which are journaled and counted like these. When a round has all of them, one
of its sites is asked to be the aggregator, and the others to send it their updates through the relay; what it submits
is the next global model. Where that fails, another one is asked; a site whose update does not come is left out.
"""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_runtime.aggregation.swarm import RECEIPT, in_turn, named_missing
from fl_runtime.errors import ProtocolError, QuorumError
from fl_runtime.server.members import Member
from fl_runtime.server.state import Accepted, Offer, OpenRound, Status
from fl_runtime.store.blobs import Blob
from fl_runtime.types import Settings, Update

if TYPE_CHECKING:
    from fl_runtime.server.run import Run

_PREFIX = "swarm-"
_TRIES = 3
"""How often a site that is there may fail as an aggregator, or its update on the way to one."""


@dataclass
class Handover:
    """One try at a round's mean. Used under the run's lock.

    stage: names it. attempt: of the aggregator's process. sites: whose mean it is, in the job's order. model, missing:
    what has come of it: the mean, or the site whose update has not come to the aggregator.
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
        """This site's part in it, unless it is through with that."""
        if member.name not in self.sites or not member.active or done == self.stage:
            return None
        if member.name == self.aggregator:
            return Offer("aggregate", self.round, self.order, None, True, self.stage)
        return Offer("share", self.round, {"to": self.aggregator}, None, True, self.stage)

    def admits(self, name: str, attempt: int, stage: str) -> bool:
        """Whether this is the aggregator, with what has come of it."""
        return (name, attempt, stage) == (self.aggregator, self.attempt, self.stage) and not self._answered

    def take(self, run: Run, update: Update, blob: Blob) -> Status:
        """What the aggregator has submitted. Takes over the blob."""
        named = named_missing(update.encoding)
        if named is not None:
            run.blobs.free(blob)
            self.missing = named
        else:
            run.blobs.rename(blob, f"model-{self.round}")
            self.model = blob
        run.changed.notify_all()
        return "used"

    def over(self, run: Run) -> bool:
        member = run.members[self.aggregator]
        return self._answered or not member.active or member.attempt != self.attempt

    @property
    def _answered(self) -> bool:
        return self.model is not None or self.missing is not None


def is_of_handover(stage: str) -> bool:
    """Whether an update is what an aggregator has made."""
    return stage.startswith(_PREFIX)


def without_tensors(encoding: str) -> bool:
    """Whether this is the encoding of a message that stands for an update, or for the lack of one."""
    return encoding == RECEIPT or named_missing(encoding) is not None


def check_receipt(update: Update) -> None:
    """ProtocolError for anything but a receipt, a mean, or the word that there is none."""
    if is_of_handover(update.stage):
        good = bool(update.arrays) or named_missing(update.encoding) is not None
    else:
        good = update.encoding == RECEIPT
    if not good:
        raise ProtocolError(
            f"{update.site} has sent an update where the server gets receipts, and the mean of a round",
            fix="run the same version of fl-adapters at every site",
        )


class Relayed:
    """What the round loop closes a round with, in place of a sum of its own."""

    kept: Blob | None = None

    def __init__(self, run: Run, current: OpenRound) -> None:
        self._run, self._current = run, current
        self._failed_to_form: Counter[str] = Counter()
        self._failed_to_come: Counter[str] = Counter()

    def next_in_order(self) -> Accepted | None:
        """Nothing is summed here."""
        return None

    def add(self, accepted: Accepted) -> None:
        raise NotImplementedError

    def give_up(self) -> None:
        """There is nothing to give up."""

    def finish(self) -> Blob | None:
        """The mean that a site has formed. None where the round must take updates again, since a site that had given
        its own has been started anew. QuorumError where there can be no mean. Called without the lock."""
        run = self._run
        with run.lock:
            while True:
                run.wait_until(self._settled, run.settings.rejoin_s)
                if self._taken_up_again():
                    return None
                handover = run.handover = self._begin()
                run.events.emit("aggregator", handover.round, handover.aggregator, sites=list(handover.sites))
                run.published.notify_all()
                try:
                    run.wait_until(lambda now=handover: now.over(run), run.settings.deadline_s)  # type: ignore[misc]
                finally:
                    run.handover = None
                if handover.model is not None:
                    return handover.model
                self._failed(handover)

    def _settled(self) -> bool:
        """Whether the sites are there, or gone for good: one whose connection is broken has its time to come back."""
        members = [self._run.members[name] for name in self._current.accepted]
        return all(member.attending or member.gone for member in members)

    def _taken_up_again(self) -> bool:
        """A site that was killed after its receipt, and is back, has nothing to share: it trains the round again."""
        run, current = self._run, self._current
        anew = [
            name
            for name, accepted in current.accepted.items()
            if not run.members[name].gone and run.members[name].attempt != accepted.update.attempt
        ]
        for name in anew:
            run.leave_out(current, name)
        if anew:
            current.closing = False
            run.published.notify_all()
        return bool(anew)

    def _begin(self) -> Handover:
        run, current = self._run, self._current
        for name in [name for name in current.accepted if not self._is_there(name)]:
            run.leave_out(current, name)
        sites = tuple(name for name in run.members if name in current.accepted)
        able = [name for name in sites if self._failed_to_form[name] < _TRIES]
        needed = max(run.settings.min_sites, 2)
        if len(sites) < needed or not able:
            reasons = [f"{m.name}: {m.gone}" for m in run.members.values() if m.gone]
            raise QuorumError(
                f"round {current.round} has the updates of {len(sites)} of at least {needed} sites, and "
                f"{len(able)} of them could form the mean",
                where="; ".join(reasons),
                fix="look at the logs of these sites; under swarm every site must reach the server's relay",
            )
        turns = in_turn(list(run.members), current.round, run.settings.seed or 0)
        aggregator = min(able, key=lambda name: (self._failed_to_form[name], turns.index(name)))
        order = {
            "strategy": run.strategy.spec,
            "sites": [
                [name, current.accepted[name].update.num_examples, run.settings.site_weights.get(name, 1.0)]
                for name in sites
            ],
        }
        stage = f"{_PREFIX}{current.round}-{secrets.token_hex(8)}"
        return Handover(stage, current.round, aggregator, run.members[aggregator].attempt, sites, order)

    def _is_there(self, name: str) -> bool:
        """Whether a site, whose process is the one that has given the receipt, can still share its update."""
        return not self._run.members[name].gone and self._failed_to_come[name] < _TRIES

    def _failed(self, handover: Handover) -> None:
        self._failed_to_form[handover.aggregator] += 1
        if handover.missing in handover.sites:
            self._failed_to_come[handover.missing] += 1
