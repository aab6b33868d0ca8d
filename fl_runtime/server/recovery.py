"""Recovery of a run from its journal after the server was killed: the part that all courses have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from google.protobuf.message import DecodeError

from fl_runtime.aggregation.metrics.pooling import from_json, plain
from fl_runtime.errors import ProtocolError, StoreError
from fl_runtime.server.courses.scores import Scores
from fl_runtime.server.membership import Membership
from fl_runtime.server.models import Model
from fl_runtime.server.records.results import RoundResult
from fl_runtime.server.registration import Registration
from fl_runtime.server.state import Accepted, RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal import Journal
from fl_runtime.store.journal_entries import ModelEntry, RoundEntry, UpdateEntry
from fl_runtime.store.journal_reader import RESTORE
from fl_runtime.types import Update
from fl_runtime.wire import frames


@contextmanager
def reading(journal: Journal) -> Iterator[None]:
    """Report whatever cannot be read in a journal as a StoreError that names the file."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, DecodeError, ProtocolError) as error:
        raise StoreError(f"the journal is damaged: {error!r}", where=journal.where, fix=RESTORE) from error


def restore_plan(state: RunState, membership: Membership) -> None:
    """Restore the sites and what they agreed on. A journal without entries changes nothing."""
    journal = state.journal
    state.layouts.update({manifest.layout: manifest for manifest in journal.reader.manifests()})  # sites refer to them
    for name, attempt, registration in journal.reader.sites():
        member = membership.members[name]
        member.attempt = attempt
        member.absent_since = membership.clock.now()
        if registration:
            member.registration, member.known = Registration.from_json(registration), True
            membership.quorum.rules[name] = member.registration.rules
    if journal.reader.failed():  # it is resumed with the scripts of all sites, those that left included
        journal.resumed()
    for name, refusal in journal.reader.who_left().items():
        member = membership.members[name]
        member.gone, member.refusal = refusal.what if refusal else "it left", refusal
    for name in journal.reader.who_is_lost():
        membership.members[name].gone, membership.members[name].script = "its connection was lost", "lost"
    for name in journal.reader.who_rests():
        membership.members[name].script = "resting"
    state.restore_plan()


def restore_results(state: RunState, scores: Scores) -> list[RoundEntry]:
    """Restore scores, the closed rounds and the newest model; returns the rounds that were opened and not closed.

    Every byte of the model is read again. Raises StoreError if it is not what was written.
    """
    journal, models = state.journal, state.journal.reader.models()
    for version, site, metrics, num_examples in journal.reader.scores():
        scores.report(version, site, from_json(metrics), num_examples)
    unfinished = []
    for entry in journal.reader.round_entries():
        if entry.result is None:
            unfinished.append(entry)
        elif entry.round > 0:
            result = RoundResult.from_json(entry.result)
            state.results.append(result)
            scores.record_training(result.round, result.metrics)
            if result.round < models[-1].version:  # the newest one's scores may still be on their way
                scores.settle(result.round)
    if models:
        state.models.newest = load_model(state, models[-1])
        state_entry = journal.reader.strategy_state()
        if state_entry is not None:
            manifest = journal.reader.manifest(state_entry.layout)
            state.models.newest.strategy_state = state.blobs.open(state_entry.blob, manifest)
    return unfinished


def load_model(state: RunState, entry: ModelEntry) -> Model:
    """The model of a journal entry. Raises StoreError if its file does not hold what was written."""
    blob = state.blobs.open(entry.blob, state.journal.reader.manifest(entry.layout))
    if blob.manifest.digests_of_payload(blob.buffer) != entry.digests:
        raise _damaged(state, blob, f"the model of round {entry.version}")
    return Model(entry, blob)


def load_update(state: RunState, entry: UpdateEntry) -> Accepted:
    """The update of a journal entry. Raises StoreError if its file does not hold what was written."""
    blob = state.blobs.open(entry.blob, state.journal.reader.manifest(entry.layout))
    if frames.digest_of(blob.manifest, blob.manifest.digests_of_payload(blob.buffer)) != entry.digest:
        raise _damaged(state, blob, f"the update of {entry.site} for round {entry.round}")
    arrays, extras = blob.views()
    header = {**entry.header, "metrics": plain(from_json(entry.header["metrics"]))}
    update = Update(job=state.settings.name, site=entry.site, arrays=arrays, extras=extras, **header)
    return Accepted(update, blob, entry.digest)


class SitesAhead:
    """Sites that may be ahead of a run that was restored from a backup. Used under the run's lock.

    What such a site has trained after the backup belongs to rounds that the run has lost. It counts as late, so that
    the site asks for its next task, and so goes back to the run's round.
    """

    def __init__(self, journal: Journal) -> None:
        self._restored = journal.restored
        self._sent: dict[str, int] = {}

    def task_sent(self, site: str, round: int) -> None:
        """Note that this process has sent the task of a round to a site."""
        self._sent[site] = round

    def lost(self, site: str, round: int) -> bool:
        """Whether an update may answer a task from before the restoration. This process has not sent its task."""
        return self._restored and self._sent.get(site) != round

    def lost_model(self, version: int, newest: int) -> bool:
        """Whether a score is that of a model which the run has lost."""
        return self._restored and version > newest


def _damaged(state: RunState, blob: Blob, what: str) -> StoreError:
    return StoreError(f"{what} on disk is not what was written", where=str(state.blobs.path(blob)), fix=RESTORE)
