"""The sum of a round's updates, computed while they arrive, in an order that does not depend on their arrival."""

from __future__ import annotations

from dataclasses import replace

from fl_runtime.server.broadcast import held_arrays, without_held
from fl_runtime.server.state import Accepted, OpenRound, RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.types import Arrays, ServerState
from fl_runtime.wire.manifest import Manifest


class Summing:
    """Sums updates in the order of the job's sites, each as soon as it and all before it are there. A `RoundSum`."""

    def __init__(self, state: RunState, current: OpenRound) -> None:
        self._state, self._current = state, current
        self._blob: Blob | None = None
        self.strategy_state: Blob | None = None
        self._begin()

    def _begin(self) -> None:
        state, config = self._state, self._current.config
        self._order, self._added = list(state.settings.sites), 0
        model, strategy = state.models.newest, state.plan.strategy
        base, extras = model.blob.views() if model else ({}, {})
        previous = without_held(model.strategy_state.views()[0]) if model and model.strategy_state else {}
        held = state.models.held.blob.views()[0] if state.models.held else None
        server_state = ServerState(extras, previous, self._allocate_state, state.settings.sites)
        self._aggregator = state.filters.aggregator(
            lambda allocate: strategy.aggregator(base, allocate, config, server_state),
            base,
            self._allocate,
            linear=strategy.linear,
            partial=strategy.partial,
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
        self._added += 1
        weight = self._state.settings.site_weights.get(accepted.update.site, 1.0)
        self._aggregator.add(replace(accepted.update, site_weight=weight))

    def finish(self) -> Blob:
        """Add the updates that are left, and complete the sum."""
        if self._added + len(self._remaining()) < len(self._current.accepted):
            self._begin()  # a site came back to the round after its place in the order had been passed: sum again
        for accepted in self._remaining():
            self.add(accepted)
        self._aggregator.result()
        if self.strategy_state is None and held_arrays(self._state):
            self._allocate_state({})
        assert self._blob is not None
        return self._blob

    def give_up(self) -> None:
        with self._state.lock:
            for blob in filter(None, (self._blob, self.strategy_state)):
                self._state.blobs.free(blob)

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
