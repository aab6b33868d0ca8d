"""A federation whose sites and admins reach the server through an HTTP proxy, over mutual TLS.

The server is known by names that only the proxy can look up, so nothing could pass beside it.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site
from middle import ConnectProxy, TlsServer
from study import Study, project, until

from fl_adapters.cli.doctor.server_checks import server_checks
from fl_runtime.client.control import ControlClient
from fl_runtime.client.kit_transport import KitTransport
from fl_runtime.errors import ConnectionLostError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.transport.routes.proxies import ProxyError, open_connection
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import read_kit, write_kit
from fl_runtime.types import Arrays, Task

ADDRESS, OTHER = "fl.example.org:8443", "old-name.example.org:8443"
SECRET = "s@fe:Passw%rd/1"
ENCODED = "s%40fe%3APassw%25rd%2F1"
VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy", "no_grpc_proxy")
W = {"w": np.zeros(4)}


class _Named(Study):
    """A federation that was provisioned for a server with a name."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, address=ADDRESS)

    def by_name(self, name: str, address: str = ADDRESS) -> KitTransport:
        transport = KitTransport(self.kits / name, address)
        self._things.callback(transport.close)
        return transport

    def member(self, name: str) -> Site:
        return Site(name, self.by_name(name), 30.0)

    def status(self, address: str = ADDRESS) -> dict[str, Any]:
        return ControlClient(self.by_name("ada", address)).ask("Status")

    def checks(self, name: str = "north") -> dict[str, Any]:
        return {check.name: check for check in server_checks(read_kit(self.kits / name))}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Named]:
    with _Named(tmp_path_factory.mktemp("study")) as study:
        yield study


@pytest.fixture
def proxy(study: _Named, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConnectProxy]:
    """A proxy that wants a password, and has it from the environment."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with ConnectProxy({ADDRESS: study.address, OTHER: study.address}, f"ada:{SECRET}") as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.replace("//", f"//ada:{ENCODED}@"))
        yield proxy


def test_a_job_through_a_proxy_that_dies_ends_with_the_same_model(
    study: _Named, proxy: ConnectProxy, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)

    def quiet(task: Task) -> Arrays:
        return {"w": task.arrays["w"] * 0.75 + 1.0 / task.round}

    def cut_in_round_2(task: Task) -> Arrays:
        if task.round == 2 and not proxy.refused:
            proxy.refuses = True
            proxy.cut()
            until(lambda: proxy.refused, "the proxy to refuse somebody")
            proxy.refuses = False
        return quiet(task)

    models = []
    for name, site_of, north in [("direct", study.site, quiet), ("cut", study.member, cut_in_round_2)]:
        study.job(name, sites=["north", "south"], rounds=3)
        with ThreadPoolExecutor(2) as threads:
            works = [("north", north), ("south", quiet)]
            parts = [threads.submit(site_of(each).take_part, W, change, job=name) for each, change in works]
            finals = [part.result(60)["w"] for part in parts]
        assert study.server.wait_for_job(name, 30)
        folder = Path(study.server.outcome(name)["folder"])
        models += [read_tensors(folder / "model" / "model.safetensors")["w"], *finals]
    for model in models[1:]:
        np.testing.assert_array_equal(models[0], model)
    assert set(proxy.agents) == {"", "grpc-httpcli/0.0"}, "our own connections and gRPC's take the same way"
    assert set(proxy.names) == {ADDRESS}
    told = caplog.text + "".join(capfd.readouterr())
    told += "".join(path.read_text(errors="replace") for path in study.folder.rglob("*") if path.is_file())
    assert SECRET not in told
    assert ENCODED not in told


@pytest.mark.parametrize(
    ("user", "status", "what", "fix"),
    [
        (
            "ada:wrong@",
            0,
            r"does not accept the user name and password .* \(status 407\)",
            "correct them in $https_proxy",
        ),
        ("", 0, r"wants a user name and password \(status 407\)", "add them in $https_proxy"),
        (f"ada:{ENCODED}@", 403, r"does not allow connections to fl\.example\.org:8443", "fl.example.org to $no_proxy"),
        (f"ada:{ENCODED}@", 502, r"cannot connect to fl\.example\.org:8443", "check that the server runs"),
        (f"ada:{ENCODED}@", 418, r"answers with status 418", "check that an HTTP proxy listens"),
    ],
)
def test_a_proxy_that_refuses_is_named_with_the_variable_and_what_to_do(
    study: _Named, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, user: str, status: int, what: str, fix: str
) -> None:
    monkeypatch.setenv("https_proxy", f"http://{user}{proxy.address}")
    proxy.status = status
    with pytest.raises(ConnectionLostError, match=rf"the proxy in \$https_proxy \({proxy.address}\) {what}") as caught:
        study.status()
    assert fix in caught.value.fix
    found = study.checks()
    assert found["proxy"].status == "ok"
    assert found["proxy's answer"].status == "problem"
    assert fix in found["proxy's answer"].fix
    assert "TLS" not in found
    for text in (str(caught.value), str(found)):
        assert "wrong" not in text
        assert ENCODED not in text


def test_a_training_script_says_at_once_that_its_proxy_refuses_it(
    study: _Named, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits all the same: a proxy may be repaired."""
    study.job("late", sites=["north"])
    proxy.status = 407

    def let_in() -> None:
        until(lambda: "(status 407); waiting up to" in caplog.text, "a line about the proxy")
        proxy.status = 0

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(let_in)
        site = Site("north", study.by_name("north"), 60.0)
        site.take_part(W, lambda task: task.arrays, job="late")
        done.result(60)


