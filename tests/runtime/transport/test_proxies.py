"""Proxies in the environment: never used for this machine's own addresses, and named by the doctor."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from fl_adapters.cli.doctor import kit_checks
from fl_runtime.errors import ConnectionLostError
from fl_runtime.transport.proxies import open_connection, proxy_variable

DEAD = "http://127.0.0.1:9"
VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy", "no_grpc_proxy")
ECHO = "from fl_adapters.cli.doctor.command import _echo; print(repr(_echo()))"


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_connection_to_this_machine_uses_no_proxy(variable: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {variable: DEAD}
    done = subprocess.run(
        [sys.executable, "-c", ECHO], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "''", done.stdout + done.stderr


def test_the_proxy_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert proxy_variable("fl.example.org:8443") is None
    monkeypatch.setenv("http_proxy", DEAD)
    monkeypatch.setenv("https_proxy", DEAD)
    assert proxy_variable("fl.example.org:8443") == "https_proxy"
    assert [proxy_variable(a) for a in ("localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1")] == [None] * 4
    monkeypatch.setenv("no_proxy", "other.org, example.org")
    assert proxy_variable("fl.example.org:8443") is None


def test_the_doctor_names_a_proxy_that_may_be_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise ConnectionLostError("the server does not answer")

    monkeypatch.setattr("fl_adapters.cli.federation.connection.connected", lost)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    kit = SimpleNamespace(folder=".", address="fl.example.org:8443")
    assert "certificate" in next(kit_checks._answers(kit)).fix  # type: ignore[arg-type]
    monkeypatch.setenv("https_proxy", DEAD)
    check = next(kit_checks._answers(kit))  # type: ignore[arg-type]
    assert check.status == "problem"
    assert "$https_proxy" in check.fix
    assert "fl.example.org to $no_proxy" in check.fix


def test_our_own_connections_take_the_proxy_that_grpc_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy is on the loopback; it gets the secret of its URL, and what follows its answer is the server's."""
    asked: list[bytes] = []

    def answer(status: bytes) -> None:
        connection, _ = listener.accept()
        with connection:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += connection.recv(1000)
            asked.append(head)
            connection.sendall(b"HTTP/1.1 " + status + b"\r\nVia: here\r\n\r\nhello of the server")

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("https_proxy", f"http://ada:s%40fe@127.0.0.1:{listener.getsockname()[1]}")
        for status in (b"200 OK", b"403 Forbidden"):
            thread = threading.Thread(target=answer, args=(status,))
            thread.start()
            if status == b"200 OK":
                with open_connection("fl.example.org:8443", 30.0) as connection:
                    assert connection.recv(1000) == b"hello of the server"
            else:
                with pytest.raises(OSError, match=r"the proxy in \$https_proxy refuses"):
                    open_connection("fl.example.org:8443", 30.0)
            thread.join()
    lines = asked[0].decode().split("\r\n")
    assert lines[:2] == ["CONNECT fl.example.org:8443 HTTP/1.1", "Host: fl.example.org:8443"]
    assert base64.b64decode(lines[2].removeprefix("Proxy-Authorization: Basic ")) == b"ada:s@fe"
