"""Streams between sites: whoever ignores the credit of a stream is refused and named, and takes no memory of others."""

from __future__ import annotations

import logging
import queue
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from federation_bench import started
from study import Study, until

from fl_runtime.errors import ConnectionLostError, FederationError, ProtocolError
from fl_runtime.transport.base import Peer
from fl_runtime.transport.tunnel import PEER_BYTES, WINDOW_BYTES, Stream, Tunnel
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

W = {"w": np.zeros(4, np.float32)}
MIB = 2**20
PIECE = bytes(MIB)


class Siege:
    """A run of three sites. North and south have tunnels, and keep every stream that is opened to them."""

    def __init__(self, study: Study) -> None:
        self.study = study
        study.job(rounds=3, min_sites=2)
        self.sites = [study.site(name) for name in study.sites]
        started(self.sites, W)
        self.evil = self.sites[2]
        self.session = pb.Session(job="job", attempt=self.evil.welcome.attempt)
        self.arrived: dict[str, queue.Queue[Stream]] = {"north": queue.Queue(), "south": queue.Queue()}
        self.tunnels = {
            site.name: site.client.tunnel(self.arrived[site.name].put, lambda: None) for site in self.sites[:2]
        }
        for name in self.tunnels:
            until(lambda name=name: self.reach(name), f"the tunnel of {name}")

    def reach(self, name: str) -> bool:
        """Whether a stream from the other honest site arrives, unread."""
        other = self.tunnels["south" if name == "north" else "north"]
        stream = other.open(name, "hello")
        try:
            self.arrived[name].get(timeout=0.2).close()
        except queue.Empty:
            return False
        finally:
            stream.close()
        return True

    def send(self, *parts: pb.TunnelPart | Iterable[pb.TunnelPart]) -> FederationError:
        """Send parts in a tunnel of evil's, and return the error with which it is refused."""
        error = self.offer(*parts, hold_s=30)
        assert error is not None, "the tunnel was not refused"
        return error

    def offer(self, *parts: pb.TunnelPart | Iterable[pb.TunnelPart], hold_s: float) -> FederationError | None:
        """Send parts in a tunnel of evil's that stays open for a while, and return its error, if it gets one."""
        hold = threading.Event()

        def messages() -> Iterator[bytes]:
            yield pb.TunnelPart(session=self.session).SerializeToString()
            for part in parts:
                for item in [part] if isinstance(part, pb.TunnelPart) else part:
                    yield item.SerializeToString()
            hold.wait(hold_s)

        call = self.evil.transport.call("Tunnel", messages())
        try:
            for _ in call:
                pass
        except FederationError as error:
            return error
        finally:
            hold.set()
            call.cancel()
        return None

    def exchange(self, count: int) -> None:
        """Send MiBs from north to south and back, and compare them."""
        first = self.tunnels["north"].open("south", "work")
        second = next(stream for stream in iter(self.arrived["south"].get, None) if stream.name == "work")
        for number in range(count):
            piece = number.to_bytes(8, "big") * (MIB // 8)
            for sender, receiver in ((first, second), (second, first)):
                sender.send(piece)
                assert receiver.receive() == piece
        first.close()
        second.close()

    def peak_during(self, work: Callable[[], object]) -> float:
        """Peak of what Python allocates in this process, server and sites alike, in MiB above its start."""
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        work()
        return (tracemalloc.get_traced_memory()[1] - before) / MIB


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    folder: Path = tmp_path_factory.mktemp("study")
    with Study(folder, ("north", "south", "evil")) as study:
        siege = Siege(study)
        yield siege
        for tunnel in siege.tunnels.values():
            tunnel.close()


@pytest.fixture
def siege(running: Siege) -> Iterator[Siege]:
    yield running
    for arrived in running.arrived.values():
        while not arrived.empty():
            arrived.get().close()


def flood(stream: str, mib: int, peer: str = "north") -> Iterator[pb.TunnelPart]:
    yield pb.TunnelPart(peer=peer, stream=stream, opened="flood")
    for _ in range(mib):
        yield pb.TunnelPart(peer=peer, stream=stream, data=PIECE)


def test_a_site_that_ignores_credit_is_refused_and_takes_no_memory_of_others(siege: Siege) -> None:
    tracemalloc.start(1)
    try:
        quiet = siege.peak_during(lambda: siege.exchange(30))

        def attacked() -> None:
            with ThreadPoolExecutor(1) as pool:
                errors = pool.submit(lambda: [siege.send(flood(f"s{n}", 300)) for n in range(5)])
                siege.exchange(30)
                for error in errors.result(60):
                    assert isinstance(error, ProtocolError)
                    assert "evil has sent more to north than its credit: at most 4194304 bytes" in error.what

        peak = siege.peak_during(attacked)
    finally:
        tracemalloc.stop()
    # 1.5 GiB were on offer. North holds five windows unread, and messages on their way have a few copies.
    assert peak < quiet + 2 * 5 * WINDOW_BYTES / MIB
    lines = [entry for entry in siege.study.refusals() if "more to north than its credit" in entry.get("error", "")]
    assert lines and all("evil" in entry["who"] and entry["action"] == "Tunnel" for entry in lines)


def test_many_streams_within_their_windows_are_bounded_together(siege: Siege) -> None:
    """The server refuses the tunnel, or north has closed streams before it comes to that."""
    each, arrived = WINDOW_BYTES // MIB, siege.arrived["north"].queue
    error = siege.offer(*(flood(f"m{n}", each) for n in range(PEER_BYTES // WINDOW_BYTES + 4)), hold_s=0)
    assert error is None or f"and {PEER_BYTES} in all" in error.what
    assert 0 < sum(stream.unread_bytes for stream in arrived) <= PEER_BYTES
    siege.exchange(3)


def test_data_for_streams_that_nobody_has_opened_reaches_nobody(siege: Siege) -> None:
    north = siege.tunnels["north"]
    before = north.bytes_down
    stray = [pb.TunnelPart(peer="north", stream="none", data=PIECE) for _ in range(64)]
    siege.send(*stray, pb.TunnelPart(peer="nobody", stream="s"))
    siege.exchange(1)
    assert north.bytes_down - before < 4 * MIB


def test_a_site_that_grants_what_it_has_not_been_sent_is_refused(siege: Siege) -> None:
    stream = siege.tunnels["north"].open("evil", "work")  # evil has no tunnel yet
    until(lambda: stream.is_over, "the end of a stream to nobody")
    opened = pb.TunnelPart(peer="north", stream="g", opened="greedy")
    error = siege.send(opened, pb.TunnelPart(peer="north", stream="g", credit=2**40))
    assert "evil grants north a credit of 1099511627776 bytes, and has 0 unread bytes of it" in error.what
    siege.exchange(1)


# -- a site by itself, whatever the server lets through ------------------------------------------------------------


class Passing:
    """A server that passes any parts on to a site, in the name of another one. See `fl_runtime.transport.base`."""

    def __init__(self, parts: Iterable[pb.TunnelPart]) -> None:
        self.parts = parts
        self.sent: list[pb.TunnelPart] = []

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        ended = threading.Event()

        def read() -> None:
            with suppress(Exception):  # the call has ended
                for request in requests:
                    self.sent.append(pb.TunnelPart.FromString(request))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        for part in self.parts:
            yield part.SerializeToString()
        peer.when_gone(ended.set)
        ended.wait(30)


def tunnel_to(service: Passing, study: Study, accept: Callable[[Stream], None]) -> Tunnel:
    study.server._guard.handle = service.handle  # type: ignore[method-assign]
    return Tunnel(study.transport("south"), pb.Session(job="job", attempt=1), accept, lambda: None)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    folder: Path = tmp_path_factory.mktemp("hostile")
    with Study(folder, ("north", "south")) as study:
        yield study


def test_a_receiver_closes_the_stream_of_a_peer_that_sends_more_than_its_credit(
    hostile: Study, caplog: pytest.LogCaptureFixture
) -> None:
    streams: list[Stream] = []
    service = Passing([*flood("a", 64), *flood("b", 1)])
    with caplog.at_level(logging.WARNING):
        tunnel = tunnel_to(service, hostile, streams.append)
        until(lambda: len(streams) == 2 and streams[1].unread_bytes, "the stream after the flood")
    first, second = streams
    assert first.is_over and first.receive() == b"" and first.unread_bytes == 0
    with pytest.raises(ConnectionLostError, match="flood to north is closed"):
        first.send(b"x")
    assert second.receive() == PIECE
    assert [record.getMessage() for record in caplog.records if "north sent more than it may" in record.getMessage()]
    until(lambda: any(part.closed and part.stream == "a" for part in service.sent), "the peer to be told")
    tunnel.close()


def test_a_receiver_bounds_what_all_streams_of_a_peer_hold_closed_ones_too(hostile: Study) -> None:
    streams: list[Stream] = []
    parts: list[pb.TunnelPart] = []
    for number in range(20):
        parts += [*flood(str(number), 4), pb.TunnelPart(peer="north", stream=str(number), closed=True)]
    tunnel = tunnel_to(Passing([*parts, *flood("last", 0, "west")]), hostile, streams.append)
    until(lambda: streams and streams[-1].peer == "west", "the last part")
    held = sum(stream.unread_bytes for stream in streams)
    assert PEER_BYTES - WINDOW_BYTES <= held <= PEER_BYTES
    assert streams[0].receive() == PIECE, "what came before the end of a stream can be read after it"
    tunnel.close()


def test_a_receiver_bounds_the_number_of_streams_of_a_peer_and_opens_none_twice(hostile: Study) -> None:
    streams: list[Stream] = []
    parts = [part for number in range(1_000) for part in (*flood(str(number), 0), *flood("0", 0))]
    tunnel = tunnel_to(Passing([*parts, *flood("last", 0, "west")]), hostile, streams.append)
    until(lambda: streams and streams[-1].peer == "west", "the last part")
    assert len(streams) == 64 + 1
    tunnel.close()


def test_a_peer_cannot_make_a_site_queue_more_than_a_window(hostile: Study) -> None:
    """Credit beyond the window counts as the window, so that data waits where it can be read."""
    hold = threading.Event()

    def parts() -> Iterator[pb.TunnelPart]:
        yield from flood("a", 0)
        yield pb.TunnelPart(peer="north", stream="a", credit=2**40)
        yield from flood("b", 0)
        hold.wait(30)

    streams: queue.Queue[Stream] = queue.Queue()
    tunnel = tunnel_to(Passing(parts()), hostile, streams.put)
    stream = streams.get(timeout=30)
    streams.get(timeout=30)

    def send() -> None:
        with pytest.raises(ConnectionLostError):
            stream.send(bytes(2 * WINDOW_BYTES))

    sending = threading.Thread(target=send)
    sending.start()
    until(lambda: tunnel.bytes_up > WINDOW_BYTES, "a window of data")
    assert sending.is_alive()
    stream.close()
    sending.join(30)
    assert not sending.is_alive() and tunnel.bytes_up < WINDOW_BYTES + MIB
    hold.set()
    tunnel.close()
