"""Runs without rounds: sites never wait, and every k updates make the next model (see aggregation/fedbuff.py).

Each site has rounds of its own: its n-th update is its round n. The buffer is journaled update by update, so what was
acknowledged counts after the server was killed, too. A model that some site has begun with is kept, on disk, until the
site has answered, since its update is taken as a difference to that model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fl_runtime.aggregation.fedbuff import difference
from fl_runtime.aggregation.metrics.pooling import weighted_means
from fl_runtime.filters.server import decoded
from fl_runtime.server.courses.reports import settle
from fl_runtime.server.members import Member
from fl_runtime.server.records.results import RoundResult
from fl_runtime.server.state import Accepted, Model, Offer, Status, leased
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal import ModelEntry, UpdateEntry
from fl_runtime.types import Array, Arrays, ServerState, Update
from fl_runtime.wire.manifest import Manifest

if TYPE_CHECKING:
    from fl_runtime.server.run import Run


@dataclass
class Buffer:
    """What has come and is not in a model yet. Used under the run's lock.

    waiting: in the order of arrival. models: older ones that are still needed, by version. began: the version that a
    site trains on; one that is not known (after a restart) may be any. since, bytes_up, bytes_down: of the model that
    is being made.
    """

    size: int
    waiting: list[Accepted] = field(default_factory=list)
    models: dict[int, Model] = field(default_factory=dict)
    began: dict[str, int] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)
    bytes_up: int = 0
    bytes_down: int = 0

    def offer(self, run: Run, member: Member) -> Offer | None:
        """The newest model at once, as long as the site has rounds of its own to do."""
        number = run.last_used.get(member.name, 0) + 1
        if not member.active or run.model is None or run.rounds is None or number > run.rounds:
            return None
        self.began[member.name] = run.model.version
        return leased("train", number, {}, run.model, member)

    def admit(self, run: Run, name: str, number: int) -> Status | None:
        if number <= run.last_used.get(name, 0):
            return "duplicate"
        return None if run.phase == "training" and number == run.last_used.get(name, 0) + 1 else "late"

    def accept(
        self, run: Run, update: Update, blob: Blob, digest: bytes, header: Mapping[str, Any], bytes_up: int
    ) -> Status:
        """Journaled, then counted. Takes over the blob, unless the model that it began with is gone."""
        known = {*self.models, run.model.version if run.model else None}
        if update.base_version not in known:
            run.blobs.free(blob)
            return "late"
        index = run.members[update.site].index
        run.blobs.rename(blob, f"update-{update.round}-{index}")
        run.blobs.settle(blob)
        run.journal.buffered(UpdateEntry(update.round, update.site, digest, blob.name, blob.manifest.layout, header))
        self.waiting.append(Accepted(update, blob, digest))
        run.last_used[update.site] = update.round
        self.bytes_up += bytes_up
        return "used"

    def finished(self, run: Run) -> bool:
        """Whether nobody has anything more to send: sites have sent their last, are gone, or have never come."""
        expected = [m for m in run.members.values() if m.attempt and not m.gone]
        return all(run.last_used.get(m.name, 0) >= (run.rounds or 0) for m in expected)

    def due(self, run: Run) -> list[Accepted]:
        """What makes the next model now: k updates, or at the end what is left."""
        if len(self.waiting) >= self.size or self.finished(run):
            return self.waiting[: self.size]
        return []

    def needed(self, run: Run) -> set[int]:
        """Versions that an update on its way, or in the buffer, may have begun with."""
        versions = {accepted.update.base_version for accepted in self.waiting}
        for member in run.members.values():
            if not member.gone and run.last_used.get(member.name, 0) < (run.rounds or 0):
                if member.name not in self.began:
                    return set(self.models)
                versions.add(self.began[member.name])
        return versions


def next_model(run: Run, buffer: Buffer, due: list[Accepted]) -> None:
    """The updates that are due become the next model."""
    with run.lock:
        assert run.model is not None
        newest, made = run.model, list[Blob]()

    def allocate(arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
        manifest = Manifest.of(arrays, extras)
        with run.lock:
            run.add_layout(manifest)
            made.append(run.blobs.create(f"model-{newest.version + 1}", manifest))
        return made[-1].views()

    base = newest.blob.views()[0]
    aggregator = run.strategy.aggregator(base, allocate, {"version": newest.version}, ServerState())
    for accepted in due:
        began = buffer.models.get(accepted.update.base_version, newest).blob.views()[0]
        weight = run.settings.site_weights.get(accepted.update.site, 1.0)
        update = decoded(accepted.update, began)
        arrays = _Differences(update.arrays, began, base)
        aggregator.add(replace(update, arrays=arrays, content="delta", site_weight=weight))
    aggregator.result()
    digests = made[0].manifest.digests_of_payload(made[0].buffer)
    with run.lock:
        _commit(run, buffer, due, made[0], digests)


def _commit(run: Run, buffer: Buffer, due: list[Accepted], blob: Blob, digests: bytes) -> None:
    previous = run.model
    assert previous is not None
    number = previous.version + 1
    updates = sorted((a.update for a in due), key=lambda u: (u.site, u.round))
    metrics = weighted_means((u.metrics, u.num_examples) for u in updates)
    senders = {u.site for u in updates}
    names = tuple(name for name in run.members if name in senders)
    result = RoundResult(
        round=number,
        seconds=time.monotonic() - buffer.since,
        metrics=metrics,
        sites=names,
        missing=(),
        bytes_up=buffer.bytes_up,
        bytes_down=buffer.bytes_down,
    )
    left = buffer.waiting[len(due) :]
    entry = ModelEntry(number, blob.name, blob.manifest.layout, digests)
    run.blobs.settle(blob)
    run.journal.round_opened(number, names, time.time())
    run.journal.committed(entry, number, result.to_json(), buffered=[(a.update.site, a.update.round) for a in left])
    run.model, buffer.waiting, buffer.since = Model(entry, blob), left, time.monotonic()
    buffer.bytes_up = buffer.bytes_down = 0
    run.results.append(result)
    run.scores.trained(number, metrics)
    told = {k: v for k, v in result.to_json().items() if k != "round"}
    told |= {"num_examples": sum(u.num_examples for u in updates), "local_steps": sum(u.local_steps for u in updates)}
    run.events.emit("round_finished", number, buffered=True, **told)
    run.published.notify_all()
    for accepted in due:
        run.blobs.free(accepted.blob)
    buffer.models[previous.version] = previous
    _forget(run, buffer, previous)


def _forget(run: Run, buffer: Buffer, previous: Model) -> None:
    """Models that no update can begin with any more are recycled, but for the best."""
    settle(run, previous.version)
    if previous.version > 0 and run.scores.better(previous.version, run.best.version if run.best else None):
        run.best = previous
    needed = buffer.needed(run) | ({run.best.version} if run.best else set())
    for version in [version for version in buffer.models if version not in needed]:
        run.retire(buffer.models.pop(version))


class _Differences(Mapping[str, Array]):
    """D_i of every tensor, made when it is asked for; of one that the site has held back, as if it had not changed."""

    def __init__(self, arrays: Arrays, began: Arrays, newest: Arrays) -> None:
        self._arrays, self._began, self._newest = arrays, began, newest

    def __getitem__(self, name: str) -> Array:
        began = self._began[name]
        return difference(name, self._arrays.get(name, began), began, self._newest[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._began)

    def __len__(self) -> int:
        return len(self._began)
