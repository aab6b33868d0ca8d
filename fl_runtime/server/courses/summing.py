"""The sum of a round's updates, computed while they arrive, in an order that does not depend on their arrival."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fl_runtime.errors import RoundFailedError, UpdateRefusedError
from fl_runtime.filters.server import decoded
from fl_runtime.server.broadcast import held_arrays, without_held
from fl_runtime.server.quorum import Quorum
from fl_runtime.server.state import Accepted, OpenRound, RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.types import Aggregator, Arrays, ServerState, Update, is_floating
from fl_runtime.wire.finite import inspect
from fl_runtime.wire.manifest import Manifest


class Summing:
    """Sums updates in the order of the job's sites, each as soon as it and all before it are there. A `RoundSum`.

    If a cap on shares may hold, updates are summed at the end: each weight depends on all of them.
    """

    def __init__(self, state: RunState, quorum: Quorum, current: OpenRound) -> None:
        self._state, self._quorum, self._current = state, quorum, current
        self._blob: Blob | None = None
        self.strategy_state: Blob | None = None
        self._waiting: list[Update] = []  # for the weights of all
        self._aggregator: Aggregator | None = None
        self._begin()

    def _begin(self) -> None:
        self._order, self._added, self._waiting = list(self._state.settings.sites), 0, []
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
        self._added += 1
        weight = self._state.settings.site_weights.get(accepted.update.site, 1.0)
        update = replace(accepted.update, site_weight=weight)
        if self._aggregator is None:
            self._waiting.append(update)
        else:
            self._aggregator.add(update)

    def finish(self) -> Blob:
        """Add the updates that are left, and complete the sum."""
        accepted = self._current.accepted
        if self._added + len(self._remaining()) < len(accepted):
            self._begin()  # a site came back to the round after its place in the order had been passed: sum again
        if self._aggregator is not None and self._quorum.max_share(accepted) is not None:
            self._begin()  # a site whose policy has a cap came after the sum had begun
        for item in self._remaining():
            self.add(item)
        if self._aggregator is None:
            self._aggregator = self._make_aggregator(self._quorum.max_share([u.site for u in self._waiting]))
            for update in self._quorum.within_share(self._waiting):
                self._aggregator.add(update)
        self._aggregator.result()
        if self.strategy_state is None and held_arrays(self._state):
            self._allocate_state({})
        assert self._blob is not None
        self._keep_withheld(self._blob)
        return self._blob

    def give_up(self) -> None:
        with self._state.lock:
            for blob in filter(None, (self._blob, self.strategy_state)):
                self._state.blobs.free(blob)

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


def checked_digests(blob: Blob, strategy_state: Blob | None, round: int, updates: Iterable[Update]) -> bytes:
    """Check a finished sum before it is committed, and compute the digests of its tensors in the same pass.

    Args:
        blob: The next global model.
        strategy_state: What the strategy keeps beside it, or None.
        round: Number of the round.
        updates: The updates that were summed.

    Returns:
        The digests, in the order of the manifest.

    Raises:
        RoundFailedError: A value is not finite, as when updates are finite but their sum overflows. The message names
            the sites whose updates have the largest norms.
    """
    try:
        for part in filter(None, (blob, strategy_state)):
            arrays, extras = part.views()
            inspected = inspect(arrays, extras, f"round {round}")
            if part is blob:
                found = inspected
    except UpdateRefusedError as error:
        raise RoundFailedError(
            f"the new global model is not finite: {error.what}; the largest updates came from {_largest(updates)}",
            where=f"round {round}",
            fix="look at the logs of these sites; lower their learning rate, or leave them out with min_sites",
        ) from None
    specs = blob.manifest.tensors
    return b"".join(found.tensors[spec.extra, spec.name][1] for spec in specs)


def _largest(updates: Iterable[Update]) -> str:
    """The three sites whose updates have the largest norms, with these norms."""
    norms = {update.site: _norm(update) for update in updates}
    largest = sorted(norms, key=lambda site: (-norms[site], site))[:3]
    return ", ".join(f"{site} (norm {norms[site]:.3g})" for site in largest)


def _norm(update: Update) -> float:
    with np.errstate(all="ignore"):
        floating = [array for array in update.arrays.values() if is_floating(array.dtype)]
        return math.sqrt(sum(float(np.sum(np.square(array.astype(np.float64)))) for array in floating))