def test_a_proxy_that_is_down_and_one_that_is_none(
    study: _Named, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{reserved.getsockname()[1]}")
        assert "cannot be reached: Connection refused" in study.checks()["proxy"].detail
        with pytest.raises(ConnectionLostError, match=r"\$https_proxy .* cannot be reached"):
            study.status()
    monkeypatch.setenv("https_proxy", f"http://{study.address}")  # a port that speaks TLS
    with pytest.raises(ConnectionLostError, match=r"\$https_proxy .* does not answer"):
        study.status()


def test_a_proxy_that_answers_a_byte_at_a_time_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is for the whole answer, not for each of its bytes."""
    stop = threading.Event()

    def drip(listener: socket.socket) -> None:
        line, _ = listener.accept()
        with line, suppress(OSError):
            while not stop.wait(0.02):
                line.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        with pytest.raises(ProxyError, match="does not answer .* timed out"):
            open_connection(ADDRESS, 0.2)
        stop.set()
        thread.join()


def test_the_doctor_names_each_step_to_a_server_that_only_the_proxy_can_find(
    study: _Named, proxy: ConnectProxy
) -> None:
    found = study.checks()
    assert {name: check.status for name, check in found.items()} == dict.fromkeys(
        ["proxy", "proxy's answer", "TLS", "server's certificate", "membership", "versions", "clock"], "ok"
    )
    assert found["proxy"].detail == f"$https_proxy names {proxy.address}, which accepts connections"
    assert "fl.example.org" in found["server's certificate"].detail


def test_a_certificate_for_another_name_is_accepted_and_noted(study: _Named, proxy: ConnectProxy) -> None:
    """A server that has moved is still the federation's; only a balancer that goes by names does not find it."""
    assert study.status(OTHER)["federation"] == "study"
    kit = replace(read_kit(study.kits / "north"), address=OTHER, addresses=(OTHER,))
    found = {check.name: check for check in server_checks(kit)}
    assert found["server's certificate"].status == "note"
    assert "it does not have the name old-name.example.org, but fl.example.org" in found["server's certificate"].detail
    assert found["membership"].status == "ok"


def test_a_proxy_that_opens_tls_is_told_from_the_server(study: _Named, proxy: ConnectProxy, tmp_path: Path) -> None:
    """It shows a certificate of its own authority, for the very name."""
    inspector = Authority.create(
        tmp_path / "authority", project(ADDRESS).model_copy(update={"federation": "Inspector"})
    )
    write_kit(tmp_path / "server", inspector, inspector.project.participant("server"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server" / "certificate.pem", tmp_path / "server" / "key.pem")
    with TlsServer(context) as opened:
        proxy.routes[ADDRESS] = opened.address
        with pytest.raises(ConnectionLostError, match="not by this federation's authority") as caught:
            study.status()
        assert "opens TLS on the way" in caught.value.fix
        check = study.checks()["TLS"]
    assert check.status == "problem"
    assert "it is by CN=Inspector" in check.detail
    assert "exempted from that inspection" in check.fix
