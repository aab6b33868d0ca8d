"""Virtual sites: no process of a site calls the server; it gives each site's task to one of a few workers.

Journal, sampling, strategies, sums, events and results are those of every run. Two things differ. An update is summed
as soon as the fixed order of the sites allows, and it is neither spooled nor journaled, since no site has been told
that it is safe. And a server that is killed in a round does that round again, from the same model and with the same
seeds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fl_runtime.errors import ConfigError, FederationError, StateMismatchError
from fl_runtime.filters import place_filter
from fl_runtime.server.courses.base import Offer, Status, Upload
from fl_runtime.server.courses.initial import InitialModel
from fl_runtime.server.courses.rounds import Rounds
from fl_runtime.server.courses.scoring import Scoring
from fl_runtime.server.courses.sums.failures import SumFailedError, checked_digests
from fl_runtime.server.courses.sums.summing import Summing
from fl_runtime.server.courses.sums.suspects import Suspects
from fl_runtime.server.courses.workers import Done, Failed, Order, Workers
from fl_runtime.server.membership import Membership
from fl_runtime.server.registration import Member, Registration, check_capabilities
from fl_runtime.server.state import Accepted, OpenRound, RunState
from fl_runtime.server.update_checks import TensorChecks
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal_entries import RoundEntry
from fl_runtime.types import Arrays, Report, RunSettings, Strategy, Terms, Update
from fl_runtime.wire.manifest import Manifest, differences

_BEAT_S = 0.2  # how often to check whether the run was aborted
_NOT_SPOOLED = Blob("", Manifest(()), np.empty(0, np.uint8))


def check_settings(settings: RunSettings, strategy: Strategy) -> None:
    """Refuse settings that need sites with a budget, a memory, or a process of their own.

    Args:
        settings: The job's settings.
        strategy: The job's strategy.

    Raises:
        ConfigError: Virtual sites cannot do what a setting asks for.
    """
    if not settings.rounds:
        raise ConfigError(
            "the job does not say how many rounds to train, and a function has no budget of its own",
            where="rounds",
            fix="give --rounds R or Job(rounds=R)",
        )
    unsupported = {
        "cross_site": settings.cross_site,
        "secure_sum": settings.secure_sum,
        "keep_local": bool(settings.keep_local),
        "optimizer_state": settings.optimizer_state not in (None, "reset"),
        f"the strategy {strategy.spec}": strategy.relayed or bool(strategy.buffer) or strategy.content != "weights",
        **{
            f"the filter {f['name']} at {at}": at != "server_in" for f in settings.filters if (at := place_filter(f).at)
        },
    }
    for what, is_set in unsupported.items():
        if is_set:
            raise ConfigError(
                f"{what} needs sites with a process and a memory of their own, which virtual sites do not have",
                where="engine",
                fix="leave it out of the job, or leave engine out and run a script at every site",
            )


@dataclass(frozen=True)
class VirtualSites:
    """Sites without processes of their own, to be given to a `Server`.

    Attributes:
        initial: The initial model, if the journal holds none. All updates must have its tensors.
        workers: The processes that carry out the sites' work.
    """

    initial: Arrays
    workers: Workers


class Virtual:
    """Rounds whose participants are orders to workers. No site calls the server. A `Course`."""

    def __init__(
        self,
        state: RunState,
        membership: Membership,
        scoring: Scoring,
        initial: InitialModel,
        sites: VirtualSites,
    ) -> None:
        self._state, self._membership, self._scoring, self._initial = state, membership, scoring, initial
        self._sites = sites
        self._rounds, self._suspects = Rounds(state, membership, scoring), Suspects(state, membership)
        self.checks = TensorChecks(state, membership)

    def offer(self, member: Member, done: str) -> Offer | None:
        return None

    def admit(self, site: str, attempt: int, round: int, stage: str) -> Status | None:
        return "late"

    def accept(self, upload: Upload) -> Status:
        """Never called, since no update is admitted."""
        raise NotImplementedError

    def task_sent(self, site: str, round: int, nbytes: int) -> None:
        """Do nothing: orders are counted where they are given."""

    def drive(self) -> None:
        state, manifest = self._state, Manifest.of(self._sites.initial)
        with state.lock:
            self._register(manifest)
            if state.models.newest is None:
                blob = state.blobs.create("model-0", manifest)
                for name, target in blob.views()[0].items():
                    target[...] = self._sites.initial[name]
                self._initial.commit(blob)
        assert state.models.newest is not None
        lines = differences(manifest, state.models.newest.blob.manifest)
        if lines:
            raise StateMismatchError(
                "the initial weights are not those that the run began with: " + "; ".join(lines[:8]),
                fix="continue the run with the function and initial weights that it began with",
            )
        assert state.plan.rounds is not None
        while state.models.version < state.plan.rounds:  # patience may end the run earlier
            self._round(state.models.version + 1)

    def recover(self, unfinished: Sequence[RoundEntry]) -> set[str]:
        return self._rounds.recover(unfinished)

    def _register(self, manifest: Manifest) -> None:
        """Register every site, in place of a handshake: all of them are the same function."""
        state, members = self._state, self._membership.members
        registration = Registration(manifest.layout, {}, {}, frozenset(), 0, False, Terms())
        for member in members.values():
            if member.refusal is None:
                member.known, member.registration, member.gone = True, registration, ""
        state.add_layout(manifest)
        if state.plan.rounds is not None:
            return
        state.agree(Terms())
        first, strategy = next(iter(members)), state.plan.strategy
        check_capabilities({first: registration}, {f"the strategy {strategy.spec}": strategy.requires})
        assert state.settings.rounds is not None
        state.begin(state.settings.rounds, list(members), manifest)

    def _round(self, number: int) -> None:
        """One round: open, give orders, sum in fixed order, commit."""
        state, rounds = self._state, self._rounds
        with state.lock:
            current = rounds.open(number)
            summing = Summing(state, self._membership.quorum, current, streams=self._streams(number))
        collection = _Collection(state, self._membership, self._scoring, rounds, current, summing, self._sites.workers)
        try:
            collection.run()
            with state.lock:
                if self._scoring.scores.reported(number - 1):  # the updates came with scores of the previous model
                    self._scoring.settle(number - 1)
            if rounds.not_needed(current):
                summing.give_up()
                current.accepted.clear()
                rounds.drop()
                return
            blob = summing.finish()
            updates = [accepted.update for accepted in current.accepted.values()]
            digests = checked_digests(blob, summing.strategy_state, number, updates, summing.base)
        except SumFailedError as failure:
            suspects = summing.to_blame(failure)
            summing.give_up()
            if not summing.streams and not suspects:
                raise failure.error from None
            with state.lock:
                self._suspects.blame(suspects, number, failure, certain=True)
                current.accepted.clear()
                rounds.drop(again=state.journal.failures.tries(number) + 1, suspects=suspects)
            return
        except FederationError:
            summing.give_up()
            raise
        finally:
            collection.release()
        with state.lock:
            rounds.commit(current, blob, digests, summing.strategy_state)

    def _streams(self, number: int) -> bool:
        """Whether updates are released as soon as they are added: only their sum is needed.

        A round that failed is done again with all of its updates held, to find out which of them is to blame.
        """
        state = self._state
        needs_mean = state.plan.strategy.linear and not state.settings.filters
        return needs_mean and not self._membership.quorum.may_scale and not state.journal.failures.tries(number)


class _Collection:
    """One round's orders, and the sum of what comes back.

    Updates are summed in the order of the sites. A strategy that needs only their running mean has them released at
    once, so a few buffers are enough for any number of sites.
    """

    def __init__(
        self,
        state: RunState,
        membership: Membership,
        scoring: Scoring,
        rounds: Rounds,
        current: OpenRound,
        summing: Summing,
        workers: Workers,
    ) -> None:
        self._state, self._membership, self._scoring, self._rounds = state, membership, scoring, rounds
        self._current, self._summing, self._workers = current, summing, workers
        self._order = deque(current.participants)  # whose update is summed next
        self._arrived: dict[str, Done] = {}
        self._failed: set[str] = set()
        self._held: list[Done] = []
        assert state.models.newest is not None
        self._model = state.models.newest

    def run(self) -> None:
        """Return once every order has been carried out or has failed, or at the deadline if there is a quorum."""
        state, current, workers, model = self._state, self._current, self._workers, self._model
        workers.publish(state.blobs.path(model.blob), model.blob.buffer)
        pending = deque(self._orders())
        deadline = current.began + state.settings.deadline_s
        while self._order:
            if state.error is not None:
                raise state.error
            while pending and workers.room:
                order = pending.popleft()
                workers.give(order)
                self._count_order(order, model.blob.manifest.nbytes)
            left_s = deadline - self._membership.clock.now()
            if left_s <= 0:
                self._close_late()
                return
            for outcome in workers.wait(min(left_s, _BEAT_S)):
                self._take(outcome)
            self._sum()

    def release(self) -> None:
        """Give back the updates that are still held: the round is over."""
        for done in [*self._held, *self._arrived.values()]:
            self._workers.release(done)
        self._held, self._arrived = [], {}

    def _orders(self) -> list[Order]:
        current, members = self._current, self._membership.members
        return [Order(n, members[n].index, current.round, current.stage, current.config) for n in current.participants]

    def _count_order(self, order: Order, nbytes: int) -> None:
        current, site = self._current, order.site
        with self._state.lock:
            current.bytes_down[site] = current.bytes_down.get(site, 0) + nbytes
            self._state.events.emit("task_sent", current.round, site, task="train", bytes=nbytes)

    def _take(self, outcome: Done | Failed) -> None:
        site = outcome.order.site
        if isinstance(outcome, Done):
            self._arrived[site] = outcome
            return
        self._failed.add(site)
        self._membership.mark_gone(site, outcome.error.what, early=True)
        if len(self._current.participants) - len(self._failed) < max(self._state.settings.min_sites, 1):
            raise outcome.error

    def _sum(self) -> None:
        """Sum what has arrived, as far as the order of the sites allows."""
        while self._order and (self._order[0] in self._arrived or self._order[0] in self._failed):
            site = self._order.popleft()
            if site in self._arrived:
                self._add(self._arrived.pop(site))

    def _add(self, done: Done) -> None:
        state, current, site = self._state, self._current, done.order.site
        arrays, extras = self._model.blob.manifest.views(done.payload)
        update = Update(
            job=state.settings.name,
            round=current.round,
            stage=current.stage,
            site=site,
            attempt=1,
            base_version=self._model.version,
            arrays=arrays,
            extras=extras,
            num_examples=done.num_examples,
            local_steps=done.local_steps,
            metrics=done.metrics,
        )
        if done.scored is not None:
            report = Report(state.settings.name, self._model.version, site, *done.scored)
            with state.lock:
                self._scoring.report(report)
        state.plan.strategy.check(update)
        self._summing.add(Accepted(update, _NOT_SPOOLED, b""))
        if self._summing.streams:
            self._workers.release(done)
        else:
            self._held.append(done)
        size = len(done.payload)
        with state.lock:
            current.accepted[site] = Accepted(replace(update, arrays={}, extras={}), _NOT_SPOOLED, b"")
            current.bytes_up[site] = size
            down, seconds = current.bytes_down.get(site, 0), self._membership.clock.now() - current.began
            state.emit_update(update, "used", round=current.round, seconds=seconds, bytes_up=size, bytes_down=down)

    def _close_late(self) -> None:
        """Close the round at its deadline with the updates that are there, if they are enough."""
        for site in list(self._order):
            if site in self._arrived:
                self._add(self._arrived.pop(site))
        self._rounds.check_deadline(self._current)
        self._workers.drop()
