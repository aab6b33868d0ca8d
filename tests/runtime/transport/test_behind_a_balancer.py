"""A server behind a TCP balancer: found by name, connections that stand idle or are cut, and health checks."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from federation_bench import WAIT_S
from tcp_proxy import TcpProxy

from fl_runtime.transport import grpc as transport
from fl_runtime.transport.base import Peer
from fl_runtime.transport.grpc import GrpcServer, GrpcTransport

FASTER = 50
FOUR_MINUTES_S = 240 / FASTER


def _faster(options: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The same options with all intervals shorter, but as much patience for an answer to a ping."""
    return [
        (name, value // FASTER if name.endswith("_ms") and "timeout" not in name else value) for name, value in options
    ]


class _Silent:
    """A service whose calls say nothing between their first message and their last."""

    def __init__(self) -> None:
        self.end = threading.Event()

    def handle(self, method: str, peer: Peer, requests: Iterable[bytes]) -> Iterator[bytes]:
        yield b"first"
        self.end.wait(WAIT_S)
        yield b"last"


def test_an_open_call_over_which_nothing_passes_shows_signs_of_life_and_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four minutes, 50 times as fast: balancers cut what is silent for a minute, servers those who ping too often."""
    monkeypatch.setattr(transport, "_CLIENT", _faster(transport._CLIENT))
    monkeypatch.setattr(transport, "_SERVER", _faster(transport._SERVER))
    service: Any = _Silent()
    server = GrpcServer(service, lambda metadata: "site-1", 2, 1)
    with TcpProxy(server.start("127.0.0.1", 0)) as line:
        client = GrpcTransport(line.address)
        call = client.call("Attend", b"")
        assert next(call) == b"first"
        seen = [line.counted()]
        for _ in range(4):
            service.end.wait(FOUR_MINUTES_S / 4)
            seen.append(line.counted())
        service.end.set()
        assert list(call) == [b"last"]
        client.close()
    server.stop(0)
    for before, after in pairwise(seen):
        assert after[0] > before[0], f"the site was silent for a minute: {seen}"
        assert after[1] > before[1], f"the server was silent for a minute: {seen}"
