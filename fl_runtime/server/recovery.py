"""Bringing a run back from its journal after the server was killed."""

from __future__ import annotations

import time

from google.protobuf.message import DecodeError

from fl_runtime.aggregation.metrics.pooling import from_json
from fl_runtime.errors import ProtocolError, StoreError
from fl_runtime.server.courses.sampling import opened
from fl_runtime.server.members import Registration
from fl_runtime.server.records.results import RoundResult
from fl_runtime.server.run import Run
from fl_runtime.server.state import Accepted, Model, stage_of
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal import RESTORE, ModelEntry, UpdateEntry
from fl_runtime.types import Update
from fl_runtime.wire import frames


def recover(run: Run) -> None:
    """Set a fresh Run to where its journal stands. A journal without entries changes nothing.

    StoreError for a journal or a blob that is not as it was written. Every byte is read again for that.
    """
    try:
        _recover(run)
    except (ValueError, KeyError, TypeError, IndexError, DecodeError, ProtocolError) as error:
        raise StoreError(f"the journal is damaged: {error!r}", where=str(run.journal.path), fix=RESTORE) from error


def _recover(run: Run) -> None:
    run.manifests.update({manifest.layout: manifest for manifest in run.journal.manifests()})  # sites count on it
    for name, attempt, registration in run.journal.sites():
        member = run.members[name]
        member.attempt = attempt
        member.absent_since = time.monotonic()
        if registration:
            member.registration, member.known = Registration.from_json(registration), True
    for name in run.journal.who_left():
        run.members[name].gone = "it left"
    run.rounds = run.journal.rounds()
    if run.rounds is not None:
        run.agree(run.journal.terms())
    run.last_used = run.journal.last_used()
    for version, site, metrics, num_examples in run.journal.scores():
        run.scores.report(version, site, from_json(metrics), num_examples)
    _models_and_rounds(run)
    keep = {m.blob.name for m in (run.model, run.best) if m}
    if run.model and run.model.kept:
        keep.add(run.model.kept.name)
    if run.open:
        keep |= {a.blob.name for a in run.open.accepted.values()}
    if run.settings.cross_site and run.model:
        for entry in run.journal.last_updates():
            if 0 < entry.round <= run.model.version:
                run.cross_site.keep(_accepted(run, entry))
                keep.add(entry.blob)
    if run.buffer is not None:
        keep |= {m.blob.name for m in run.buffer.models.values()} | {a.blob.name for a in run.buffer.waiting}
    run.blobs.sweep(keep)


def _models_and_rounds(run: Run) -> None:
    models = run.journal.models()
    if run.buffer is not None:
        run.buffer.waiting = [_accepted(run, entry) for entry in run.journal.buffer()]
        run.buffer.models = {entry.version: _model(run, entry) for entry in models[:-1]}
    for entry in run.journal.round_entries():
        if entry.result is not None:
            if entry.round == 0:
                continue
            result = RoundResult.from_json(entry.result)
            run.results.append(result)
            run.scores.trained(result.round, result.metrics)
            if result.round < models[-1].version:  # the newest one's scores may still be on their way
                run.scores.settle(result.round)
        elif run.buffer is None:
            stage = stage_of(run.journal.repeats(entry.round))
            run.open = opened(run.settings, run.strategy, entry.round, entry.participants, stage)
            for update in run.journal.updates(entry.round):
                run.open.accepted[update.site] = _accepted(run, update)
    if models:
        run.model = _model(run, models[-1])
        kept = run.journal.kept()
        if kept is not None:
            run.model.kept = run.blobs.open(kept.blob, run.journal.manifest(kept.layout))
        if run.buffer is None:
            _best_of(run, models[:-1])
        for version, model in (run.buffer.models if run.buffer else {}).items():
            if version > 0 and run.scores.better(version, run.best.version if run.best else None):
                run.best = model


def _best_of(run: Run, older: list[ModelEntry]) -> None:
    """Normally one older model is there, the best; a kill between commit and recycling leaves two."""
    for entry in older:
        if entry.version > 0 and run.scores.better(entry.version, run.best.version if run.best else None):
            if run.best:
                run.journal.forget_model(run.best.version)
            run.best = _model(run, entry)
        else:
            run.journal.forget_model(entry.version)


def _model(run: Run, entry: ModelEntry) -> Model:
    blob = run.blobs.open(entry.blob, run.journal.manifest(entry.layout))
    if blob.manifest.digests_of_payload(blob.buffer) != entry.digests:
        raise _damaged(run, blob, f"the model of round {entry.version}")
    return Model(entry, blob)


def _accepted(run: Run, entry: UpdateEntry) -> Accepted:
    blob = run.blobs.open(entry.blob, run.journal.manifest(entry.layout))
    if frames.digest_of(blob.manifest, blob.manifest.digests_of_payload(blob.buffer)) != entry.digest:
        raise _damaged(run, blob, f"the update of {entry.site} for round {entry.round}")
    arrays, extras = blob.views()
    update = Update(job=run.settings.name, site=entry.site, arrays=arrays, extras=extras, **entry.header)
    return Accepted(update, blob, entry.digest)


def _damaged(run: Run, blob: Blob, what: str) -> StoreError:
    return StoreError(f"{what} on disk is not what was written", where=str(run.blobs.path(blob)), fix=RESTORE)
