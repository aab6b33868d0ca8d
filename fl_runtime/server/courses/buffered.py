"""Buffered runs: sites never wait, and every k updates make the next model (see aggregation/fedbuff.py).

Each site has rounds of its own: its n-th update is its round n. The buffer is journaled update by update, so that what
was acknowledged also counts after the server was killed. A model that some site has begun with is kept on disk until
the site has answered, because its update is taken as a difference to that model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from fl_runtime.aggregation.fedbuff import difference
from fl_runtime.errors import RoundFailedError
from fl_runtime.filters.server import decoded
from fl_runtime.server.courses.base import Offer, Status, Upload, leased, made_of
from fl_runtime.server.courses.initial import InitialModel
from fl_runtime.server.courses.rounds import event_fields, leave_unmet
from fl_runtime.server.courses.scoring import Scoring
from fl_runtime.server.courses.sums.failures import (
    SumFailedError,
    checked_digests,
    combining,
    is_usable,
    norms_of,
    sites_to_blame,
)
from fl_runtime.server.courses.sums.same_data import hint_at_same_data
from fl_runtime.server.courses.sums.suspects import Suspects
from fl_runtime.server.membership import Membership
from fl_runtime.server.models import Model
from fl_runtime.server.records.results import RoundResult
from fl_runtime.server.recovery import load_model, load_update
from fl_runtime.server.registration import Member
from fl_runtime.server.state import Accepted, RunState
from fl_runtime.server.update_checks import TensorChecks
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal_entries import ModelEntry, RoundEntry, UpdateEntry
from fl_runtime.types import Array, Arrays, ServerState
from fl_runtime.wire.manifest import Manifest

log = logging.getLogger(__name__)


class Buffered:
    """A run without rounds: every `size` updates make the next model. A `Course`."""

    def __init__(
        self, state: RunState, membership: Membership, scoring: Scoring, initial: InitialModel, size: int
    ) -> None:
        self._state, self._membership, self._scoring = state, membership, scoring
        self._initial, self._size = initial, size
        self._suspects = Suspects(state, membership)
        self.checks = TensorChecks(state, membership)
        self._waiting: list[Accepted] = []  # updates that are not in a model yet, in the order of arrival
        self._models: dict[int, Model] = {}  # older models that are still needed, by version
        self._base_versions: dict[str, int] = {}  # version that each site trains from; unknown after a restart
        self._last_used: dict[str, int] = {}
        self._since = membership.clock.now()  # when the model in the making was begun; the bytes are counted since then
        self._bytes_up = self._bytes_down = 0

    def offer(self, member: Member, done: str) -> Offer | None:
        """The newest model, as long as the site has rounds of its own left."""
        state, number = self._state, self._last_used.get(member.name, 0) + 1
        newest, rounds = state.models.newest, state.plan.rounds
        if newest is None or rounds is None or number > rounds or self._membership.outages.lost:
            return None
        if any(a.update.site == member.name for a in self._waiting) and self._waits_for_others():
            return None
        self._base_versions[member.name] = newest.version
        return leased("train", number, made_of(state, newest.version), newest, member)

    def admit(self, site: str, attempt: int, round: int, stage: str) -> Status | None:
        last = self._last_used.get(site, 0)
        if round <= last:
            return "duplicate"
        return None if self._state.phase == "training" and round == last + 1 else "late"

    def accept(self, upload: Upload) -> Status:
        """Count an update, unless the model that it began with is gone."""
        state, update, blob = self._state, upload.update, upload.blob
        if update.base_version in {*self._models, state.models.version}:
            index = self._membership.members[update.site].index
            state.blobs.rename(blob, f"update-{update.round}-{index}")
            state.blobs.settle(blob)
            layout = blob.manifest.layout
            entry = UpdateEntry(update.round, update.site, upload.digest, blob.name, layout, upload.header)
            state.journal.buffered(entry)
            self._waiting.append(Accepted(update, blob, upload.digest))
            self._last_used[update.site] = update.round
            self._bytes_up += upload.bytes_up
            status: Status = "used"
        else:
            state.blobs.free(blob)
            status = "late"
        label = status if status == "late" else "buffered"
        seconds = self._membership.clock.now() - self._since
        state.emit_update(update, label, round=update.round, seconds=seconds, bytes_up=upload.bytes_up, bytes_down=0)
        return status

    def task_sent(self, site: str, round: int, nbytes: int) -> None:
        self._bytes_down += nbytes

    def drive(self) -> None:
        """Make models of the updates that arrive, until no site has anything more to send."""
        self._initial.obtain()
        state, membership = self._state, self._membership
        with state.lock:
            self._since = membership.clock.now()
            if state.models.newest is not None and state.models.version == 0:
                state.events.emit("round_started", 1, sites=[])
            state.enter("training")

        def ready() -> bool:
            complete = membership.check_quorum(membership.joined(), "in training")
            leave_unmet(membership, membership.joined() if complete else [], "this run")
            return complete and not membership.outages.lost and (bool(self._due()) or self._finished())

        while True:
            with state.lock:
                in_time = membership.wait_until(ready, state.settings.deadline_s)
                due = self._due() or ([] if in_time else self._complete(self._size))
                if not due:
                    self._report_unused()
                    return  # all sites are done, or no update has come for so long that the run does not wait any more
            try:
                self._next_model(due)
            except SumFailedError as failure:
                self._leave_out(due, failure)

    def recover(self, unfinished: Sequence[RoundEntry]) -> set[str]:
        state, models = self._state, self._state.models
        self._last_used = state.journal.reader.last_used()
        rules = self._membership.quorum.rules  # a site that was expelled has none
        buffer = [entry for entry in state.journal.reader.buffer() if entry.site in rules]
        self._waiting = [load_update(state, entry) for entry in buffer]
        self._models = {entry.version: load_model(state, entry) for entry in state.journal.reader.models()[:-1]}
        for version, model in self._models.items():
            if version > 0 and self._scoring.better(version, models.best_version):
                models.best = model
        return {m.blob.name for m in self._models.values()} | {a.blob.name for a in self._waiting}

    def _finished(self) -> bool:
        """Whether no site has anything more to send: each has sent its last update, is gone, or has never joined."""
        rounds = self._state.plan.rounds or 0
        return all(self._last_used.get(name, 0) >= rounds for name in self._membership.joined())

    def _due(self) -> list[Accepted]:
        """The updates that make the next model now: a full buffer or, at the end, what is left."""
        full = self._complete(self._size)
        return full if len(full) >= self._size or self._finished() else []

    def _complete(self, size: int) -> list[Accepted]:
        """The first updates that make a model: `size` of them, or more until they come from enough sites.

        If there are fewer than `size` in all, these. None if the sites' policies ask for more sites than they are from.
        """
        members, quorum = self._membership.members, self._membership.quorum
        able = [accepted for accepted in self._waiting if members[accepted.update.site].refusal is None]
        for count in range(min(size, len(able)), len(able) + 1):
            sites = list(dict.fromkeys(accepted.update.site for accepted in able[:count]))
            if not quorum.unmet(sites, "this run"):
                return able[:count]
        return []

    def _waits_for_others(self) -> bool:
        """Whether the buffer is full, but needs the updates of further sites, some of which will still send any."""
        senders, rounds = {accepted.update.site for accepted in self._waiting}, self._state.plan.rounds or 0
        others = [name for name in self._membership.joined() if name not in senders]
        coming = any(self._last_used.get(name, 0) < rounds for name in others)
        return coming and len(self._waiting) >= self._size and not self._complete(self._size)

    def _report_unused(self) -> None:
        """Say whose updates are in no model, because too few sites sent the last ones."""
        unused = {accepted.update.site for accepted in self._waiting}
        if unused:
            names = ", ".join(name for name in self._membership.members if name in unused)
            text = f"the last {len(self._waiting)} updates ({names}) are in no model: too few sites sent them"
            self._state.events.emit("warning", self._state.models.version, text=f"{text} for the sites' policies")

    def _next_model(self, due: Sequence[Accepted]) -> None:
        """Make the next model of the updates that are due."""
        state, quorum = self._state, self._membership.quorum
        with state.lock:
            newest = state.models.newest
            assert newest is not None
        blob = self._sum(due, newest)
        try:
            with state.lock:
                for name in quorum.withheld(self._senders(due, newest), newest.version + 1):
                    blob.views()[0][name][...] = newest.blob.views()[0][name]
            updates = (accepted.update for accepted in due)
            digests = checked_digests(blob, None, newest.version + 1, updates, newest)
        except SumFailedError:
            self._free([blob])
            raise
        with state.lock:
            self._commit(newest, due, blob, digests)

    def _sum(self, due: Sequence[Accepted], newest: Model) -> Blob:
        """Sum updates in a new file. Raises SumFailedError if they cannot be combined."""
        state, blobs = self._state, list[Blob]()

        def allocate(arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
            manifest = Manifest.of(arrays, extras)
            with state.lock:
                state.add_layout(manifest)
                blobs.append(state.blobs.create(f"model-{newest.version + 1}", manifest))
            return blobs[-1].views()

        base, quorum, factors = newest.blob.views()[0], self._membership.quorum, state.settings.site_weights
        aggregator = state.plan.strategy.aggregator(base, allocate, {"version": newest.version}, ServerState())
        whole = quorum.max_share([accepted.update.site for accepted in due]) is not None
        weighted = [replace(a.update, site_weight=factors.get(a.update.site, 1.0)) for a in due]
        try:
            with combining(newest.version + 1):
                for update in quorum.within_share(weighted):
                    start = self._models.get(update.base_version, newest).blob.views()[0]
                    update = decoded(update, start)
                    arrays = _Differences(update.arrays, start, base, whole=whole)
                    aggregator.add(replace(update, arrays=arrays, content="delta"))
                aggregator.result()
        except SumFailedError:
            self._free(blobs)
            raise
        return blobs[0]

    def _free(self, blobs: Sequence[Blob]) -> None:
        with self._state.lock:
            for blob in blobs:
                self._state.blobs.free(blob)

    def _leave_out(self, due: Sequence[Accepted], failure: SumFailedError) -> None:
        """Take the updates out of the buffer that are to blame for a failure. Raises the error if none is."""
        state = self._state
        with state.lock:
            newest = state.models.newest
            assert newest is not None

        def works_without(sites: Collection[str]) -> bool:
            try:
                blob = self._sum([accepted for accepted in due if accepted.update.site not in sites], newest)
            except RoundFailedError:
                return False
            usable = is_usable(blob, None, newest)
            self._free([blob])
            return usable

        log.warning("version %s failed: %s", newest.version + 1, failure.what)
        norms = norms_of(accepted.update for accepted in due)
        suspects = sites_to_blame(norms, works_without, infinite=failure.infinite) if len(norms) > 1 else list(norms)
        if not suspects:
            raise failure.error
        with state.lock:
            self._suspects.blame(suspects, newest.version + 1, failure)
            state.journal.failures.buffer_failed(newest.version + 1, suspects)
            unwanted = [accepted for accepted in self._waiting if accepted.update.site in suspects]
            self._waiting = [accepted for accepted in self._waiting if accepted.update.site not in suspects]
            self._free([accepted.blob for accepted in unwanted])

    def _senders(self, due: Sequence[Accepted], newest: Model) -> dict[str, set[str]]:
        """Names of the tensors that each site has sent for the next model."""
        senders: dict[str, set[str]] = {}
        for update in (accepted.update for accepted in due):
            start = self._models.get(update.base_version, newest).blob.views()[0]
            senders.setdefault(update.site, set()).update(decoded(update, start).arrays)
        return senders

    def _commit(self, previous: Model, due: Sequence[Accepted], blob: Blob, digests: bytes) -> None:
        state, number = self._state, previous.version + 1
        updates = sorted((a.update for a in due), key=lambda u: (u.site, u.round))
        metrics = self._membership.quorum.shown.of_updates(updates)
        result = self._result(number, {u.site for u in updates}, metrics)
        remaining = [accepted for accepted in self._waiting if not any(accepted is item for item in due)]
        entry = ModelEntry(number, blob.name, blob.manifest.layout, digests)
        state.blobs.settle(blob)
        state.journal.round_opened(number, result.sites, time.time())
        still_buffered = [(a.update.site, a.update.round) for a in remaining]
        state.journal.committed(entry, number, result.to_json(), buffered=still_buffered)
        state.models.newest, self._waiting, self._since = Model(entry, blob), remaining, self._membership.clock.now()
        self._bytes_up = self._bytes_down = 0
        state.results.append(result)
        self._scoring.scores.record_training(number, result.metrics)
        state.events.emit(
            "round_finished",
            number,
            buffered=True,
            **event_fields(result),
            num_examples=sum(u.num_examples for u in updates),
            local_steps=sum(u.local_steps for u in updates),
        )
        if number == 1:
            hint_at_same_data(state, due, self._membership.quorum.shown)
        state.published.notify_all()
        for accepted in due:
            state.blobs.free(accepted.blob)
        self._models[previous.version] = previous
        self._forget(previous)

    def _result(self, number: int, senders: set[str], metrics: Mapping[str, float]) -> RoundResult:
        return RoundResult(
            round=number,
            seconds=self._membership.clock.now() - self._since,
            metrics=metrics,
            sites=tuple(name for name in self._membership.members if name in senders),
            missing=(),
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
        )

    def _forget(self, previous: Model) -> None:
        """Recycle the models that no update can begin with any more, but for the best."""
        models = self._state.models
        self._scoring.settle(previous.version)
        if previous.version > 0 and self._scoring.better(previous.version, models.best_version):
            models.best = previous
        needed = self._needed() | ({models.best.version} if models.best else set())
        for version in [version for version in self._models if version not in needed]:
            models.retire(self._models.pop(version))

    def _needed(self) -> set[int]:
        """Versions that an update on its way, or in the buffer, may have begun with."""
        rounds = self._state.plan.rounds or 0
        versions = {accepted.update.base_version for accepted in self._waiting}
        for name in self._membership.remaining():
            if self._last_used.get(name, 0) < rounds:
                if name not in self._base_versions:
                    return set(self._models)
                versions.add(self._base_versions[name])
        return versions


class _Differences(Mapping[str, Array]):
    """Each tensor's difference to the model that the site began with, computed when it is asked for.

    With `whole`, a tensor that the site held back is there without a change; otherwise it is missing.
    """

    def __init__(self, arrays: Arrays, start: Arrays, newest: Arrays, *, whole: bool) -> None:
        self._arrays, self._start, self._newest = arrays, start, newest
        self._names = newest if whole else arrays

    def __getitem__(self, name: str) -> Array:
        start, newest = self._start[name], self._newest[name]
        if name in self._arrays:
            return difference(name, self._arrays[name], start, newest)
        if name not in self._names:
            raise KeyError(name)
        return difference(name, newest, newest, newest)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
