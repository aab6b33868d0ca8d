"""Which proxy of the environment counts. What happens behind one is in test_through_a_proxy.py."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys

import grpc
import pytest
from middle import ConnectProxy
from study import until

from fl_runtime.errors import ConfigError
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.transport.routes import proxies
from fl_runtime.transport.routes.proxies import proxy_of

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


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *map(str.upper, VARIABLES)):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({}, None),
        ({"http_proxy": DEAD, "https_proxy": DEAD}, "https_proxy"),
        ({"http_proxy": DEAD, "https_proxy": DEAD, "grpc_proxy": DEAD}, "grpc_proxy"),
        ({"https_proxy": DEAD, "grpc_proxy": ""}, None),
        ({"HTTPS_PROXY": DEAD}, None),
        ({"https_proxy": DEAD, "no_proxy": "other.org, Example.org"}, None),
        ({"https_proxy": DEAD, "no_proxy": ".example.org"}, None),
        ({"https_proxy": DEAD, "no_proxy": "FL.example.org"}, None),
        ({"https_proxy": DEAD, "no_proxy": "ample.org"}, "https_proxy"),
        ({"https_proxy": DEAD, "no_proxy": "*.example.org,*"}, "https_proxy"),
        ({"https_proxy": DEAD, "no_proxy": "fl.example.org:8443"}, "https_proxy"),
        ({"https_proxy": DEAD, "no_proxy": "example.org", "no_grpc_proxy": ""}, "https_proxy"),
        ({"https_proxy": DEAD, "no_proxy": "", "no_grpc_proxy": "example.org"}, None),
    ],
)
def test_which_variable_counts(
    environment: dict[str, str], variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = proxy_of("fl.example.org:8443")
    assert (found and found.variable) == variable
    assert [proxy_of(a) for a in ("localhost:1", "a.localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1")] == [
        None
    ] * 5


@pytest.mark.parametrize(
    ("host", "exempt", "direct"),
    [
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("[2001:db8::1]", "2001:db8::/32", True),
        ("[2001:db8::1]", "2001:db8::1", True),
        ("[2001:db8::1]", "[2001:db8::1]", False),
    ],
)
def test_ip_addresses_are_exempt_by_address_and_range(
    host: str, exempt: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", DEAD)
    monkeypatch.setenv("no_proxy", exempt)
    assert (proxy_of(f"{host}:8443") is None) == direct


@pytest.mark.parametrize(
    ("environment", "exempt"),
    [
        ({"https_proxy": "PROXY"}, ""),
        ({"http_proxy": "PROXY", "https_proxy": ""}, ""),
        ({"grpc_proxy": "", "https_proxy": "PROXY"}, ""),
        ({"http_proxy": DEAD, "https_proxy": DEAD, "grpc_proxy": "PROXY"}, ""),
        ({"HTTPS_PROXY": "PROXY"}, ""),
        ({"https_proxy": "PROXY"}, "127.0.0.0/8"),
        ({"https_proxy": "PROXY"}, "127.0.0.1/32"),
        ({"https_proxy": "PROXY"}, "LOCALHOST"),
    ],
)
def test_grpc_itself_would_choose_the_same(
    environment: dict[str, str], exempt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare channel of gRPC to the loopback, for which gRPC has no exemption of its own, is the oracle."""
    with ConnectProxy({}) as proxy, socket.create_server(("127.0.0.2", 0)) as listener:
        for name, value in environment.items():
            monkeypatch.setenv(name, value.replace("PROXY", proxy.url))
        monkeypatch.setenv("no_proxy", exempt)
        with grpc.insecure_channel(f"127.0.0.2:{listener.getsockname()[1]}") as channel:
            call = channel.unary_unary("/nobody/Answers", None, None).future(b"", timeout=30)
            listener.settimeout(0.05)
            until(lambda: proxy.agents or _knocked(listener), "gRPC to connect anywhere")
            call.cancel()
        monkeypatch.setattr(proxies, "is_loopback", lambda address: False)
        assert (proxy_of("127.0.0.2:1") is not None) == bool(proxy.agents)


def _knocked(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("https://ada:geheim@proxy:1", "it begins with https://"),
        ("socks5://ada:geheim@proxy:1", "it begins with socks5://"),
        ("http://ada:ge#heim@proxy:1", "a special character"),
        ("http://ada:geheim@proxy:x", "its port is not a number"),
        ("http://", "it names no host"),
    ],
)
def test_a_variable_that_names_no_usable_proxy_is_refused_before_the_first_call(
    value: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC would connect without the proxy, which ends in a wait for a server that cannot be reached."""
    monkeypatch.setenv("https_proxy", value)
    with pytest.raises(ConfigError, match=fault) as caught:
        GrpcTransport("fl.example.org:8443")
    assert "$https_proxy" in caught.value.what
    assert "fl.example.org to $no_proxy" in caught.value.fix
    assert "ada" not in str(caught.value)
    assert "heim" not in str(caught.value)
    GrpcTransport("127.0.0.1:8443").close()


def test_a_proxy_is_shown_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "ada:s%40fe@proxy.example.org:3128/")
    proxy = proxy_of("fl.example.org:8443")
    assert proxy is not None
    assert str(proxy) == "the proxy in $https_proxy (proxy.example.org:3128)"
    assert base64.b64decode(proxy.authorization.removeprefix("Basic ")) == b"ada:s@fe"
    assert proxy.authorization not in repr(proxy)
