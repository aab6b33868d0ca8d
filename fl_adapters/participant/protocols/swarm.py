"""Swarm rounds at a site: a site, not the server, aggregates.

The server receives a receipt for each update instead of its tensors. When it has the receipts of all sites, it chooses
one of them as the aggregator. That site opens an encrypted stream to each of the others through the server, takes
their updates one at a time in the job's order, and submits the mean. A site keeps its update until its next task.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from fl_runtime.aggregation.swarm import RECEIPT, missing
from fl_runtime.client import SiteClient
from fl_runtime.errors import ConfigError, ConnectionLostError, UpdateRefusedError
from fl_runtime.transport.tunnel import Stream, Tunnel
from fl_runtime.trust.streams.secure_stream import SecureStream, check_available
from fl_runtime.types import Array, Arrays, Report, ServerState, Strategy, Task, Update
from fl_runtime.wire.finite import check_finite, largest_value
from fl_runtime.wire.manifest import Manifest

log = logging.getLogger(__name__)

_PIECE_BYTES = 2**19
_CONNECT_S, _STREAM_S = 5.0, 1.0
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_MOST_STREAMS = 64


Seal: TypeAlias = Callable[[Stream], SecureStream]
"""A function that encrypts a stream to another site."""


class SwarmSite:
    """A site's part in swarm rounds: shares its update with the aggregator, or aggregates. A `RoundProtocol`.

    The session's thread calls the methods. Threads of the tunnel bring the streams that other sites open.
    """

    def __init__(
        self,
        client: SiteClient,
        me: str,
        seal: Seal,
        strategy: Strategy,
        patience_s: float,
        deadline_s: float,
        check: Callable[[Task], None],
    ) -> None:
        """Check that streams can be encrypted; `start` connects.

        Args:
            client: The connection to the server.
            me: Name of this site.
            seal: Encrypts a stream; see `Session.seal`.
            strategy: The job's strategy, whose aggregator runs here.
            patience_s: Seconds for which the aggregator waits for a site that does not answer.
            deadline_s: Seconds for which a site waits until its aggregator has taken its update.
            check: Called with every task of sharing or aggregating; raises if the policy refuses the round.

        Raises:
            ConfigError: The package for encryption is not installed.
        """
        check_available(me)
        self._client, self._me, self._seal, self._strategy = client, me, seal, strategy
        self._patience_s, self._deadline_s, self._check = patience_s, deadline_s, check
        self._changed = threading.Condition()
        self._opened: dict[str, Stream] = {}  # streams from other sites, by name
        self._tunnel: Tunnel | None = None
        self._closed = False
        self._update: Update | None = None
        self._done = ""
        self._since, self._pause_s = 0.0, _PAUSE_S

    def start(self) -> None:
        """Open the tunnel: from now on, other sites can reach this one."""
        self._connect()

    def close(self) -> None:
        """Close the tunnel and its streams."""
        with self._changed:
            self._closed, tunnel = True, self._tunnel
            self._changed.notify_all()
        if tunnel is not None:
            tunnel.close()

    def outgoing(self, update: Update) -> Update:
        """Keep a copy of an update for the aggregator.

        Args:
            update: This round's update, with plain weights. Borrowed for the call.

        Returns:
            The receipt that the server receives: the update without its tensors.

        Raises:
            ConfigError: A filter of this site has changed or encoded the weights.
        """
        if update.content != "weights" or update.encoding:
            raise ConfigError(
                "under swarm, weights must travel unchanged, but a filter of this site changes or encodes them",
                where=f"{self._me}, policy",
                fix="remove the filter from the policy, or do not take part in jobs with this strategy",
            )
        self._update = replace(update, arrays=_copied(update.arrays), extras=_copied(update.extras))
        return replace(update, arrays={}, extras={}, content="encoded", encoding=RECEIPT)

    def keeps(self, report: Report) -> bool:
        """Leave reports to the session."""
        return False

    def next_task(self) -> Task:
        """Wait for the next task of the trainer, and share or aggregate updates meanwhile.

        Returns:
            A task of any kind but "share" and "aggregate".
        """
        while True:
            task = self._client.next_task(done=self._done)
            if task.kind in ("share", "aggregate"):
                self._check(task)
            if task.kind == "share":
                self._share(task)
            elif task.kind == "aggregate":
                self._aggregate(task)
            else:
                self._end_round()
                return task

    # -- sharing ---------------------------------------------------------------------------------------------

    def _share(self, task: Task) -> None:
        """Send the update to the aggregator. If that fails, the server decides what happens next."""
        stream = self._stream_of(task)
        if stream is None:
            return
        update = self._current()
        manifest = Manifest.of(update.arrays, update.extras)
        watchdog = threading.Timer(self._deadline_s, stream.close)
        watchdog.daemon = True
        watchdog.start()
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
            watchdog.cancel()
            stream.close()

    def _stream_of(self, task: Task) -> Stream | None:
        """Return the stream that the aggregator opened for this attempt, or None if there is none after a while."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._opened) or self._closed, _STREAM_S)
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
        """Aggregate the updates and submit the mean, or submit the name of the site whose update did not arrive."""
        update, sites = self._current(), task.config["sites"]
        streams = {
            name: _UpdateReceiver(name, task.stage, self._open, self._seal) for name, _, _ in sites if name != self._me
        }
        aggregator = self._strategy.aggregator({}, _allocate, {}, ServerState())
        buffer = np.empty(Manifest.of(update.arrays, update.extras).nbytes, np.uint8)
        answer = replace(update, stage=task.stage, metrics={}, num_examples=sum(n for _, n, _ in sites))
        name, largest = self._me, dict[str, float]()
        try:
            for name, num_examples, weight in sites:
                is_own = name == self._me
                addend = update if is_own else streams[name].receive(update, buffer, self._patience_s)
                aggregator.add(replace(addend, site=name, num_examples=num_examples, site_weight=weight))
                tensors = (*addend.arrays.values(), *addend.extras.values())
                largest[name] = max(map(largest_value, tensors), default=0.0)
            arrays, extras = aggregator.result()
            name = max(largest, key=lambda site: largest[site])  # to blame if finite updates have an infinite mean
            check_finite({**arrays, **extras}, where=f"the mean of round {task.round}")
            answer = replace(answer, arrays=arrays, extras=extras)
        except (ConnectionLostError, UpdateRefusedError) as error:
            log.warning("the update of %s cannot be used: %s", name, error)
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
            raise ConnectionLostError("the connection to other sites is broken")
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
        """Reconnect after the call ended, as when the server is restarted. Called in a thread of the tunnel."""
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
            raise ConfigError("the server asks for an update that this process has not made", where=self._me)
        return self._update

    def _end_round(self) -> None:
        """Drop the update and the streams of the last round."""
        with self._changed:
            streams, self._opened = list(self._opened.values()), {}
        for stream in streams:
            stream.close()
        self._update = None


