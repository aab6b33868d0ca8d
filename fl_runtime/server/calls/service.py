"""The calls of the protocol fl.v1: decode and check a request, ask the run, encode the answer.

Runs in threads of the transport.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import fields
from typing import Any, get_args

from google.protobuf.message import Message

from fl_runtime.aggregation.metrics.pooling import from_json, plain, to_json
from fl_runtime.errors import ProtocolError, StoreError
from fl_runtime.server.calls import limits
from fl_runtime.server.calls.files import FilesCalls
from fl_runtime.server.calls.relay import Relay
from fl_runtime.server.calls.requests import DescribedLimit, expected, first_request, next_part
from fl_runtime.server.calls.software import SiteVersions, settings_for, told_in
from fl_runtime.server.calls.spool import WAITING, FairShare, NoRoomError, Spool, Transfer, receive_frames
from fl_runtime.server.calls.steps import StepReports, check_train_s
from fl_runtime.server.courses.base import Offer, Upload
from fl_runtime.server.registration import Registration, agreed_layout
from fl_runtime.server.run import Run
from fl_runtime.text import parse_json, printable
from fl_runtime.transport.base import Peer
from fl_runtime.transport.turns import UNLIMITED, Turn
from fl_runtime.types import Content, Report, Summary, Terms, Update
from fl_runtime.wire import finite, frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest, check_count
from fl_runtime.wire.names import Excerpt, Question, checked_lists
from fl_runtime.wire.software import FEATURE_NAMES, OWN, choose_protocol

BEAT_S = 10.0
"""Seconds between signs of life in a call that waits for a task, if the site does not ask for an interval."""
_SHORTEST_BEAT_S = 0.1
_COUNTED = ("used", "carried")
_WAITING = pb.TaskPart(waiting=pb.Waiting()).SerializeToString()


class FederationService:
    """Answers the calls of one run's sites. `peer.name` is the caller, as the transport has established it."""

    def __init__(self, run: Run, *, share: bool = False) -> None:
        """Make the service of a run.

        Args:
            run: The run.
            share: Let sites on this machine read and write large payloads in the files of the run.
        """
        self._run, self._state, self._share = run, run.state, share
        self._spool = Spool(run.state.blobs, run.state.lock)
        self._files = FilesCalls(run, self._spool)
        self._relay = Relay(run.membership.members)
        self._steps = StepReports(run)
        self._metric_names = limits.MetricNames()
        self._versions = SiteVersions()
        self._sent: dict[str, tuple[str, int, str]] = {}  # the last task of each site: kind, round and stage
        self._methods: dict[str, Callable[[Peer, Any, Iterator[bytes]], Iterator[bytes]]] = {
            "Join": self._join,
            "Register": self._register,
            "Attend": self._attend,
            "Next": self._next,
            "Submit": self._submit,
            "Score": self._score,
            "Files": self._take_files,
            "Leave": self._leave,
            "Tunnel": self._tunnel,
        }

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Answer one call of a site. See `fl_runtime.transport.base.Service`."""
        yield from self.answer(method, peer, first_request(method, requests, self.described_limit), requests)

    def answer(self, method: str, peer: Peer, request: Message, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Answer one call whose first message has been read.

        Args:
            method: Name of the call.
            peer: Who is calling.
            request: The first message, as `first_request` returns it.
            requests: The messages after it.

        Yields:
            The encoded messages of the answer.
        """
        try:
            yield from self._methods[method](peer, request, requests)
        except NoRoomError:
            raise
        except StoreError as error:  # what is acknowledged from now on might be lost
            self._state.fail(error)
            raise

    def described_limit(self) -> DescribedLimit | None:
        """How long the description of tensors may be in this run, or None before it has begun."""
        agreed = self._agreed()
        return DescribedLimit.of(agreed) if agreed else None

    def _attempt(self, session: pb.Session) -> int:
        """Number of the process that a call comes from. ProtocolError for a call of an earlier job."""
        if session.job not in ("", self._state.settings.name):
            raise ProtocolError(f"the job {session.job[:100]!r} does not run here any more", fix="start the site again")
        return session.attempt

    # -- joining ---------------------------------------------------------------------------------------------

    def _join(self, peer: Peer, request: pb.JoinRequest, requests: Iterator[bytes]) -> Iterator[bytes]:
        told = told_in(request)
        protocol = choose_protocol(OWN, told)
        settings = self._state.settings
        if request.job not in ("", settings.name):
            raise ProtocolError(f"this server runs the job {settings.name!r}, not {request.job!r}")
        shown = settings_for(self._state.plan.job, peer.name, told)
        member = self._run.membership.join(peer.name, told.version)
        self._versions.note(peer.name, told)
        yield pb.JoinReply(
            protocol=protocol,
            protocol_min=OWN.lowest,
            protocol_max=OWN.highest,
            features=FEATURE_NAMES,
            version=OWN.version,
            attempt=member.attempt,
            site=member.name,
            index=member.index,
            count=len(self._run.membership.members),
            settings_json=json.dumps(shown),
            started=self._state.plan.rounds is not None,
            shared_folder=str(self._state.blobs.folder.resolve()) if self._share else "",
            training=request.training,
        ).SerializeToString()

    def _register(self, peer: Peer, request: pb.RegisterRequest, requests: Iterator[bytes]) -> Iterator[bytes]:
        described = self._whole_manifest(request, requests)
        self._count_tensors(peer, described)
        peer.account.spend("registered bytes", request.ByteSize() - described.ByteSize())
        manifest = Manifest.from_proto(described)
        peer.account.read()
        agreement = limits.checked_table(request.agreement, "the agreement")
        info = limits.checked_table(request.info, "the info")
        capabilities = limits.checked_table(dict.fromkeys(request.capabilities, ""), "the list of capabilities")
        registration = Registration(
            layout=manifest.layout,
            agreement=agreement,
            info=info,
            capabilities=frozenset(capabilities),
            rounds=request.rounds,
            evaluates=request.evaluates,
            terms=_terms(request.terms_json),
            names=checked_lists(request.names),
            rules=limits.checked_rules(
                request.min_cohort,
                request.max_share,
                own_model_stays=request.own_model_stays,
                stays=request.stays,
            ),
            version=self._versions.version_of(peer.name),
        )
        attempt, beat_s, membership = self._attempt(request.session), _beat_s(request.session), self._run.membership
        for step in membership.register(peer.name, attempt, manifest, registration, beat_s):
            if isinstance(step, Question):
                yield pb.RegisterReply(question=step.to_proto()).SerializeToString()
                excerpt = next_part(requests).excerpt
                membership.answer(peer.name, attempt, step.name, Excerpt.from_proto(excerpt))
            else:
                reply = pb.RegisterReply(waiting=pb.Waiting()) if step is None else pb.RegisterReply(rounds=step)
                yield reply.SerializeToString()

    def _attend(self, peer: Peer, request: pb.SessionRequest, requests: Iterator[bytes]) -> Iterator[bytes]:
        attempt, beat_s = self._attempt(request.session), _beat_s(request.session)
        if request.HasField("steps"):
            self._steps.take(peer.name, attempt, request.steps, self._sent)
            yield pb.Notice(kind="noted").SerializeToString()
            return
        ended = threading.Event()
        self._run.membership.attend(peer.name, attempt)
        try:
            if peer.when_gone(ended.set):
                yield pb.Notice(kind="attending").SerializeToString()
                while not ended.wait(beat_s):
                    yield pb.Notice(kind="waiting").SerializeToString()
        finally:
            self._run.membership.mark_absent(peer.name, attempt)

    def _leave(self, peer: Peer, request: pb.LeaveRequest, requests: Iterator[bytes]) -> Iterator[bytes]:
        attempt, reason = self._attempt(request.session), printable(request.reason, 500)
        self._run.membership.leave(peer.name, attempt, reason, early=request.early, stays=request.stays)
        yield pb.Done().SerializeToString()

    def _tunnel(self, peer: Peer, request: pb.TunnelPart, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Relay the streams of one site until its call ends."""
        self._run.check_attempt(peer.name, self._attempt(request.session))
        yield from self._relay.serve(peer.name, requests, peer.when_gone)

    # -- tasks -----------------------------------------------------------------------------------------------

    def _next(self, peer: Peer, request: pb.NextRequest, requests: Iterator[bytes]) -> Iterator[bytes]:
        attempt, best, evaluate = self._attempt(request.session), request.best, request.evaluate
        beat_s = _beat_s(request.session) or BEAT_S
        done = limits.check_text(request.done, "the stage of a request")
        held = request.held - 1 if request.held else None
        for offer in self._run.wait_for_task(peer.name, attempt, best, beat_s, evaluate=evaluate, done=done, held=held):
            if offer is None:
                yield pb.TaskPart(waiting=pb.Waiting()).SerializeToString()
            else:
                yield from self._send(peer, offer, request, requests)

    def _send(self, peer: Peer, offer: Offer, request: pb.NextRequest, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the task's header and frames, or the name of a file in place of frames.

        The model stays leased until the last frame is out, or the site has said that it has read the file.
        """
        count = 0
        task = (offer.kind, offer.round, offer.stage)
        if self._sent.get(peer.name) == task:
            peer.account.void()
        self._sent[peer.name] = task
        shared = request.shared and self._share and _is_large(offer)
        turn = peer.turns.ask(offer.model.blob.manifest.nbytes if offer.model is not None and not shared else 0)
        peer.when_gone(turn.end)
        beat_s = _beat_s(request.session) or BEAT_S
        try:
            with turn:
                for message in self._messages(offer, request, shared, turn):
                    yield from turn.beats(beat_s, _WAITING)
                    count += len(message)
                    yield message
                    turn.moved(len(message))
            if shared and offer.model is not None:
                next(requests, None)
                count += offer.model.blob.manifest.nbytes
        finally:
            if offer.model is not None:
                self._state.models.release(offer.model)
            self._run.task_sent(offer.kind, offer.round, peer.name, count)

    def _messages(self, offer: Offer, request: pb.NextRequest, shared: bool, turn: Turn) -> Iterator[bytes]:
        header = pb.TaskHeader(
            job=self._state.settings.name,
            round=offer.round,
            stage=offer.stage,
            kind=offer.kind,
            config_json=json.dumps(dict(offer.config)),
        )
        if offer.model is None:
            yield pb.TaskPart(task=header).SerializeToString()
            return
        blob, entry, ready = offer.model.blob, offer.model.entry, offer.model.messages
        known = offer.layout_known and entry.layout in request.layouts
        key = (f"{offer.kind} {offer.round} {offer.stage}", header.config_json, known)
        if key in ready:
            yield ready[key]
            return
        header.version = entry.version
        header.payload.CopyFrom(frames.describe(blob.manifest, entry.digests, known=known))
        pieces = [blob.buffer.data]
        if blob.manifest.nbytes <= frames.INLINE_BYTES:
            ready[key] = frames.inlined(pb.TaskPart(task=header), pieces)
            yield ready[key]
            return
        if shared:
            header.payload.file = self._state.blobs.path(blob).name
            yield pb.TaskPart(task=header).SerializeToString()
            return
        if request.resume_digest == frames.payload_digest(header.payload):
            header.offset = min(request.resume_from, blob.manifest.nbytes)
        yield pb.TaskPart(task=header).SerializeToString()
        without = frames.frame_bytes(len(self._state.settings.sites))
        yield from frames.frames(pieces, header.offset, lambda: frames.FRAME_BYTES if turn.held else without)

    # -- updates and reports ---------------------------------------------------------------------------------

    def _submit(self, peer: Peer, request: pb.UpdatePart, requests: Iterator[bytes]) -> Iterator[bytes]:
        header, header_bytes = request.update, request.ByteSize()
        name, attempt, payload = peer.name, self._attempt(header.session), header.payload
        facts, digest = self._update_fields(peer, header), frames.payload_digest(payload)
        train_s = check_train_s(header.train_s)
        status = self._run.admit(name, attempt, header.round, header.stage, header.num_examples)
        if status is None:
            manifest = self._manifest(peer, header)
            peer.account.read()
            transfer = self._spool.begin(name, digest, manifest, payload.digests, self._share_of(), peer.hang_up)
            received = header_bytes
            with self._spool.receiving(transfer):
                if payload.inline:
                    transfer.receiver.take(payload.inline[transfer.receiver.arrived :])
                elif transfer.receiver.manifest.nbytes:
                    received += yield from self._receive(peer, header, transfer, requests)
                arrays, extras = transfer.receiver.finish()
                finite.refuse(transfer.receiver.not_finite, where=f"update of {name}, round {header.round}")
                update = Update(
                    job=self._state.settings.name, site=name, arrays=arrays, extras=extras, train_s=train_s, **facts
                )
                self._run.course.checks.check_values(update)
            journaled = {**facts, "metrics": to_json(facts["metrics"])}
            status = self._run.accept(Upload(update, transfer.blob, digest, journaled, received))
        (peer.account.earn if status in _COUNTED else peer.account.void)()
        if status == "late":
            self._state.events.emit("update", header.round, name, status="late", bytes_up=header_bytes)
        yield pb.SubmitReply(accepted=pb.Accepted(status=status)).SerializeToString()

    def _receive(
        self, peer: Peer, header: pb.UpdateHeader, transfer: Transfer, requests: Iterator[bytes]
    ) -> Generator[bytes, None, int]:
        """Let a site send what is left of its payload, when its turn has come; returns the bytes received."""
        start = transfer.receiver.arrived
        if header.shared and self._share:
            name = self._state.blobs.path(transfer.blob).name
            yield pb.SubmitReply(send_from=start, file=name).SerializeToString()
            return _await_filled_file(transfer, requests, finite=header.finite)
        turns = peer.turns if header.waits else UNLIMITED  # sites of earlier versions send short frames
        beat_s = _beat_s(header.session) or BEAT_S
        with turns.ask(transfer.receiver.manifest.nbytes - start) as turn:
            peer.when_gone(turn.end)
            yield from turn.beats(beat_s, WAITING)
            yield pb.SubmitReply(send_from=start, frame_bytes=frames.FRAME_BYTES).SerializeToString()
            return (yield from receive_frames(transfer, requests, turn, beat_s))

    def _manifest(self, peer: Peer, header: pb.UpdateHeader) -> Manifest:
        """The manifest of an update, which must fit the tensors that the sites agreed on; extras may be added.

        What may be large is read and compared without the run's lock.
        """
        payload, state = header.payload, self._state
        if payload.HasField("manifest"):
            self._count_tensors(peer, payload.manifest)
            manifest = Manifest.from_proto(payload.manifest)
            if manifest.layout != payload.layout:
                raise ProtocolError("a manifest does not have the layout that its header names")
        else:
            with state.lock:
                known = state.layouts.get(payload.layout)
            if known is None:
                raise ProtocolError("an update refers to a layout that the server has not seen")
            manifest = known
        self._run.course.checks.check_layout(manifest, header.content, header.encoding)  # before it is stored
        with state.lock:
            self._run.membership.add_manifest(self._run.membership.members[peer.name], manifest)
            manifest = state.layouts[payload.layout]
        if payload.inline and len(payload.inline) != manifest.nbytes:
            raise ProtocolError(f"an update brings {len(payload.inline)} bytes; its tensors have {manifest.nbytes}")
        if payload.total_bytes != manifest.nbytes:
            raise ProtocolError(f"an update announces {payload.total_bytes} bytes; its tensors have {manifest.nbytes}")
        return manifest

    def _share_of(self) -> FairShare:
        """What the run's other sites need of the disk."""
        with self._state.lock:
            agreed = self._state.layouts.get(agreed_layout(self._run.membership.members))
            others = len(self._run.membership.remaining()) + 1  # the others, and the two models of a round
        return FairShare(agreed.nbytes if agreed is not None else 0, others)

    def _count_tensors(self, peer: Peer, described: pb.Manifest) -> None:
        """Count the tensors of a manifest before they are read. ProtocolError if this run has none with so many."""
        check_count(described)
        limits.check_tensor_count(len(described.tensors), self._agreed())
        peer.account.spend("tensors", len(described.tensors))

    def _whole_manifest(self, first: pb.RegisterRequest, requests: Iterator[bytes]) -> pb.Manifest:
        """The manifest of a registration, whose tensors may come in several messages."""
        manifest, part = first.manifest, first
        while part.more:
            part = next_part(requests, self.described_limit)
            if not part.manifest.tensors:
                raise ProtocolError("a message of a registration brings no tensors")
            manifest.tensors.extend(part.manifest.tensors)
            check_count(manifest)
            limits.check_tensor_count(len(manifest.tensors), self._agreed())
        return manifest

    def _agreed(self) -> Manifest | None:
        """The model that the sites agreed on, or None before the run has begun."""
        with self._state.lock:
            begun, agreed = self._state.plan.rounds is not None, agreed_layout(self._run.membership.members)
            return self._state.layouts.get(agreed) if begun else None

    def _score(self, peer: Peer, request: pb.ScoreRequest, requests: Iterator[bytes]) -> Iterator[bytes]:
        metrics = self._metrics(peer, request.metrics_json)
        examples = max(limits.check_count(request.num_examples, "num_examples"), 1)
        report = Report(self._state.settings.name, request.version, peer.name, metrics, examples)
        attempt = self._attempt(request.session)
        peer.account.read()
        if self._run.score(report, attempt):
            peer.account.earn()
        if not request.wait:
            yield pb.ScoreReply().SerializeToString()
            return
        beat_s = _beat_s(request.session)
        for answer in self._run.scoring.wait_for(peer.name, attempt, request.version, beat_s):
            if answer is None:
                yield pb.ScoreReply(waiting=pb.Waiting()).SerializeToString()
            else:
                metrics_json, stop = json.dumps(to_json(answer[0])), answer[1]
                yield pb.ScoreReply(metrics_json=metrics_json, stop=stop).SerializeToString()

    def _take_files(self, peer: Peer, request: pb.FilesPart, requests: Iterator[bytes]) -> Iterator[bytes]:
        attempt = self._attempt(request.files.session)
        yield from self._files.take(peer, attempt, request.files, requests, self._share_of())

    def _update_fields(self, peer: Peer, header: pb.UpdateHeader) -> dict[str, Any]:
        """The fields of an Update other than its tensors, as JSON values."""
        if header.content not in get_args(Content):
            raise ProtocolError(f"the content of an update is {header.content[:40]!r}, which this server does not know")
        return {
            "round": header.round,
            "stage": limits.check_text(header.stage, "the stage of an update"),
            "attempt": header.session.attempt,
            "base_version": header.base_version,
            "content": header.content,
            "encoding": limits.check_text(header.encoding, "the encoding of an update", limits.MAX_ENCODING_CHARS),
            "num_examples": limits.check_count(header.num_examples, "num_examples"),
            "local_steps": limits.check_count(header.local_steps, "local_steps"),
            "metrics": plain(self._metrics(peer, header.metrics_json)),
        }

    def _metrics(self, peer: Peer, text: str) -> dict[str, float | Summary]:
        peer.account.spend("metric bytes", len(text))
        metrics = _json(text, "metrics")
        limits.check_metrics(metrics)
        return self._metric_names.known(peer.name, from_json(metrics))


def _beat_s(session: pb.Session) -> float | None:
    """Seconds between the signs of life that the caller asks for in a call that waits, or None for none."""
    return max(session.beat_s, _SHORTEST_BEAT_S) if session.beat_s > 0 else None


def _await_filled_file(transfer: Transfer, requests: Iterator[bytes], *, finite: bool) -> int:
    """Wait until the site says that it has filled the rest of the file; returns how many bytes that were.

    With `finite`, the site has checked that all values are finite.
    """
    if not frames.is_frame(expected(requests, "an upload ended before its file was filled")):
        raise ProtocolError("an upload does not say with a frame that its file is filled")
    before = transfer.receiver.arrived
    transfer.receiver.filled(finite=finite)
    return transfer.receiver.arrived - before


def _is_large(offer: Offer) -> bool:
    """Whether an offer has a payload that does not fit into its header."""
    return offer.model is not None and offer.model.blob.manifest.nbytes > frames.INLINE_BYTES


def _json(text: str, what: str) -> object:
    try:
        return parse_json(text or "{}")
    except ValueError:
        raise ProtocolError(f"{what} are not JSON") from None


def _terms(text: str) -> Terms:
    """The terms in a registration. Fields that this version does not know are left out."""
    values = _json(text, "the terms of a registration")
    known = {f.name: f.default for f in fields(Terms)}
    try:
        assert isinstance(values, dict)
        terms = Terms(**{name: value for name, value in values.items() if name in known})
        assert terms.content in ("weights", "delta", "encoded") and terms.best_mode in ("min", "max")
        assert all(
            isinstance(text, str) and len(text) <= 200 and text.isprintable()
            for text in (terms.strategy, terms.best_metric)
        )
        assert terms.patience is None or (type(terms.patience) is int and 1 <= terms.patience <= limits.MAX_ROUNDS)
        assert type(terms.min_delta) in (int, float) and 0 <= float(terms.min_delta) < math.inf
    except (AssertionError, TypeError, ValueError, OverflowError):
        raise ProtocolError("the terms of a registration cannot be read") from None
    return terms
