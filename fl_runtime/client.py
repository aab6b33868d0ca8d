"""The site's side of the protocol: join, register, wait for tasks, submit, report, leave.

Calls block and are made by one thread at a time. A call that meets a broken connection is repeated, resuming
transfers where they stopped, until the server has been out of reach for `patience_s`. A call that hears nothing for so
long, where the server says now and then that it is there, is taken for broken too. There is no other deadline.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from fl_runtime.aggregation.metrics.pooling import to_json
from fl_runtime.errors import (
    ConfigError,
    ConnectionLostError,
    FederationError,
    ProtocolError,
    StoreError,
    TransferDamagedError,
)
from fl_runtime.transport.base import Transport
from fl_runtime.transport.malloc import keep_freed_memory
from fl_runtime.transport.shared import SharedFolder
from fl_runtime.transport.tunnel import Stream, Tunnel
from fl_runtime.transport.watchdog import Watchdog, WatchedCall
from fl_runtime.types import Array, Metrics, Report, Summary, Task, Terms, Update
from fl_runtime.version import FEATURES, PROTOCOL, VERSION
from fl_runtime.wire import frames
from fl_runtime.wire.finite import Inspected
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
R = TypeVar("R")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_DAMAGED_TRIES = 4
_GOODBYE_S = 10.0
_BEATS = 4  # while a call is patient
_ALWAYS_ANSWERED = ("Join", "Submit", "Leave")
_WITHOUT_MODEL = ("initial", "evaluated", "share", "aggregate")
_random = random.Random()  # of our own: the user's random state is not ours to advance


@dataclass(frozen=True)
class Welcome:
    """The server's answer to a join. settings: the job's, as in RunSettings. started: rounds have begun already."""

    site: str
    index: int
    count: int
    attempt: int
    settings: Mapping[str, Any]
    started: bool


class SiteClient:
    """One attempt of one site.

    Task arrays are views of one buffer that this object owns and reuses: they are valid until the next task.
    bytes_up, bytes_down: message bytes of tasks and updates so far, as if all had been sent. same_machine: the server
    may be believed when it names a folder for large payloads.
    """

    def __init__(self, transport: Transport, patience_s: float, *, same_machine: bool = False) -> None:
        self._transport, self._patience_s = transport, patience_s
        self._session = pb.Session()
        self._manifests: dict[bytes, Manifest] = {}
        self._sent_layouts: set[bytes] = set()
        self._buffer: Array = np.empty(0, np.uint8)
        self._incoming: _Incoming | None = None
        self._same_machine = same_machine
        self._shared: SharedFolder | None = None
        self._large = False  # whether the weights are too large for a header
        self._presence: _Presence | None = None
        self._watchdog = Watchdog(patience_s)
        self._beats = False  # the server says in every call that waits that it is there
        self._under_way: WatchedCall | None = None
        self._frame_bytes = frames.FRAME_BYTES
        self._sent = 0  # of an upload, the bytes that the server has
        self._heard = 0  # messages of the server: as long as it grows, the server is within reach
        self._closed = False
        self.bytes_up = 0
        self.bytes_down = 0

    def join(self, job: str = "") -> Welcome:
        """Begin an attempt; the server fences off earlier ones."""
        request = pb.JoinRequest(
            protocol_min=PROTOCOL, protocol_max=PROTOCOL, features=FEATURES, version=VERSION, job=job
        )
        reply = self._unary("Join", request, pb.JoinReply)
        settings = json.loads(reply.settings_json)
        self._beats = "beats" in reply.features
        self._session = pb.Session(
            job=settings["name"], attempt=reply.attempt, beat_s=self._patience_s / _BEATS if self._beats else 0.0
        )
        if self._same_machine and reply.shared_folder:
            self._shared = SharedFolder(Path(reply.shared_folder))
        self._frame_bytes = frames.frame_bytes(reply.count)
        self._presence = _Presence(self._begin, pb.SessionRequest(session=self._session))
        return Welcome(reply.site, reply.index, reply.count, reply.attempt, settings, reply.started)

    def register(
        self,
        manifest: Manifest,
        *,
        agreement: Mapping[str, str],
        info: Mapping[str, str],
        capabilities: frozenset[str],
        rounds: int,
        evaluates: bool,
        terms: Terms | None = None,
    ) -> int:
        """The handshake. Waits for all sites; returns the run's rounds. Raises what the comparison found."""
        request = pb.RegisterRequest(
            session=self._session,
            manifest=manifest.to_proto(),
            agreement=dict(agreement),
            info=dict(info),
            capabilities=sorted(capabilities),
            rounds=rounds,
            evaluates=evaluates,
            terms_json=json.dumps(asdict(terms)) if terms else "",
        )
        reply = self._unary("Register", request, pb.RegisterReply)
        self._manifests[manifest.layout] = manifest
        self._sent_layouts.add(manifest.layout)
        self._large = manifest.nbytes > frames.INLINE_BYTES
        if not self._large or self._shared is None:
            keep_freed_memory()  # the weights go in messages
        return reply.rounds

    def next_task(self, *, best: bool = False, evaluate: bool = False, done: str = "") -> Task:
        """Wait for a task and receive its arrays. best: after the last round, the best round's model. evaluate: then,
        another site's model to be scored, kind "evaluate", or "evaluated" when there is none left. done: the stage of
        the last "share" or "aggregate" that this site is through with; it is not given again."""
        return self._patiently(lambda: self._next_task(best, evaluate, done))

    def submit(self, update: Update, inspected: Inspected | None = None) -> str:
        """Send an update; returns what it counted as: used, late, carried or duplicate. Arrays are borrowed.
        inspected: what is known of some of them."""
        manifest = Manifest.of(update.arrays, update.extras)
        digests = manifest.digests(update.arrays, update.extras, inspected)
        pieces = manifest.pieces(update.arrays, update.extras)
        header = pb.UpdateHeader(
            session=self._session,
            round=update.round,
            stage=update.stage,
            base_version=update.base_version,
            content=update.content,
            encoding=update.encoding,
            num_examples=max(update.num_examples, 0),
            local_steps=update.local_steps,
            metrics_json=_metrics_json(update.metrics),
            payload=frames.describe(manifest, digests, known=manifest.layout in self._sent_layouts),
            shared=self._shared is not None,
            finite=inspected is not None and inspected.covers(update.arrays, update.extras),
        )
        part = pb.UpdatePart(update=header)
        small = manifest.nbytes <= frames.INLINE_BYTES
        message = frames.inlined(part, pieces) if small else part.SerializeToString()
        status = self._patiently(lambda: self._send(message, [] if small else pieces))
        self._sent_layouts.add(manifest.layout)
        return status

    def report(self, report: Report, *, wait: bool = False) -> tuple[Metrics, bool]:
        """wait: until all sites have reported on this version; gives the metrics of all together, and whether the
        run ends with it. Without it, ({}, False)."""
        request = pb.ScoreRequest(
            session=self._session,
            version=report.version,
            metrics_json=_metrics_json(report.metrics),
            num_examples=report.num_examples,
            wait=wait,
        )
        reply = self._unary("Score", request, pb.ScoreReply)
        return json.loads(reply.metrics_json or "{}"), reply.stop

    def tunnel(self, accept: Callable[[Stream], None], lost: Callable[[], None]) -> Tunnel:
        """Streams to other sites, in a call of their own; see Tunnel. The caller closes it."""
        keep_freed_memory()  # here they go in messages whatever their size
        return Tunnel(self._transport, self._session, accept, lost)

    def leave(self, reason: str, *, early: bool) -> None:
        """End the attempt. Errors are logged and not raised: there is nothing left to do about them. A server that
        cannot be reached is waited for for a moment: it would wait much longer for this site."""
        patience_s = min(_GOODBYE_S, self._patience_s)
        try:
            request = pb.LeaveRequest(session=self._session, reason=reason, early=early)
            self._unary("Leave", request, pb.Done, patience_s)
        except FederationError as error:
            log.info("leaving without the server's word: %s", error)

    def close(self) -> None:
        self._closed = True
        if self._presence is not None:
            self._presence.close()
        self._watchdog.close()
        self._transport.close()

    # -- calls -----------------------------------------------------------------------------------------------

    def _begin(self, method: str, requests: bytes | Iterator[bytes]) -> WatchedCall:
        call = self._transport.call(method, requests)
        return self._watchdog.begin(call, watched=self._beats or method in _ALWAYS_ANSWERED)

    def _call(self, method: str, requests: bytes | Iterator[bytes]) -> Iterator[bytes]:
        with self._begin(method, requests) as call:
            self._under_way = call
            for message in call:
                self._heard += 1
                yield message

    def _unary(self, method: str, request: Message, reply: type[M], patience_s: float | None = None) -> M:
        waits = "waiting" in reply.DESCRIPTOR.fields_by_name

        def call() -> M:
            for message in self._call(method, request.SerializeToString()):
                answer = _parsed(reply, message)
                if not (waits and answer.HasField("waiting")):
                    return answer
            raise ConnectionLostError(f"the server ended the call {method} without an answer")

        return self._patiently(call, patience_s)

    def _patiently(self, attempt: Callable[[], R], patience_s: float | None = None) -> R:
        """Repeat a call over broken connections, with pauses that grow and vary, while patience lasts. A call that has
        been silent for all of it is made once more: what it has used up may have been the fault of its connection."""
        patience_s = self._patience_s if patience_s is None else patience_s
        given_up_at: float | None = None
        pause_s, heard, damaged, held, spared = _FIRST_PAUSE_S, self._heard, 0, 0, False
        while True:
            began = time.monotonic()
            try:
                return attempt()
            except (ConnectionLostError, StoreError) as error:  # a server whose disk is full may be back soon
                if isinstance(error, TransferDamagedError):
                    held, before = self._held(), held
                    damaged = 1 if held > before else damaged + 1
                if self._closed or damaged == _DAMAGED_TRIES:
                    raise
                now = time.monotonic()
                silent = now - began >= patience_s and not spared
                if given_up_at is None or self._heard != heard or silent:
                    spared = silent
                    given_up_at, pause_s, heard = now + patience_s, _FIRST_PAUSE_S, self._heard
                if now > given_up_at:
                    what = f"{error.what}; gave up after {patience_s:g} s"
                    raise type(error)(what, where=error.where, fix=error.fix) from None
            time.sleep(pause_s * _random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _held(self) -> int:
        """Bytes of the transfer under way that have arrived at the other end, or here."""
        return self._incoming.receiver.arrived if self._incoming is not None else self._sent

    def _next_task(self, best: bool, evaluate: bool, done: str) -> Task:
        request = pb.NextRequest(
            session=self._session, layouts=list(self._manifests), best=best, evaluate=evaluate, done=done
        )
        if self._incoming is not None:
            request.resume_digest = self._incoming.digest
            request.resume_from = self._incoming.receiver.arrived
        header: pb.TaskHeader | None = None
        incoming: _Incoming | None = None  # of this call; what an earlier one has left goes on only by its header
        request.shared = self._large and self._shared is not None
        read = threading.Event()
        first = request.SerializeToString()
        try:
            for message in self._call("Next", _until(first, read) if request.shared else first):
                if frames.is_frame(message):
                    if incoming is None:
                        raise TransferDamagedError("a frame came before its header", fix="look at the network")
                    incoming.receiver.take(frames.frame_data(message))
                else:
                    part = _parsed(pb.TaskPart, message)
                    if part.HasField("waiting"):
                        continue
                    header = part.task
                    self._incoming = incoming = self._expect(header)
                    self.bytes_down += self._read(header.payload, incoming.receiver)
                    read.set()
                self.bytes_down += len(message)
        except TransferDamagedError:
            if self._under_way is not None:
                self._under_way.cancel(broken=True)  # the next try is made on another connection
            raise
        finally:
            read.set()  # whatever happened: nothing waits for it any more
        if header is None:
            raise ConnectionLostError("the server ended the call without a task")
        return self._task(header)

    def _expect(self, header: pb.TaskHeader) -> _Incoming:
        """Make the buffer ready for a payload, or go on with the one that broke off."""
        payload = header.payload
        digest = frames.payload_digest(payload)
        if self._incoming and self._incoming.digest == digest and self._incoming.receiver.arrived == header.offset:
            return self._incoming
        if payload.HasField("manifest"):
            manifest = Manifest.from_proto(payload.manifest)
            self._manifests[manifest.layout] = manifest
            self._sent_layouts.add(manifest.layout)
        if header.kind in _WITHOUT_MODEL:
            return _Incoming(digest, frames.Receiver(Manifest(()), payload.digests, np.empty(0, np.uint8)))
        if payload.layout in self._manifests:
            manifest = self._manifests[payload.layout]
        else:
            raise ProtocolError("a task refers to a layout that this site has not seen")
        if len(self._buffer) != manifest.nbytes:
            self._buffer = np.empty(manifest.nbytes, np.uint8)
        receiver = frames.Receiver(manifest, payload.digests, self._buffer)
        if payload.inline:
            receiver.take(payload.inline)
        return _Incoming(digest, receiver)

    def _read(self, payload: pb.Payload, receiver: frames.Receiver) -> int:
        """Take a payload from the file that its header names, if it does; the bytes read."""
        if not payload.file:
            return 0
        data = self._shared_file(payload.file, receiver.manifest.nbytes)
        self._buffer[receiver.arrived :] = data[receiver.arrived :]
        receiver.filled()
        return len(data)

    def _shared_file(self, name: str, nbytes: int) -> Array:
        if self._shared is None:
            raise ProtocolError("the server names a file, but this site shares none with it")
        return self._shared.payload(name, nbytes)

    def _task(self, header: pb.TaskHeader) -> Task:
        assert self._incoming is not None
        incoming, self._incoming = self._incoming, None
        if incoming.receiver.arrived < incoming.receiver.manifest.nbytes:
            self._incoming = incoming
            raise ConnectionLostError("the server ended the call within a transfer")
        arrays, extras = incoming.receiver.finish()
        return Task(
            job=header.job,
            round=header.round,
            stage=header.stage,
            kind=header.kind,  # type: ignore[arg-type]
            version=header.version,
            arrays=arrays,
            extras=extras,
            config=json.loads(header.config_json or "{}"),
        )

    def _send(self, header: bytes, pieces: list[memoryview]) -> str:
        """One try at an upload: all in the header, or frames from the offset that the server names."""
        if not pieces:
            replies = self._call("Submit", header)
            self.bytes_up += len(header)
        else:
            offset = _Offset()
            replies = self._call("Submit", self._upload(header, pieces, offset))
            try:
                first = _parsed(pb.SubmitReply, next(replies, b""))
                if first.HasField("accepted"):
                    return first.accepted.status
                self._sent = first.send_from
                if first.file:
                    self._write(first.file, pieces)
                offset.give(sum(map(len, pieces)) if first.file else first.send_from)
            finally:
                offset.give(None)  # whatever happened: nobody waits for an offset for ever
        last = _parsed(pb.SubmitReply, next(replies, b""))
        if not last.HasField("accepted"):
            raise ConnectionLostError("the server ended the call without an acknowledgement")
        return last.accepted.status

    def _upload(self, header: bytes, pieces: list[memoryview], offset: _Offset) -> Iterator[bytes]:
        self.bytes_up += len(header)
        yield header
        start = offset.wait()
        if start is None:
            return
        for message in frames.frames(pieces, start, self._frame_bytes):
            self.bytes_up += len(message)
            yield message
            if self._under_way is not None:
                self._under_way.moved()
        if start == sum(map(len, pieces)):
            yield frames.frame([])  # a file has it all

    def _write(self, name: str, pieces: list[memoryview]) -> None:
        """Fill the server's file with an update."""
        nbytes, at = sum(map(len, pieces)), 0
        target = self._shared_file(name, nbytes)
        for piece in pieces:
            target[at : at + len(piece)] = piece
            at += len(piece)
        self.bytes_up += nbytes


@dataclass(frozen=True)
class _Incoming:
    """A payload that is arriving."""

    digest: bytes
    receiver: frames.Receiver


def _until(message: bytes, event: threading.Event) -> Iterator[bytes]:
    """The message, and an empty one when the event is set."""
    yield message
    event.wait()
    yield b""


class _Offset:
    """Where an upload begins: known once the server has answered the header. None: do not send."""

    def __init__(self) -> None:
        self._known = threading.Event()
        self._value: int | None = None

    def give(self, value: int | None) -> None:
        if not self._known.is_set():
            self._value = value
            self._known.set()

    def wait(self) -> int | None:
        self._known.wait()
        return self._value


class _Presence:
    """Holds the Attend call open, so that the server sees at once when this process is gone."""

    def __init__(self, begin: Callable[[str, bytes], WatchedCall], request: pb.SessionRequest) -> None:
        self._begin, self._message = begin, request.SerializeToString()
        self._closed = threading.Event()
        self._call: WatchedCall | None = None
        self._thread = threading.Thread(target=self._hold, name="fl-presence", daemon=True)
        self._thread.start()

    def _hold(self) -> None:
        """Open again after every break; the calls of the site's own thread decide when to give up."""
        pause_s = _FIRST_PAUSE_S
        while not self._closed.is_set():
            try:
                with self._begin("Attend", self._message) as self._call:
                    if self._closed.is_set():
                        self._call.cancel()
                    for _ in self._call:
                        pause_s = _FIRST_PAUSE_S
            except ConnectionLostError:
                log.debug("presence lost; opening it again")
            except FederationError as error:  # fenced off, or the run has failed: the next call will say so
                log.debug("presence ended: %s", error)
                return
            if self._closed.wait(pause_s):
                return
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def close(self) -> None:
        self._closed.set()
        if self._call is not None:
            self._call.cancel()


def _metrics_json(metrics: Mapping[str, float | Summary]) -> str:
    """NumPy's and other libraries' scalars become plain numbers."""
    numbers: dict[str, Any] = {}
    for name, value in metrics.items():
        try:
            numbers |= to_json({str(name): value})
        except (TypeError, ValueError):
            raise ConfigError(f"metric {name!r} is {value!r}, which is no number", fix="leave it out") from None
    return json.dumps(numbers)


def _parsed(kind: type[M], message: bytes) -> M:
    try:
        return kind.FromString(message)
    except DecodeError:
        raise ProtocolError(f"the server's answer is no {kind.__name__}") from None