class _UpdateReceiver:
    """One site's update on its way to the aggregator. The stream is opened on construction."""

    def __init__(self, peer: str, name: str, open_stream: Callable[[str, str], Stream], seal: Seal) -> None:
        self._peer, self._name, self._open, self._seal = peer, name, open_stream, seal
        self._stream: Stream | None = None
        self._sealed: SecureStream | None = None
        self._connect()

    def receive(self, like: Update, buffer: Array, patience_s: float) -> Update:
        """Receive the update into `buffer`.

        Args:
            like: The aggregator's own update, whose tensors this one must match.
            buffer: Bytes of the size of the update. The returned arrays are views of it.
            patience_s: Seconds to wait for each message.

        Returns:
            The update.

        Raises:
            ConnectionLostError: The update did not arrive, or has other tensors.
            UpdateRefusedError: It holds values that are not finite.
        """
        sealed = self._meet(patience_s)
        manifest = Manifest.of(like.arrays, like.extras)
        if self._wait_at_most(sealed.receive, patience_s) != manifest.layout:
            raise ConnectionLostError(f"{self._peer} sent no tensors, or other tensors than agreed")
        offset = 0
        while offset < manifest.nbytes:
            piece = self._wait_at_most(sealed.receive, patience_s)
            if not piece or offset + len(piece) > manifest.nbytes:
                raise ConnectionLostError(f"{self._peer} sent {offset + len(piece)} of {manifest.nbytes} bytes")
            buffer[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)
            offset += len(piece)
        arrays, extras = manifest.views(buffer)
        check_finite({**arrays, **extras}, where=f"update of {self._peer}, round {like.round}")
        sealed.send(b"taken")
        return replace(like, arrays=arrays, extras=extras)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _meet(self, patience_s: float) -> SecureStream:
        """Wait until the other end answers, which may be reconnecting to the server."""
        until = time.monotonic() + min(_CONNECT_S, patience_s)
        while True:
            try:
                if self._sealed is None:
                    raise ConnectionLostError(f"{self._peer} is not connected")
                self._wait_at_most(self._sealed.meet, patience_s)
                return self._sealed
            except ConnectionLostError:
                self.close()
                if time.monotonic() > until:
                    raise
            time.sleep(_PAUSE_S)
            self._connect()

    def _connect(self) -> None:
        try:
            self._stream = self._open(self._peer, self._name)
            self._sealed = self._seal(self._stream)
        except ConnectionLostError:
            self._sealed = None

    def _wait_at_most(self, wait: Callable[[], bytes | None], patience_s: float) -> bytes:
        """Return the result of wait(). The stream is closed after `patience_s`, which ends the wait."""
        assert self._stream is not None
        watchdog = threading.Timer(patience_s, self._stream.close)
        watchdog.daemon = True
        watchdog.start()
        try:
            return wait() or b""
        finally:
            watchdog.cancel()


def _copied(arrays: Arrays) -> dict[str, Array]:
    return {name: np.array(array) for name, array in arrays.items()}


def _allocate(arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
    return _empty(arrays), _empty(extras)


def _empty(arrays: Arrays) -> dict[str, Array]:
    return {name: np.empty(array.shape, array.dtype) for name, array in arrays.items()}
