"""Hundreds of connections to a server in its own process: its memory stays bounded, and sites are undisturbed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from federation_bench import Site, at_once, started
from study import project, until

import fl_runtime
from fl_runtime.errors import FederationError
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.transport.tls import FileCredentials
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

W = {"w": np.zeros(1_000_000, np.float32)}
IDLE, HALF, SHAKEN = 1000, 100, 60
GROWTH_BYTES = 300 * 2**20


@pytest.fixture
def descriptors() -> int:
    """The number of idle connections that this machine allows."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = IDLE + HALF + SHAKEN + 300
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
    return min(IDLE, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - HALF - SHAKEN - 200)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, int, subprocess.Popen[bytes]]]:
    """Kits, port and process of `fl-adapters server`, with a job of four rounds for north and south."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    authority = Authority.create(tmp_path / "authority", project(f"127.0.0.1:{port}", ("north", "south", "evil")))
    for identity in authority.project.participants():
        write_kit(tmp_path / identity.name, authority, identity)
    (tmp_path / "job.yml").write_text("name: job\napp: x\nrounds: 4\nsites: [north, south]\n")
    environment = os.environ | {"PYTHONPATH": str(Path(fl_runtime.__file__).parents[1])}
    command = [sys.executable, "-m", "fl_adapters.cli", "server", "--kit", "server", "--job", "job.yml", "--json"]
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=err)
    try:
        until(lambda: b"serving at" in (tmp_path / "err").read_bytes(), "the server to serve")
        yield tmp_path, port, process
    finally:
        process.kill()
        process.wait()


def context(kits: Path, name: str) -> ssl.SSLContext:
    tls = ssl.create_default_context(cafile=str(kits / name / "ca.pem"))
    tls.load_cert_chain(kits / name / "certificate.pem", kits / name / "key.pem")
    tls.set_alpn_protocols(["h2"])
    return tls


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


def hello(tls: ssl.SSLContext) -> bytes:
    """Return the first bytes of a TLS handshake."""
    outgoing = ssl.MemoryBIO()
    start = tls.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="server.fl-adapters.internal")
    with contextlib.suppress(ssl.SSLWantReadError):
        start.do_handshake()
    return outgoing.read()


def test_honest_sites_finish_among_a_thousand_idle_and_hostile_connections(server: Any, descriptors: int) -> None:
    kits, port, process = server
    sites = [
        Site(name, GrpcTransport(f"127.0.0.1:{port}", credentials=FileCredentials(kits / name)))
        for name in ("north", "south")
    ]
    tasks = started(sites, W)
    memory = psutil.Process(process.pid).memory_info().rss

    old = context(kits, "evil")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with connected(port) as plain, pytest.raises((ssl.SSLError, ConnectionError)):
        old.wrap_socket(plain, server_hostname="server.fl-adapters.internal")

    with contextlib.ExitStack() as open_:
        for _ in range(descriptors):
            open_.enter_context(connected(port))
        tls = context(kits, "evil")
        greeting = hello(tls)
        for number in range(HALF):  # handshakes that stop in the middle, and things that are no handshake
            line = open_.enter_context(connected(port))
            line.sendall(greeting[: 20 + number] if number % 2 else b"GET / HTTP/1.1\r\n\r\n")
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        for number in range(SHAKEN):  # handshakes that end, and then a call that does not
            line = tls.wrap_socket(connected(port), server_hostname="server.fl-adapters.internal")
            open_.enter_context(line)
            line.sendall((preface + b"\x00\x10\x00\x01\x00\x00\x00\x00\x01")[: 10 + number])
        stop, sent = threading.Event(), list[str]()
        evil = [threading.Thread(target=pester, args=(kits, port, stop, sent), daemon=True) for _ in range(2)]
        for thread in evil:
            thread.start()
        try:
            until(lambda: len(sent) > 2 * 12, "the large messages to be under way")
            finals = at_once(sites, lambda site: to_the_end(site, tasks[site.name]))
        finally:
            grown = psutil.Process(process.pid).memory_info().rss - memory
            stop.set()
            for thread in evil:
                thread.join(30)

    assert process.wait(60) == 0, (kits / "err").read_text()
    outcome = json.loads((kits / "out").read_text())
    assert [item["sites"] for item in outcome["rounds"]] == [["north", "south"]] * 4
    for final in finals:
        np.testing.assert_array_equal(final, np.full(1_000_000, 4 * 1.5, np.float32))
    assert grown < GROWTH_BYTES
    refusals = [json.loads(line) for line in (kits / "server/audit.jsonl").read_text().splitlines()]
    assert {entry["who"] for entry in refusals if entry["outcome"] == "refused"} == {
        "fl-adapters://study/site/evil?organisation=evil-hospital"
    }


def to_the_end(site: Site, task: Any) -> Any:
    step = {"north": 1.0, "south": 2.0}[site.name]
    while task.kind == "train":
        site.submit(task, {"w": task.arrays["w"] + np.float32(step)})
        task = site.client.next_task()
    final = np.copy(task.arrays["w"])
    site.client.leave("done", early=False)
    site.client.close()
    return final


def pester(kits: Path, port: int, stop: threading.Event, sent: list[str]) -> None:
    """Send large messages without a pause, to allowed and forbidden calls; `sent` counts them by method."""
    transport = GrpcTransport(f"127.0.0.1:{port}", credentials=FileCredentials(kits / "evil"))
    large = pb.RegisterRequest(manifest=pb.Manifest(tensors=[pb.Tensor(name=str(n)) for n in range(400_000)]))
    messages = [large.SerializeToString(), b"\xff" * 7_000_000, b"x" * 20_000_000]
    while not stop.is_set():
        for method in ("Register", "SubmitJob", "Submit", "Nonsense"):
            for message in messages:
                with contextlib.suppress(FederationError, KeyError):
                    list(transport.call(method, message))
                sent.append(method)
    transport.close()
