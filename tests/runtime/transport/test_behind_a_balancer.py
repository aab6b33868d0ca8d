"""A server behind a TCP balancer: found by name, connections that stand idle or are cut, and health checks."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import WAIT_S, Site
from middle import ConnectProxy, SniBalancer
from study import Study, until
from tcp_proxy import TcpProxy

from fl_runtime.client.control import ControlClient
from fl_runtime.client.kit_transport import KitTransport
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.transport import grpc as transport
from fl_runtime.transport.base import Peer
from fl_runtime.transport.grpc import GrpcServer, GrpcTransport
from fl_runtime.types import Arrays, Task

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


# -- by name ------------------------------------------------------------------------------------------------------


class _Balanced:
    """Two federations, whose servers a balancer tells apart by name, on the port 443 that its clients see."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, things: ExitStack) -> None:
        self._things = things
        self.studies = {
            host: things.enter_context(Study(folder / host, (site,), address=f"{host}:443"))
            for host, site in [("liver.example.org", "north"), ("lung.example.org", "south")]
        }
        servers = {host: study.address for host, study in self.studies.items()}
        self.balancer = things.enter_context(SniBalancer(servers))
        names = {f"{host}:443": self.balancer.address for host in servers}
        proxy = things.enter_context(ConnectProxy(names))  # stands for DNS
        for name in ("grpc_proxy", "no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("https_proxy", proxy.url)

    def transport(self, host: str, name: str) -> KitTransport:
        transport = KitTransport(self.studies[host].kits / name, f"{host}:443")
        self._things.callback(transport.close)
        return transport


@pytest.fixture
def balanced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Balanced]:
    with ExitStack() as things:
        yield _Balanced(tmp_path, monkeypatch, things)


def test_each_federation_is_reached_by_the_name_in_its_kits(balanced: _Balanced) -> None:
    for host, sites in [("liver.example.org", ["north"]), ("lung.example.org", ["south"])]:
        assert ControlClient(balanced.transport(host, "ada")).ask("Status")["sites"] == sites
    assert set(balanced.balancer.names) == set(balanced.studies), "no other name is asked for"


def test_a_revoked_server_is_looked_for_by_name_too(balanced: _Balanced) -> None:
    study = balanced.studies["lung.example.org"]
    study.authority.revoke("lena")
    (study.kits / "ada" / "crl.pem").write_bytes((study.authority.folder / "crl.pem").read_bytes())
    assert ControlClient(balanced.transport("lung.example.org", "ada")).ask("Status")["sites"] == ["south"]
    assert set(balanced.balancer.names) == {"lung.example.org"}


def test_a_balancer_that_cuts_idle_and_active_connections_costs_no_bit(balanced: _Balanced) -> None:
    """In round 1 it cuts what is idle, in round 2 the upload of a model, in round 3 everything that is open."""
    study, balancer = balanced.studies["liver.example.org"], balanced.balancer
    start = {"w": np.zeros(2**20)}  # 8 MiB
    cuts: list[int] = []
    balancer.idle_s = 0.5

    def change(task: Task) -> Arrays:
        if task.round == 1:
            until(lambda: balancer.idle_cuts, "an idle connection to be cut")
            balancer.idle_s = 3600.0
        elif task.round == 2:
            balancer.cut_at = balancer.passed + 2**21
        else:
            cuts.append(balancer.cut_at)
            balancer.cut()
        return {"w": task.arrays["w"] * 0.75 + np.arange(2**20) / task.round}

    study.job("job", sites=["north"], rounds=3)
    site = Site("north", balanced.transport("liver.example.org", "north"))
    final = site.take_part(start, change, job="job")["w"]
    assert cuts == [0], "the upload of round 2 was cut"
    expected = start["w"]
    for number in (1, 2, 3):
        expected = expected * 0.75 + np.arange(2**20) / number
    np.testing.assert_array_equal(final, expected)
    assert study.server.wait_for_job("job", WAIT_S)
    folder = Path(study.server.outcome("job")["folder"])
    np.testing.assert_array_equal(read_tensors(folder / "model" / "model.safetensors")["w"], expected)


# -- health checks ------------------------------------------------------------------------------------------------


def test_health_checks_leave_nothing_at_the_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Connections without a word, with the header of the PROXY protocol, and TLS without a certificate of ours."""
    with Study(tmp_path) as study:
        host, _, port = study.address.rpartition(":")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        assert study.admin().ask("Status")["sites"]
        lines, open_files = len(study.log()), _open_files()
        capfd.readouterr()
        for _ in range(50):
            for greeting in (b"", b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", b"GET /healthz HTTP/1.1\r\n\r\n"):
                with socket.create_connection((host, int(port)), WAIT_S) as line:
                    line.sendall(greeting)
            with (
                suppress(OSError),
                socket.create_connection((host, int(port)), WAIT_S) as line,
                context.wrap_socket(line, server_hostname="balancer.example.org") as secured,
            ):
                secured.recv(1)
        until(lambda: _open_files() <= open_files, "the server to close the connections")
        assert "".join(capfd.readouterr()) == ""
        assert len(study.log()) == lines, "the audit log names participants only"
        assert study.admin().ask("Status")["sites"]


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
