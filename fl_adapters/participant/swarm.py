"""A site's part in rounds whose mean the sites form themselves (`Swarm`).

The server gets a receipt for each update. When it has those of all sites, it asks one of them to be the aggregator:
that one opens a stream to each of the others, through the server and sealed, takes their updates in the order of the
job, one at a time, and submits the mean. A site keeps its update until its next task.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from fl_runtime.aggregation import make_strategy
from fl_runtime.aggregation.swarm import CAPABILITY, RECEIPT, missing
from fl_runtime.client import SiteClient
from fl_runtime.errors import ConfigError, ConnectionLostError, UpdateRefusedError
from fl_runtime.transport.tunnel import Stream, Tunnel
from fl_runtime.trust.secure_stream import SecureStream, check_available
from fl_runtime.types import Array, Arrays, ServerState, Task, Update
from fl_runtime.wire.finite import check_finite
from fl_runtime.wire.manifest import Manifest

log = logging.getLogger(__name__)

__all__ = ["CAPABILITY", "SwarmSite", "is_swarm"]

_PIECE_BYTES = 2**19
_REACH_S, _LOOK_S = 5.0, 1.0
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_MOST_STREAMS = 64


def is_swarm(strategy: str | None) -> bool:
    """Whether the job's strategy has the sites form the mean."""
    try:
        return strategy is not None and make_strategy(strategy).relayed
    except ConfigError:  # one that this version does not know; the handshake says what it needs
        return False


class Seal(Protocol):
    def __call__(self, stream: Stream) -> SecureStream: ...


class SwarmSite:
    """Used by the session's thread; the tunnel's own threads hand it the streams that others open.

    seal: `Session.seal`. patience_s: how long the aggregator waits for a site that says nothing. deadline_s: how long
    a site waits for its aggregator to take an update.
    """

    def __init__(self, client: SiteClient, me: str, seal: Seal, patience_s: float, deadline_s: float) -> None:
        """ConfigError where streams cannot be sealed."""
        check_available(me)
        self._client, self._me, self._seal = client, me, seal
        self._patience_s, self._deadline_s = patience_s, deadline_s
        self._changed = threading.Condition()
        self._opened: dict[str, Stream] = {}  # by name; from other sites
        self._tunnel: Tunnel | None = None
        self._closed = False
        self._update: Update | None = None
        self._done = ""
        self._since, self._pause_s = 0.0, _PAUSE_S

    def start(self) -> None:
        """Others may reach this site from here on."""
        self._connect()

    def close(self) -> None:
        with self._changed:
            self._closed, tunnel = True, self._tunnel
            self._changed.notify_all()
        if tunnel is not None:
            tunnel.close()

    def receipt(self, update: Update) -> Update:
        """What the server gets for an update, which is copied and kept here."""
        if update.content != "weights" or update.encoding:
            raise ConfigError(
                "under swarm the sites' weights travel as they are, and a filter of this site changes or encodes them",
                where=f"{self._me}, policy",
                fix="take the filter off the policy, or do not take part in jobs with this strategy",
            )
        self._update = replace(update, arrays=_copied(update.arrays), extras=_copied(update.extras))
        return replace(update, arrays={}, extras={}, content="encoded", encoding=RECEIPT)

    def next_task(self) -> Task:
        """The next task for the trainer; what other sites need of this one is done meanwhile."""
        while True:
            task = self._client.next_task(done=self._done)
            if task.kind == "share":
                self._share(task)
            elif task.kind == "aggregate":
                self._aggregate(task)
            else:
                self._forget()
                return task

    # -- sharing ---------------------------------------------------------------------------------------------

    def _share(self, task: Task) -> None:
        """Send the update to the aggregator. If that fails, the server says what happens next."""
        stream = self._stream_of(task)
        if stream is None:
            return
        update = self._current()
        manifest = Manifest.of(update.arrays, update.extras)
        watch = threading.Timer(self._deadline_s, stream.close)
        watch.daemon = True
        watch.start()
        try:
            sealed = self._seal(stream)
            sealed.meet()
            sealed.send(manifest.layout)
            for piece in manifest.pieces(update.arrays, update.extras):
                for start in range(0, len(piece), _PIECE_BYTES):
                    sealed.send(bytes(piece[start : start + _PIECE_BYTES]))
            if sealed.receive() == b"taken":
                self._done = task.stage
        except ConnectionLostError as error:
            log.info("%s could not send its update to %s: %s", self._me, stream.peer, error)
            time.sleep(_PAUSE_S)
        finally:
            watch.cancel()
            stream.close()

    def _stream_of(self, task: Task) -> Stream | None:
        """What the aggregator has opened for this try; None if it has not, for a while, or is at another."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._opened) or self._closed, _LOOK_S)
            stream = self._opened.pop(task.stage, None)
            others, self._opened = list(self._opened.values()), {}
        for other in others:
            other.close()
        if stream is not None and stream.peer != task.config.get("to"):
            stream.close()
            return None
        return stream

    # -- aggregating -----------------------------------------------------------------------------------------

    def _aggregate(self, task: Task) -> None:
        """Form the mean, and submit it; or submit whose update has not come."""
        update, sites = self._current(), task.config["sites"]
        streams = {
            name: _Incoming(name, task.stage, self._open, self._seal) for name, _, _ in sites if name != self._me
        }
        made = make_strategy(task.config["strategy"]).aggregator({}, _allocated, {}, ServerState())
        buffer = np.empty(Manifest.of(update.arrays, update.extras).nbytes, np.uint8)
        answer = replace(update, stage=task.stage, metrics={}, num_examples=sum(n for _, n, _ in sites))
        name = self._me
        try:
            for name, num_examples, weight in sites:
                mine = name == self._me
                theirs = update if mine else streams[name].received(update, buffer, self._patience_s)
                made.add(replace(theirs, site=name, num_examples=num_examples, site_weight=weight))
            arrays, extras = made.result()
            answer = replace(answer, arrays=arrays, extras=extras)
        except (ConnectionLostError, UpdateRefusedError) as error:
            log.warning("the update of %s has not come: %s", name, error)
            answer = replace(answer, arrays={}, extras={}, content="encoded", encoding=missing(name))
        finally:
            for stream in streams.values():
                stream.close()
        self._client.submit(answer)
        self._done = task.stage

    def _open(self, peer: str, name: str) -> Stream:
        with self._changed:
            tunnel = self._tunnel
        if tunnel is None:
            raise ConnectionLostError("the way to other sites is broken")
        return tunnel.open(peer, name)

    # -- the tunnel ------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._since = time.monotonic()
        tunnel = self._client.tunnel(self._accept, self._lost)
        with self._changed:
            self._tunnel, closed = tunnel, self._closed
        if closed:
            tunnel.close()

    def _lost(self) -> None:
        """The call has ended, as when the server is started again: make it anew. Called in the tunnel's own thread."""
        now = time.monotonic()
        self._pause_s = _PAUSE_S if now - self._since > _LONGEST_PAUSE_S else min(2 * self._pause_s, _LONGEST_PAUSE_S)
        with self._changed:
            self._changed.wait_for(lambda: self._closed, self._pause_s)
        if not self._closed:
            self._connect()

    def _accept(self, stream: Stream) -> None:
        with self._changed:
            if len(self._opened) < _MOST_STREAMS and not self._closed:
                self._opened[stream.name] = stream
                self._changed.notify_all()
                return
        stream.close()

    def _current(self) -> Update:
        if self._update is None:
            raise ConfigError("the server asks for an update that this process does not have", where=self._me)
        return self._update

    def _forget(self) -> None:
        """A new round: what belongs to the last one is not needed any more."""
        with self._changed:
            streams, self._opened = list(self._opened.values()), {}
        for stream in streams:
            stream.close()
        self._update = None


