"""Transfers of tensors: tasks that a site downloads and updates that it uploads. Both resume where they broke off."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from fl_runtime.aggregation.metrics.pooling import to_json
from fl_runtime.client.assignment import checked_config
from fl_runtime.client.calls import PatientCalls, parsed
from fl_runtime.client.pace import FramePace
from fl_runtime.errors import ConfigError, ConnectionLostError, ProtocolError, TransferDamagedError
from fl_runtime.text import METRIC_NAMES, is_metric_name, printable
from fl_runtime.transport.shared import SharedFolder
from fl_runtime.types import Array, Summary, Task, TaskKind, Update
from fl_runtime.wire import frames
from fl_runtime.wire.finite import Inspected
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

_GROWTH_TIMES, _GROWTH_BYTES = 8, 2**30
_WITHOUT_MODEL = ("initial", "evaluated", "share", "aggregate", "secure_sum")


@dataclass
class Layouts:
    """The manifests that a site and its server have exchanged, so that messages can refer to them by digest.

    Attributes:
        manifests: Manifests that this site knows, by layout digest.
        at_server: Layout digests of manifests that the server knows from this site.
    """

    manifests: dict[bytes, Manifest] = field(default_factory=dict)
    at_server: set[bytes] = field(default_factory=set)

    def add(self, manifest: Manifest) -> None:
        """Keep a manifest that both ends know."""
        self.manifests[manifest.layout] = manifest
        self.at_server.add(manifest.layout)


@dataclass(frozen=True)
class _Incoming:
    """A payload that is arriving."""

    digest: bytes
    receiver: frames.Receiver


class Downloads:
    """Downloads tasks into one buffer, which is reused: a task's arrays are valid until the next download begins.

    Attributes:
        shared: Folder in which large payloads lie, if site and server share one.
        large: True if the weights do not fit into a header.
        nbytes: Bytes of all messages and shared payloads so far.
    """

    def __init__(self, calls: PatientCalls, layouts: Layouts) -> None:
        self._calls, self._layouts = calls, layouts
        self._buffer: Array = np.empty(0, np.uint8)
        self._incoming: _Incoming | None = None
        self.shared: SharedFolder | None = None
        self.large = False
        self.nbytes = 0

    def task(self, request: pb.NextRequest) -> Task:
        """Wait for a task and receive its arrays, on however many connections that takes."""
        return self._calls.repeat(lambda: self._attempt(request), progress=self._arrived)

    def _arrived(self) -> int:
        return self._incoming.receiver.arrived if self._incoming is not None else 0

    def _attempt(self, request: pb.NextRequest) -> Task:
        request.ClearField("resume_digest")
        request.ClearField("resume_from")
        del request.layouts[:]
        request.layouts.extend(self._layouts.manifests)
        if self._incoming is not None:
            request.resume_digest = self._incoming.digest
            request.resume_from = self._incoming.receiver.arrived
        header: pb.TaskHeader | None = None
        incoming: _Incoming | None = None  # of this call alone; `_expect` decides whether an earlier one is continued
        request.shared = self.large and self.shared is not None
        payload_read = threading.Event()
        first = request.SerializeToString()
        try:
            for message in self._calls.replies("Next", _until(first, payload_read) if request.shared else first):
                if frames.is_frame(message):
                    if incoming is None:
                        raise TransferDamagedError("a frame arrived before its header", fix="look at the network")
                    incoming.receiver.take(frames.frame_data(message))
                else:
                    part = parsed(pb.TaskPart, message)
                    if part.HasField("waiting"):
                        continue
                    header = part.task
                    if header.job != request.session.job:
                        raise ProtocolError(
                            f"the server sends a task of the job {printable(header.job, 100)!r} to a site of "
                            f"{request.session.job}",
                            fix="ask the server's operator",
                        )
                    self._incoming = incoming = self._expect(header)
                    self.nbytes += self._read_shared(header.payload, incoming.receiver)
                    payload_read.set()
                self.nbytes += len(message)
        except TransferDamagedError:
            self._calls.abandon()
            raise
        finally:
            payload_read.set()  # in any case, so that the sending thread does not wait for ever
        if header is None:
            raise ConnectionLostError("the server ended the call without a task")
        return self._finish(header)

    def _expect(self, header: pb.TaskHeader) -> _Incoming:
        """Make the buffer ready for a payload, or go on with the one that broke off."""
        _check_kind(header)
        payload = header.payload
        digest = frames.payload_digest(payload)
        if self._incoming and self._incoming.digest == digest and self._incoming.receiver.arrived == header.offset:
            return self._incoming
        if payload.HasField("manifest"):
            manifest = Manifest.from_proto(payload.manifest)
            self._check_size(manifest)
            self._layouts.add(manifest)
        if header.kind in _WITHOUT_MODEL or (header.kind == "best" and not header.HasField("payload")):
            return _Incoming(digest, frames.Receiver(Manifest(()), payload.digests, np.empty(0, np.uint8)))
        expected = self._layouts.manifests.get(payload.layout)
        if expected is None:
            raise ProtocolError("a task refers to a layout that this site has not seen")
        if len(self._buffer) != expected.nbytes:
            self._buffer = np.empty(expected.nbytes, np.uint8)
        receiver = frames.Receiver(expected, payload.digests, self._buffer)
        if payload.inline:
            receiver.take(payload.inline)
        return _Incoming(digest, receiver)

    def _check_size(self, manifest: Manifest) -> None:
        """Refuse a model that is far larger than any before, before memory is taken for it. Trees may grow."""
        known = max((item.nbytes for item in self._layouts.manifests.values()), default=0)
        most = _GROWTH_TIMES * known + _GROWTH_BYTES
        if manifest.nbytes > most:
            raise ProtocolError(
                f"the server announces a model of {manifest.nbytes} bytes to a site that knows one of {known}; the "
                f"limit is {most}",
                fix="ask the server's operator",
            )

    def _read_shared(self, payload: pb.Payload, receiver: frames.Receiver) -> int:
        """Take a payload from the file that its header names, if it names one; returns the bytes read."""
        if not payload.file:
            return 0
        data = _shared_payload(self.shared, payload.file, receiver.manifest.nbytes)
        self._buffer[receiver.arrived :] = data[receiver.arrived :]
        receiver.filled()
        return len(data)

    def _finish(self, header: pb.TaskHeader) -> Task:
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
            config=checked_config(header),
        )


def _check_kind(header: pb.TaskHeader) -> None:
    """Raise ProtocolError for a task whose kind is unknown, or does not go with its round."""
    fits = {"initial": header.round == 0, "train": header.round >= 1}
    if header.kind not in get_args(TaskKind) or not fits.get(header.kind, True):
        raise ProtocolError(
            f"the server sends a task of kind {header.kind[:40]!r} in round {header.round}, which no run has",
            fix="run the same version of fl-adapters at server and site",
        )


class Uploads:
    """Uploads updates. Their arrays are borrowed while `update` runs.

    Attributes:
        shared: Folder in which large payloads lie, if site and server share one.
        frame_bytes: Most bytes of the frames that a large payload is cut into, if the server does not say.
        nbytes: Bytes of all messages and shared payloads so far.
    """

    def __init__(self, calls: PatientCalls, layouts: Layouts) -> None:
        self._calls, self._layouts = calls, layouts
        self._at_server = 0  # bytes of the current upload that the server has
        self.shared: SharedFolder | None = None
        self.frame_bytes = frames.FRAME_BYTES
        self._pace = FramePace(frames.FRAME_BYTES)
        self.nbytes = 0

    def update(self, session: pb.Session, update: Update, inspected: Inspected | None) -> str:
        """Upload an update; returns what it counts as."""
        manifest = Manifest.of(update.arrays, update.extras)
        digests = manifest.digests(update.arrays, update.extras, inspected)
        pieces = manifest.pieces(update.arrays, update.extras)
        header = pb.UpdateHeader(
            session=session,
            round=update.round,
            stage=update.stage,
            base_version=update.base_version,
            content=update.content,
            encoding=update.encoding,
            num_examples=max(update.num_examples, 0),
            local_steps=update.local_steps,
            metrics_json=metrics_json(update.metrics),
            payload=frames.describe(manifest, digests, known=manifest.layout in self._layouts.at_server),
            shared=self.shared is not None,
            finite=inspected is not None and inspected.covers(update.arrays, update.extras),
            train_s=update.train_s,
            waits=True,
        )
        part = pb.UpdatePart(update=header)
        small = manifest.nbytes <= frames.INLINE_BYTES
        message = frames.inlined(part, pieces) if small else part.SerializeToString()
        accepted = self._calls.repeat(
            lambda: self._attempt(message, [] if small else pieces), progress=lambda: self._at_server
        )
        self._layouts.at_server.add(manifest.layout)
        return accepted.status

    def files(self, session: pb.Session, files: Mapping[str, bytes], weights_file: str) -> pb.Accepted:
        """Upload small files that go with the final model; returns what becomes of them."""
        arrays = {name: np.frombuffer(data, np.uint8) for name, data in files.items()}
        manifest = Manifest.of(arrays)
        header = pb.FilesHeader(
            session=session,
            payload=frames.describe(manifest, manifest.digests(arrays, {}), known=False),
            weights_file=weights_file,
        )
        message, pieces = pb.FilesPart(files=header).SerializeToString(), manifest.pieces(arrays, {})
        return self._calls.repeat(lambda: self._attempt(message, pieces, "Files"), progress=lambda: self._at_server)

    def _attempt(self, header: bytes, pieces: list[memoryview], method: str = "Submit") -> pb.Accepted:
        """One try: all in the header, or frames from the offset that the server names."""
        if not pieces:
            replies = self._calls.replies(method, header)
            self.nbytes += len(header)
        else:
            offset = _Offset()
            replies = self._calls.replies(method, self._messages(header, pieces, offset))
            try:
                first = _answer(replies)
                if first.HasField("accepted"):
                    return first.accepted
                self._at_server = first.send_from
                if first.file:
                    self._write_shared(first.file, pieces)
                self._pace = FramePace(min(first.frame_bytes, frames.FRAME_BYTES) or self.frame_bytes)
                offset.give(sum(map(len, pieces)) if first.file else first.send_from)
            finally:
                offset.give(None)  # in any case, so that the sending thread does not wait for ever
        last = _answer(replies)
        if not last.HasField("accepted"):
            raise ConnectionLostError("the server ended the call without an acknowledgement")
        return last.accepted

    def _messages(self, header: bytes, pieces: list[memoryview], offset: _Offset) -> Iterator[bytes]:
        self.nbytes += len(header)
        yield header
        start = offset.wait()
        if start is None:
            return
        pace = self._pace
        for message in pace.sent(frames.frames(pieces, start, pace.frame_bytes)):
            self.nbytes += len(message)
            yield message
            self._calls.progressed()
        if start == sum(map(len, pieces)):
            yield frames.frame([])  # the whole payload lies in a file

    def _write_shared(self, name: str, pieces: list[memoryview]) -> None:
        """Fill the server's file with an update."""
        nbytes, at = sum(map(len, pieces)), 0
        target = _shared_payload(self.shared, name, nbytes)
        for piece in pieces:
            target[at : at + len(piece)] = piece
            at += len(piece)
        self.nbytes += nbytes


