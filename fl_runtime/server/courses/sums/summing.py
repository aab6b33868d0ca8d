"""The sum of a round's updates, computed while they arrive, in an order that does not depend on their arrival."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fl_runtime.errors import FederationError, HandshakeError, RoundFailedError, StoreError
from fl_runtime.filters.server import decoded
from fl_runtime.server.broadcast import held_arrays, without_held
from fl_runtime.server.calls import limits
from fl_runtime.server.courses.sums.failures import SumFailedError, combining, is_usable, norms_of, sites_to_blame
from fl_runtime.server.quorum import Quorum
from fl_runtime.server.state import Accepted, OpenRound, RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.types import Aggregator, Arrays, ServerState, Update
from fl_runtime.wire.manifest import Manifest


class Summing:
    """Sums updates in the order of the job's sites, each as soon as it and all before it are there. A `RoundSum`.

    If a cap on shares may hold, updates are summed at the end: each weight depends on all of them.

    Attributes:
        streams: Whether the tensors of an update are gone once it is added.
    """

    def __init__(self, state: RunState, quorum: Quorum, current: OpenRound, *, streams: bool = False) -> None:
        """Begin the sum of a round.

        Args:
            state: The run's state.
            quorum: What the sum must be made of.
            current: The round.
            streams: Whether the tensors of an update are gone once it is added. Then nobody can be blamed.
        """
        self._state, self._quorum, self._current, self.streams = state, quorum, current, streams
        self.base = state.models.newest
        self._blob: Blob | None = None
        self.strategy_state: Blob | None = None
        self._updates: list[Update] = []  # in the order of the sum
        self._aggregator: Aggregator | None = None
        self._failure: SumFailedError | None = None
        self._begin()

    def _begin(self) -> None:
        self._order, self._updates, self._failure = list(self._state.settings.sites), [], None
        self._aggregator = None if self._quorum.may_scale else self._make_aggregator(None)

    def _make_aggregator(self, max_share: float | None) -> Aggregator:
        state, config = self._state, self._current.config
        model, strategy = state.models.newest, state.plan.strategy
        base, extras = model.blob.views() if model else ({}, {})
        previous = without_held(model.strategy_state.views()[0]) if model and model.strategy_state else {}
        held = state.models.held.blob.views()[0] if state.models.held else None
        server_state = ServerState(extras, previous, self._allocate_state, state.settings.sites, max_share)
        return state.filters.aggregator(
            lambda allocate: strategy.aggregator(base, allocate, config, server_state),
            base,
            self._allocate,
            linear=strategy.linear,
            partial=strategy.partial and max_share is None,
            held=held,
        )

    def next_in_order(self) -> Accepted | None:
        """The update that can be summed now. A participant whose update has not come holds back those after it."""
        current = self._current
        while self._order and self._order[0] not in current.participants and self._order[0] not in current.accepted:
            self._order.pop(0)
        return current.accepted.get(self._order[0]) if self._order else None

    def add(self, accepted: Accepted) -> None:
        self._order.remove(accepted.update.site)
        weight = self._state.settings.site_weights.get(accepted.update.site, 1.0)
        update = replace(accepted.update, site_weight=weight)
        self._updates.append(replace(update, arrays={}, extras={}) if self.streams else update)
        if self._aggregator is None or self._failure is not None:
            return
        try:
            with combining(self._current.round):
                if not self.streams:
                    limits.check_same_extras(update, self._updates[0])
                self._aggregator.add(update)
        except SumFailedError as failure:
            self._failure = failure  # it is raised at the end: who is to blame is told by all updates

    def finish(self) -> Blob:
        """Add the updates that are left, and complete the sum."""
        accepted = self._current.accepted
        if len(self._updates) + len(self._remaining()) < len(accepted):
            self._begin()  # a site came back to the round after its place in the order had been passed: sum again
        if self._aggregator is not None and self._quorum.max_share(accepted) is not None:
            self._begin()  # a site whose policy has a cap came after the sum had begun
        for item in self._remaining():
            self.add(item)
        if self._failure is not None:
            raise self._failure
        if self._aggregator is None:
            self._sum(self._updates)
        else:
            with combining(self._current.round):
                self._aggregator.result()
        if self.strategy_state is None and held_arrays(self._state):
            self._allocate_state({})
        assert self._blob is not None
        self._keep_withheld(self._blob)
        return self._blob

    def finish_with(self, *updates: Update) -> Blob:
        """Complete the sum of a round whose updates have been summed elsewhere.

        Args:
            updates: What stands for them: their weighted mean, as one update with all of their examples, or updates
                with the same sum.

        Returns:
            The next global model.
        """
        with combining(self._current.round):
            self._aggregator = self._make_aggregator(None)
            for update in updates:
                self._aggregator.add(update)
            self._aggregator.result()
        assert self._blob is not None
        return self._blob

    def give_up(self) -> None:
        with self._state.lock:
            for blob in filter(None, (self._blob, self.strategy_state)):
                self._state.blobs.free(blob)
        self._blob = self.strategy_state = None

    def to_blame(self, failure: SumFailedError) -> list[str]:
        if self.streams or self._state.filters.counts_equally:  # a filter clips, and each sum costs privacy budget
            return []
        if isinstance(failure.error, HandshakeError):  # the sites disagree, and nobody knows which of them are right
            return []
        found = sites_to_blame(norms_of(self._updates), self._works_without, infinite=failure.infinite)
        self.give_up()
        return found

    def _works_without(self, sites: Collection[str]) -> bool:
        """Sum the updates of the others, and return whether they make a model."""
        self.give_up()
        try:
            self._sum([update for update in self._updates if update.site not in sites])
        except StoreError:
            raise
        except FederationError:
            return False
        return self._blob is not None and is_usable(self._blob, self.strategy_state, self.base)

    def _sum(self, updates: list[Update]) -> None:
        """Sum updates, within the cap on shares."""
        with combining(self._current.round):
            self._aggregator = self._make_aggregator(self._quorum.max_share([update.site for update in updates]))
            for update in self._quorum.within_share(updates):
                limits.check_same_extras(update, updates[0])
                self._aggregator.add(update)
            self._aggregator.result()

    def _keep_withheld(self, blob: Blob) -> None:
        """Give tensors their global value that come from fewer sites than the policies of these ask for."""
        state, accepted, model = self._state, self._current.accepted, self._state.models.newest
        if model is None or state.filters.encrypted is not None or self._quorum.needed(accepted) == 1:
            return
        base, held = model.blob.views()[0], state.models.held.blob.views()[0] if state.models.held else None
        senders = {name: list(decoded(item.update, base, held).arrays) for name, item in accepted.items()}
        with state.lock:
            withheld = self._quorum.withheld(senders, self._current.round)
        if withheld and self.strategy_state is not None:
            raise RoundFailedError(
                f"{withheld[0]} comes from fewer sites than their policies ask for, and the strategy "
                f"{state.plan.strategy.spec} would carry it into later models",
                fix="let more sites send it, keep it at every site with keep_local, or choose another strategy",
            )
        for name in withheld:
            blob.views()[0][name][...] = base[name]

    def _remaining(self) -> list[Accepted]:
        return [self._current.accepted[name] for name in self._order if name in self._current.accepted]

    def _allocate(self, arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
        manifest = Manifest.of(arrays, extras)
        with self._state.lock:
            if self._blob is not None:
                self._state.blobs.free(self._blob)
            self._state.add_layout(manifest)
            self._blob = self._state.blobs.create(f"model-{self._current.round}", manifest)
        return self._blob.views()

    def _allocate_state(self, arrays: Arrays) -> Arrays:
        held = held_arrays(self._state)
        manifest = Manifest.of({**arrays, **held})
        with self._state.lock:
            if self.strategy_state is not None:
                self._state.blobs.free(self.strategy_state)
            self._state.journal.layout(manifest)
            self.strategy_state = self._state.blobs.create(f"kept-{self._current.round}", manifest)
        views = self.strategy_state.views()[0]
        for name, array in held.items():
            views[name][...] = array
        return {name: views[name] for name in arrays}
