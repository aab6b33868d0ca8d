"""The calls of fl.v1: decode, check, hand to the run, encode. Runs in threads of the transport."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from fl_runtime.aggregation.metrics import from_json, plain
from fl_runtime.errors import FederationError, ProtocolError
from fl_runtime.server.members import Registration
from fl_runtime.server.relay import Relay, first_part
from fl_runtime.server.run import Run
from fl_runtime.server.spool import Transfer
from fl_runtime.server.state import Offer
from fl_runtime.transport.base import Peer
from fl_runtime.types import Report, Terms, Update
from fl_runtime.version import FEATURES, VERSION, choose_protocol
from fl_runtime.wire import frames
from fl_runtime.wire.finite import check_finite
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

M = TypeVar("M", bound=Message)

BEAT_S = 10.0
"""How often a waiting site hears that the server is alive."""


class FederationService:
    """Answers the calls of one run's sites. `peer.name` is who the transport says is calling."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._relay = Relay()
        self._methods: dict[str, Callable[[Peer, Iterator[bytes]], Iterator[bytes]]] = {
            "Join": self._join,
            "Register": self._register,
            "Attend": self._attend,
            "Next": self._next,
            "Submit": self._submit,
            "Score": self._score,
            "Leave": self._leave,
            "Tunnel": self._tunnel,
        }

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        return self._methods[method](peer, requests)

    # -- joining ---------------------------------------------------------------------------------------------

    def _join(self, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        request = _first(pb.JoinRequest, requests)
        protocol = choose_protocol(request.protocol_min, request.protocol_max, request.version)
        settings = self._run.settings
        if request.job not in ("", settings.name):
            raise ProtocolError(f"this server runs the job {settings.name!r}, not {request.job!r}")
        member = self._run.join(peer.name, request.version)
        yield pb.JoinReply(
            protocol=protocol,
            features=FEATURES,
            version=VERSION,
            attempt=member.attempt,
            site=member.name,
            index=member.index,
            count=len(self._run.members),
            settings_json=json.dumps(asdict(settings)),
            started=self._run.rounds is not None,
        ).SerializeToString()

    def _register(self, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        request = _first(pb.RegisterRequest, requests)
        manifest = Manifest.from_proto(request.manifest)
        registration = Registration(
            layout=manifest.layout,
            agreement=dict(request.agreement),
            info=dict(request.info),
            capabilities=frozenset(request.capabilities),
            rounds=request.rounds,
            evaluates=request.evaluates,
            terms=_terms(request.terms_json),
        )
        rounds = self._run.register(peer.name, request.session.attempt, manifest, registration)
        yield pb.RegisterReply(rounds=rounds).SerializeToString()

    def _attend(self, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        attempt = _first(pb.SessionRequest, requests).session.attempt
        ended = threading.Event()
        self._run.attend(peer.name, attempt)
        try:
            if peer.when_gone(ended.set):
                yield pb.Notice(kind="attending").SerializeToString()
                ended.wait()
        finally:
            self._run.absent(peer.name, attempt)

    def _leave(self, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        request = _first(pb.LeaveRequest, requests)
        self._run.leave(peer.name, request.session.attempt, request.reason[:500], early=request.early)
        yield pb.Done().SerializeToString()

    def _tunnel(self, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The streams of one site, until its call ends."""
        self._run.check_attempt(peer.name, first_part(requests).session.attempt)
        yield from self._relay.serve(peer.name, requests, peer.when_gone)

    # -- tasks -----------------------------------------------------------------------------------------------

    def _next(self, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        request = _first(pb.NextRequest, requests)
        for offer in self._run.wait_for_task(
            peer.name, request.session.attempt, request.best, BEAT_S, evaluate=request.evaluate
        ):
            if offer is None:
                yield pb.TaskPart(waiting=pb.Waiting()).SerializeToString()
            else:
                yield from self._sent(peer.name, offer, request)

    def _sent(self, name: str, offer: Offer, request: pb.NextRequest) -> Iterator[bytes]:
        """The task's header and frames; the model is leased until the last of them is out."""
        count = 0
        try:
            for message in self._messages(offer, request):
                count += len(message)
                yield message
        finally:
            if offer.model is not None:
                self._run.release(offer.model)
            self._run.count_bytes(offer.kind, offer.round, name, count)

    def _messages(self, offer: Offer, request: pb.NextRequest) -> Iterator[bytes]:
        header = pb.TaskHeader(
            job=self._run.settings.name,
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
        if frames.inline(header.payload, pieces):
            ready[key] = pb.TaskPart(task=header).SerializeToString()
            yield ready[key]
            return
        if request.resume_digest == frames.payload_digest(header.payload):
            header.offset = min(request.resume_from, blob.manifest.nbytes)
        yield pb.TaskPart(task=header).SerializeToString()
        yield from frames.frames(pieces, header.offset)

    # -- updates and reports ---------------------------------------------------------------------------------

    def _submit(self, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        first = next(requests, b"")
        header = _parsed(pb.UpdatePart, first).update
        name, attempt, payload = peer.name, header.session.attempt, header.payload
        digest = frames.payload_digest(payload)
        status = self._run.admit(name, attempt, header.round, header.stage, header.num_examples)
        if status is None:
            facts = _update_fields(header)
            transfer = self._run.spool.begin(name, digest, self._manifest(payload), payload.digests)
            received = len(first)
            try:
                if payload.inline:
                    transfer.receiver.take(payload.inline)
                elif transfer.receiver.manifest.nbytes:
                    yield pb.SubmitReply(send_from=transfer.receiver.arrived).SerializeToString()
                    received += _received(transfer, requests)
                arrays, extras = transfer.receiver.finish()
                check_finite({**arrays, **extras}, where=f"update of {name}, round {header.round}")
                update = Update(job=self._run.settings.name, site=name, arrays=arrays, extras=extras, **facts)
                self._run.strategy.check(update)
            except FederationError:
                self._run.spool.drop(transfer)
                raise
            except BaseException:  # the connection broke: what has arrived is kept for the next attempt
                self._run.spool.broke(transfer)
                raise
            status = self._run.accept(update, transfer.blob, digest, facts, received)
        if status == "late":
            self._run.late(header.round, name, len(first))
        yield pb.SubmitReply(accepted=pb.Accepted(status=status)).SerializeToString()

    def _manifest(self, payload: pb.Payload) -> Manifest:
        """The manifest of an update, which must have the weights that were agreed on (extras may be added)."""
        with self._run.lock:
            if payload.HasField("manifest"):
                manifest = Manifest.from_proto(payload.manifest)
                if manifest.layout != payload.layout:
                    raise ProtocolError("a manifest does not have the layout that its header names")
                self._run.check_weights(manifest)  # before it is kept
                self._run.add_layout(manifest)
            elif payload.layout not in self._run.manifests:
                raise ProtocolError("an update refers to a layout that the server has not seen")
            manifest = self._run.manifests[payload.layout]
            self._run.check_weights(manifest)
        if payload.total_bytes != manifest.nbytes:
            raise ProtocolError(f"an update announces {payload.total_bytes} bytes; its tensors have {manifest.nbytes}")
        return manifest

    def _score(self, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        request = _first(pb.ScoreRequest, requests)
        metrics = from_json(_json(request.metrics_json))
        report = Report(self._run.settings.name, request.version, peer.name, metrics, max(request.num_examples, 1))
        self._run.score(report, request.session.attempt)
        reply = pb.ScoreReply()
        if request.wait:
            together, reply.stop = self._run.wait_for_scores(peer.name, request.session.attempt, request.version)
            reply.metrics_json = json.dumps(dict(together))
        yield reply.SerializeToString()


def _received(transfer: Transfer, requests: Iterator[bytes]) -> int:
    """Take frames until the payload is whole; returns the bytes of the messages."""
    count = 0
    while transfer.receiver.arrived < transfer.receiver.manifest.nbytes:
        message = next(requests, b"")
        if not frames.is_frame(message):
            raise ProtocolError(f"an upload ended after {transfer.receiver.arrived} bytes")
        transfer.receiver.take(frames.frame_data(message))
        count += len(message)
    return count


def _update_fields(header: pb.UpdateHeader) -> dict[str, Any]:
    """The fields of an Update that are no tensors, as JSON values."""
    if header.content not in ("weights", "delta", "encoded"):
        raise ProtocolError(f"an update of unknown content {header.content!r}")
    return {
        "round": header.round,
        "stage": header.stage,
        "attempt": header.session.attempt,
        "base_version": header.base_version,
        "content": header.content,
        "encoding": header.encoding,
        "num_examples": header.num_examples,
        "local_steps": header.local_steps,
        "metrics": plain(from_json(_json(header.metrics_json))),
    }


def _json(text: str) -> object:
    try:
        return json.loads(text or "{}")
    except ValueError:
        raise ProtocolError("metrics are not JSON") from None


def _terms(text: str) -> Terms:
    """What a script says of the run. Fields that this version does not know are left out."""
    found = _json(text)
    known = {f.name: f.default for f in fields(Terms)}
    try:
        assert isinstance(found, dict)
        terms = Terms(**{name: value for name, value in found.items() if name in known})
        assert terms.content in ("weights", "delta", "encoded") and terms.best_mode in ("min", "max")
        assert isinstance(terms.strategy, str) and isinstance(terms.best_metric, str)
        assert terms.patience is None or int(terms.patience) >= 1
        assert float(terms.min_delta) >= 0
    except (AssertionError, TypeError, ValueError):
        raise ProtocolError("the terms of a registration cannot be read") from None
    return terms


def _parsed(kind: type[M], message: bytes) -> M:
    try:
        return kind.FromString(message)
    except DecodeError:
        raise ProtocolError(f"a message that is no {kind.__name__}") from None


def _first(kind: type[M], requests: Iterator[bytes]) -> M:
    return _parsed(kind, next(requests, b""))