def _answer(replies: Iterator[bytes]) -> pb.SubmitReply:
    """The server's next reply that is more than a sign of life."""
    for message in replies:
        reply = parsed(pb.SubmitReply, message)
        if not reply.HasField("waiting"):
            return reply
    raise ConnectionLostError("the server ended the call without an acknowledgement")


class _Offset:
    """Where an upload begins, known once the server has answered the header; None if nothing is to be sent."""

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


def metrics_json(metrics: Mapping[str, float | Summary]) -> str:
    """Metrics as JSON text. Scalars of NumPy and other libraries become plain numbers.

    Raises ConfigError for a metric that is not a number, or has a name that no metric can have.
    """
    numbers: dict[str, Any] = {}
    for name, value in metrics.items():
        if not is_metric_name(str(name)):
            raise ConfigError(f"a metric cannot be called {str(name)[:50]!r}", fix=METRIC_NAMES)
        try:
            numbers |= to_json({str(name): value})
        except (TypeError, ValueError):
            raise ConfigError(f"metric {name!r} is {value!r}, which is not a number", fix="leave it out") from None
    return json.dumps(numbers)


def _shared_payload(shared: SharedFolder | None, name: str, nbytes: int) -> Array:
    if shared is None:
        raise ProtocolError("the server names a shared file, but this site shares no folder with it")
    return shared.payload(name, nbytes)


def _until(message: bytes, event: threading.Event) -> Iterator[bytes]:
    """The message, and an empty one when the event is set."""
    yield message
    event.wait()
    yield b""