class _Incoming:
    """One site's update on its way to the aggregator. It is asked for when this is made."""

    def __init__(self, peer: str, name: str, open_stream: Callable[[str, str], Stream], seal: Seal) -> None:
        self._peer, self._name, self._open, self._seal = peer, name, open_stream, seal
        self._stream: Stream | None = None
        self._sealed: SecureStream | None = None
        self._try()

    def received(self, like: Update, buffer: Array, patience_s: float) -> Update:
        """The update, in `buffer`. ConnectionLostError or UpdateRefusedError if it does not come, or is not like the
        aggregator's own."""
        sealed = self._met(patience_s)
        manifest = Manifest.of(like.arrays, like.extras)
        if self._patiently(sealed.receive, patience_s) != manifest.layout:
            raise ConnectionLostError(f"{self._peer} has sent other tensors than agreed, or nothing")
        at = 0
        while at < manifest.nbytes:
            piece = self._patiently(sealed.receive, patience_s)
            if not piece or at + len(piece) > manifest.nbytes:
                raise ConnectionLostError(f"{self._peer} has sent {at + len(piece)} of {manifest.nbytes} bytes")
            buffer[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
        arrays, extras = manifest.views(buffer)
        check_finite({**arrays, **extras}, where=f"update of {self._peer}, round {like.round}")
        sealed.send(b"taken")
        return replace(like, arrays=arrays, extras=extras)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _met(self, patience_s: float) -> SecureStream:
        """The stream, once the other end has answered; it may be on its way back to the server."""
        until = time.monotonic() + min(_REACH_S, patience_s)
        while True:
            try:
                if self._sealed is None:
                    raise ConnectionLostError(f"{self._peer} is not there")
                self._patiently(self._sealed.meet, patience_s)
                return self._sealed
            except ConnectionLostError:
                self.close()
                if time.monotonic() > until:
                    raise
            time.sleep(_PAUSE_S)
            self._try()

    def _try(self) -> None:
        try:
            self._stream = self._open(self._peer, self._name)
            self._sealed = self._seal(self._stream)
        except ConnectionLostError:
            self._sealed = None

    def _patiently(self, wait: Callable[[], bytes | None], patience_s: float) -> bytes:
        """wait(), which ends when the stream is closed: after so long without a word."""
        assert self._stream is not None
        watch = threading.Timer(patience_s, self._stream.close)
        watch.daemon = True
        watch.start()
        try:
            return wait() or b""
        finally:
            watch.cancel()


def _copied(arrays: Arrays) -> dict[str, Array]:
    return {name: np.array(array) for name, array in arrays.items()}


def _allocated(arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
    return _empty(arrays), _empty(extras)


def _empty(arrays: Arrays) -> dict[str, Array]:
    return {name: np.empty(array.shape, array.dtype) for name, array in arrays.items()}
