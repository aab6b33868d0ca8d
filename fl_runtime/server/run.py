"""The state of one run, and what sites may do to it. The round loop in rounds.py drives it.

One lock guards everything. `changed` wakes the round loop, `published` wakes the sites that wait for a task.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fl_runtime.aggregation import make_strategy
from fl_runtime.errors import (
    AbortedError,
    FederationError,
    PermissionDeniedError,
    ProtocolError,
    StoreError,
    UpdateRefusedError,
)
from fl_runtime.filters import check_filters
from fl_runtime.filters.base import Home
from fl_runtime.filters.server import ServerFilters, what_ran
from fl_runtime.server import limits
from fl_runtime.server.courses.buffered import Buffer
from fl_runtime.server.courses.cross_site import CrossSite
from fl_runtime.server.courses.scores import Scores
from fl_runtime.server.courses.swarm import Handover, is_of_handover
from fl_runtime.server.members import Member, Registration, check_latecomer
from fl_runtime.server.records.events import Events
from fl_runtime.server.records.results import RoundResult
from fl_runtime.server.spool import Spool
from fl_runtime.server.state import Accepted, Model, Offer, OpenRound, Phase, Status, leased
from fl_runtime.store.blobs import Blob, Blobs
from fl_runtime.store.journal import Journal, ModelEntry, UpdateEntry
from fl_runtime.types import RunSettings, Strategy, TaskKind, Terms, Update
from fl_runtime.wire.manifest import Manifest

log = logging.getLogger(__name__)


class Run:
    """Everything the server knows of a run. Public methods take the lock themselves and may be called by any thread."""

    def __init__(self, settings: RunSettings, folder: Path, events: Events, strategy: Strategy | None = None) -> None:
        """strategy: None takes the one that the settings or, at the handshake, the sites name."""
        self.settings, self.events = settings, events
        self.strategy = strategy or make_strategy(settings.strategy or Terms().strategy)
        self._strategy_is_given = strategy is not None or settings.strategy is not None
        self.terms = Terms()
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.published = threading.Condition(self.lock)
        durable = settings.durability == "power"
        self.journal = Journal(folder / "journal.sqlite", durable=durable)
        self.journal.begin(settings)
        self.blobs = Blobs(folder / "blobs", durable=durable)
        self.spool = Spool(self.blobs, self.lock)
        self.members = {name: Member(name, i) for i, name in enumerate(settings.sites)}
        self.manifests: dict[bytes, Manifest] = {}
        self.scores = Scores()
        self.phase: Phase = "joining"
        self.error: FederationError | None = None
        self.rounds: int | None = None
        self.open: OpenRound | None = None
        self.silent: set[str] = set()  # missed the deadline of a round that came to nothing, and have not called since
        self.model: Model | None = None
        self.best: Model | None = None
        self.results: list[RoundResult] = []
        self.last_used: dict[str, int] = {}  # site -> the last round whose task it has answered with an update
        self.exporter = ""
        self.filters = ServerFilters(settings.filters, Home(job=settings.name, folder=folder))
        self.handed_out: Model | None = None  # the model as a filter has encoded it for the open round
        self.buffer = Buffer(self.strategy.buffer) if self.strategy.buffer else None
        self.cross_site = CrossSite(settings.cross_site)
        self.handover: Handover | None = None  # while a site forms the mean of the open round
        self.without_score: set[str] = set()
        self.ended = threading.Event()

    def agree(self, terms: Terms) -> None:
        """The sites' terms, as far as the settings leave them open. ConfigError if the filters do not fit them."""
        self.terms = terms
        if not self._strategy_is_given:
            self.strategy = make_strategy(terms.strategy)
        settings = self.settings
        check_filters(settings.filters, settings.optimizer_state, self.strategy)
        self.scores.rank_by(settings.best_metric or terms.best_metric, settings.best_mode or terms.best_mode)

    # -- joining ---------------------------------------------------------------------------------------------

    def join(self, name: str, version: str) -> Member:
        """A new attempt of a site; older ones are fenced off."""
        with self.lock:
            self._raise_if_failed()
            member = self.members.get(name)
            if member is None:
                raise ProtocolError(f"{name} is not a site of this run", fix=f"its sites are {', '.join(self.members)}")
            member.attempt += 1
            member.gone, member.lost, member.registration, member.expelled = "", False, None, ""
            member.layouts.clear()
            member.attending, member.absent_since = 0, time.monotonic()
            if self.strategy.relayed and self.open is not None and not self.open.closing:
                self.leave_out(self.open, name)  # its update is gone with the process that had it
            self.journal.joined(name, member.attempt)
            self.journal.left(name, False)
            self.events.emit("joined", site=name, attempt=member.attempt, version=version)
            self.changed.notify_all()
            self.published.notify_all()  # calls of the attempt before wait there
            return member

    def register(
        self, name: str, attempt: int, manifest: Manifest, registration: Registration, beat_s: float | None
    ) -> Iterator[int | None]:
        """The handshake; waits for the other sites, with None every `beat_s`, and yields the number of rounds."""
        with self.lock:
            member = self._member(name, attempt)
            self.add_layout(manifest, member)
            member.layouts.add(manifest.layout)
            if self.rounds is not None:
                check_latecomer(name, registration, self.members, self.manifests, self.strategy)
            member.registration, member.known = registration, True
            self.journal.registered(name, registration.to_json())
            self.events.emit(
                "registered",
                site=name,
                tensors=len(manifest.tensors),
                bytes=manifest.nbytes,
                evaluates=registration.evaluates,
                info=dict(registration.info),
            )
            self.changed.notify_all()
        while True:
            with self.lock:
                self._member(name, attempt)
                if self.rounds is None:
                    self.published.wait(beat_s)
                    self._member(name, attempt)
                rounds = self.rounds
            if rounds is not None:
                yield rounds
                return
            if beat_s is not None:
                yield None

    def attend(self, name: str, attempt: int) -> Member:
        with self.lock:
            member = self._member(name, attempt)
            member.attending += 1
            member.absent_since = None
            if member.lost:  # it was given up too soon
                member.gone, member.lost = "", False
                self.events.emit("joined", site=name, attempt=attempt, version="")
                self.published.notify_all()
            self.changed.notify_all()
            return member

    def absent(self, name: str, attempt: int) -> None:
        """A presence stream has ended; the site has `rejoin_s` to come back."""
        with self.lock:
            member = self.members[name]
            if attempt != member.attempt:
                return
            member.attending -= 1
            if member.attending == 0 and not member.gone:
                member.absent_since = time.monotonic()
                self.changed.notify_all()

    def gone(self, name: str, reason: str, *, early: bool) -> None:
        """A site no longer counts: it left, or its process is known to be dead."""
        with self.lock:
            member = self.members[name]
            if member.gone:
                return
            member.gone = reason or "it left"
            self.events.emit("left", site=name, reason=member.gone, early=early)
            self.changed.notify_all()

    def expel(self, name: str, reason: str) -> None:
        """A site that may not take part any more: its calls under way count for nothing, and it is gone."""
        with self.lock:
            member = self.members.get(name)
            if member is None or self.phase in ("failed", "done"):
                return
            member.expelled = reason
            self.gone(name, reason, early=True)
            self.published.notify_all()

    def leave(self, name: str, attempt: int, reason: str, *, early: bool) -> None:
        with self.lock:
            self._member(name, attempt)
            self.journal.left(name, True)
            self.gone(name, reason, early=early)

    # -- tasks -----------------------------------------------------------------------------------------------

    def wait_for_task(
        self, name: str, attempt: int, best: bool, beat_s: float, *, evaluate: bool = False, done: str = ""
    ) -> Iterator[Offer | None]:
        """Yields None every `beat_s` while there is nothing to do, then one offer with a leased model. done: see
        `Handover.offer`."""
        if best:
            with self.lock:  # whoever asks for the best model has no score to give any more: nobody waits for it
                self.without_score.add(name)
                self.changed.notify_all()
        while True:
            with self.lock:
                member = self._member(name, attempt)
                offer = self.cross_site.offer(self, member) if evaluate else self._offer(member, best, done)
                if offer is None:
                    self.published.wait(beat_s)
                    self._member(name, attempt)
                    offer = self.cross_site.offer(self, member) if evaluate else self._offer(member, best, done)
            yield offer
            if offer is not None:
                return

    def release(self, model: Model) -> None:
        with self.lock:
            model.leases -= 1
            if model.retired:
                self.recycle(model)

    def retire(self, model: Model) -> None:
        """A model that no later task will carry."""
        with self.lock:
            self.journal.forget_model(model.version)
            self.recycle(model)

    def recycle(self, model: Model) -> None:
        """Its file may be used again once nobody streams it any more."""
        with self.lock:
            model.retired = True
            if model.leases == 0:
                self.blobs.free(model.blob)

    def initial_source(self) -> str | None:
        """The site whose own weights become the initial model: the first registered one, in order. One that comes back
        meanwhile stays it."""
        return next((m.name for m in self.members.values() if m.known and not m.gone), None)

    def _offer(self, member: Member, best: bool, done: str) -> Offer | None:
        self.silent.discard(member.name)
        if not member.active:
            return None
        if self._wants_initial(member.name):
            return Offer("initial", 0, {}, None, True)
        if self.buffer is not None and self.phase == "training":
            return self.buffer.offer(self, member)
        if self.handover is not None:
            return self.handover.offer(member, done)
        waits = self.open is not None and not self.open.takes(member.name)
        if self._collecting() and self.open and not waits and member.name not in self.open.accepted:
            if member.name not in self.open.participants:  # it came back while the round is open
                self.open.participants.append(member.name)
            if self.open.round == 0:
                return Offer("initial", 0, self.open.config, None, True, self.open.stage)
            model, stage = self.handed_out or self.model, self.open.stage
            return leased("train", self.open.round, self.open.config, model, member, stage)
        if self.phase == "done" and best:
            assert self.best is not None
            metrics = self.scores.of(self.best.version)
            return leased("best", self.rounds or 0, {"metrics": metrics}, self.best, member)
        if self.phase in ("final", "done") and not best:
            return leased("final", self.rounds or 0, {"export": member.name == self.exporter}, self.model, member)
        return None

    def _collecting(self) -> bool:
        """The open round takes updates: it is not closing, and the run does not end before it."""
        if self.phase != "training" or self.open is None or self.open.closing:
            return False
        return self.rounds is None or self.open.round <= self.rounds

    # -- updates and reports ---------------------------------------------------------------------------------

    def check_attempt(self, name: str, attempt: int) -> None:
        """Raises for a caller who is an outlived attempt, and when the run failed."""
        with self.lock:
            self._member(name, attempt)

    def admit(self, name: str, attempt: int, round: int, stage: str, num_examples: int) -> Status | None:
        """Before the bytes of an update: None to send them, or what it counts as without them."""
        with self.lock:
            self._member(name, attempt)
            if num_examples <= 0:
                raise UpdateRefusedError(
                    f"num_examples is {num_examples}; the weight of an update must be above zero",
                    where=f"{name}, round {round}",
                    fix="check that the site's training set is not empty, or pass num_examples=",
                )
            if round == 0 and self._wants_initial(name):
                return None
            if self.buffer is not None and round > 0:
                return self.buffer.admit(self, name, round)
            if is_of_handover(stage):
                return None if self.handover and self.handover.admits(name, attempt, stage) else "late"
            if round <= self.last_used.get(name, -1):
                return "duplicate"
            while self.phase == "training" and (self.open is None or self.open.closing):
                self.published.wait()
                self._member(name, attempt)
            if round == 0 and (self.open is None or self.open.round != 0):
                return "duplicate"  # the initial model is there, or another site's is wanted
            if self.open is None or (round < self.open.round and self.settings.late == "drop"):
                return "late"
            if not self._collecting() or (round == self.open.round and stage != self.open.stage):
                return "late"  # the run ends before this round, or it has been opened again
            if round == self.open.round and not self.open.takes(name):
                return "late"  # it was not asked
            if round > self.open.round:
                raise ProtocolError(f"an update for round {round}, but round {self.open.round} is open")
            return "duplicate" if name in self.open.accepted else None

    def accept(self, update: Update, blob: Blob, digest: bytes, header: Mapping[str, Any], bytes_up: int) -> Status:
        """An update whose bytes have been verified: journaled, then counted. Takes over the blob unless it is
        refused, late or a duplicate, in which case the blob is freed."""
        with self.lock:
            try:
                status = self.admit(update.site, update.attempt, update.round, update.stage, update.num_examples)
            except FederationError:
                self.blobs.free(blob)
                raise
            if status is not None:
                self.blobs.free(blob)
                return status
            if self._wants_initial(update.site):
                self.commit_initial(blob)
                return "used"
            if self.buffer is not None:
                status = self.buffer.accept(self, update, blob, digest, header, bytes_up)
                self.emit_update(update, status if status == "late" else "buffered", bytes_up, self.buffer.since)
                return status
            assert self.open is not None
            if self.handover is not None and is_of_handover(update.stage):
                self.open.bytes_up[update.site] = self.open.bytes_up.get(update.site, 0) + bytes_up
                return self.handover.take(self, update, blob)
            try:
                limits.check_extras(update, [item.update for item in self.open.accepted.values()])
            except FederationError:
                self.blobs.free(blob)
                raise
            if update.site not in self.open.participants:  # carried in by a site that missed the opening
                self.open.participants.append(update.site)
            self.open.bytes_up[update.site] = bytes_up
            self.blobs.rename(blob, f"update-{self.open.round}-{self.members[update.site].index}")
            self.blobs.settle(blob)
            layout = blob.manifest.layout
            self.journal.accepted(UpdateEntry(self.open.round, update.site, digest, blob.name, layout, header))
            self.open.accepted[update.site] = Accepted(update, blob, digest)
            self.last_used[update.site] = update.round
            status = "used" if update.round == self.open.round else "carried"
            self.emit_update(update, status, bytes_up, self.open.began, self.open)
            return status

    def emit_update(
        self, update: Update, status: str, bytes_up: int, began: float, open: OpenRound | None = None
    ) -> None:
        self.events.emit(
            "update",
            open.round if open else update.round,
            update.site,
            status=status,
            num_examples=update.num_examples,
            local_steps=update.local_steps,
            metrics=dict(update.metrics),
            bytes_up=bytes_up,
            bytes_down=open.bytes_down.get(update.site, 0) if open else 0,
            seconds=time.monotonic() - began,
            **({"filters": list(ran)} if (ran := what_ran(update.encoding)) else {}),
        )
        self.changed.notify_all()

    def commit_initial(self, blob: Blob) -> None:
        """Version 0, from the first site or from a file."""
        with self.lock:
            self.blobs.rename(blob, "model-0")
            self.blobs.settle(blob)
            self.add_layout(blob.manifest)
            digests = blob.manifest.digests_of_payload(blob.buffer)
            entry = ModelEntry(0, blob.name, blob.manifest.layout, digests)
            self.journal.committed(entry, 0, {})
            self.model = Model(entry, blob)
            self.changed.notify_all()

    def _wants_initial(self, name: str) -> bool:
        wanted = self.phase == "initial" and not self.model and not self.settings.initial
        return wanted and self.strategy.initial == "first" and self.initial_source() == name

    def drop_open(self, again: int = 0) -> None:
        """The open round is not needed any more, or is to be opened again, for the `again`th time."""
        with self.lock:
            assert self.open is not None
            self.journal.round_dropped(self.open.round, again)
            self.events.emit("round_dropped", self.open.round)
            for name, accepted in self.open.accepted.items():
                self.blobs.free(accepted.blob)
                self.last_used[name] = self.open.round - 1
            self.open = None

    def leave_out(self, current: OpenRound, name: str) -> None:
        """A site's update does not count in this round after all. Called under the lock."""
        if name in current.accepted:
            self.blobs.free(current.accepted.pop(name).blob)
            self.last_used[name] = current.round - 1

    # -- common ----------------------------------------------------------------------------------------------

    def add_layout(self, manifest: Manifest, member: Member | None = None) -> None:
        """Keep a manifest. member: the site that has sent it, None where it is the server's own."""
        if manifest.layout not in self.manifests:
            if member is not None:
                limits.check_described(member, manifest)
            self.manifests[manifest.layout] = manifest
            self.journal.layout(manifest)

    def count_bytes(self, kind: TaskKind, round: int, name: str, bytes_down: int) -> None:
        with self.lock:
            if self.open and self.open.round == round:
                self.open.bytes_down[name] = self.open.bytes_down.get(name, 0) + bytes_down
            if self.buffer is not None:
                self.buffer.bytes_down += bytes_down
            self.events.emit("task_sent", round, name, task=kind, bytes=bytes_down)

    def fail(self, error: FederationError) -> None:
        """End the run with an error that every site gets too. One of the store alone halts it: it goes on where its
        journal stands when the server is started again, and the sites wait for that as for a server that is away."""
        with self.lock:
            if self.phase in ("failed", "done") or self.blobs.closed:
                return
            self.phase, self.error = "failed", error
            self.events.emit("failed", error=error.to_wire())
            self.published.notify_all()
            self.changed.notify_all()
            if not isinstance(error, StoreError):
                try:
                    self.journal.ended(error)
                except StoreError as failed:
                    log.error("the end of the run is not in its journal: %s", failed)

    def halt(self) -> None:
        """Stop where the journal stands, with nobody told: the server is closed, and may be started again."""
        with self.lock:
            self.blobs.close()
            self.published.notify_all()
            self.changed.notify_all()

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Wait (under the lock) for a condition of the run; False after `timeout_s`. Raises when the run failed."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._raise_if_failed(even_done=True)
            self._expire_absent()
            if ready():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.changed.wait(min([left, *self._absences()]))

    def _absences(self) -> list[float]:
        now, limit = time.monotonic(), self.settings.rejoin_s
        waits = [limit - (now - m.absent_since) for m in self.members.values() if m.absent_since and not m.gone]
        return [max(w, 0.0) + 0.01 for w in waits]

    def _expire_absent(self) -> None:
        limit = self.settings.rejoin_s
        for m in self.members.values():
            if not m.gone and m.absent_since and time.monotonic() - m.absent_since > limit:
                m.lost = True
                self.gone(m.name, f"its connection was lost for more than {limit:g} s", early=True)

    def _member(self, name: str, attempt: int) -> Member:
        """The member a call speaks for; raises when the run failed, or the caller is an outlived attempt."""
        self._raise_if_failed()
        member = self.members.get(name)
        if member is None:
            raise ProtocolError(f"{name} is not a site of this run", fix=f"its sites are {', '.join(self.members)}")
        if member.expelled:
            raise PermissionDeniedError(
                f"{name} may not take part any more: {member.expelled}",
                where=f"rule certificate: {member.expelled}",
                fix="join again with a new certificate",
            )
        if attempt != member.attempt:
            raise AbortedError(
                f"this process is attempt {attempt} of {name}; attempt {member.attempt} has taken over",
                where=name,
                fix="run one process per site; this one can be stopped",
            )
        return member

    def _raise_if_failed(self, *, even_done: bool = False) -> None:
        if self.error is not None:
            raise self.error
        if self.blobs.closed and (even_done or self.phase != "done"):  # what has ended well may still be asked about
            raise StoreError("the server was closed", fix="start it again to go on")
