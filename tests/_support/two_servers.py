"""Two server processes with one store: `fl-adapters server --store`, which a test may kill, freeze and start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from federation_bench import Site
from study import project, until

import fl_runtime
from fl_runtime.client.control import ControlClient
from fl_runtime.client.kit_transport import KitTransport
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import read_kit, write_kit
from fl_runtime.trust.project import Project

STANDS_BY, SERVES, STOPPED = "standing by", "serving at", "not serving any more"


def shared_place(folder: Path) -> str:
    """Where servers share tensors: below `folder`, or below the URL `$FL_ADAPTERS_SHARED_PLACE` (an S3 bucket)."""
    return f"{os.environ.get('FL_ADAPTERS_SHARED_PLACE', '')}{folder}/shared"


class ServerHost:
    """One machine with a server's kit, a folder for runs, and the process of its server."""

    def __init__(self, folder: Path, name: str, store: Path) -> None:
        self.name, self.runs, self._folder, self._store = name, folder / f"runs of {name}", folder, store
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.log = self._folder / f"{self.name}.log"
        kit = self._folder / "kits" / self.name
        command = ["-m", "fl_adapters.cli", "server", "--kit", kit, "--data", self.runs, "--store", self._store]
        root = str(Path(fl_runtime.__file__).parents[1])
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
                stdout=log,
                stderr=log,
            )

    @property
    def standing(self) -> str:
        """What the process has told last about its part."""
        lines = self.log.read_text().splitlines()
        told = [part for line in lines for part in (STANDS_BY, SERVES, STOPPED) if part in line]
        return told[-1] if told else ""

    def wait_for(self, standing: str) -> None:
        until(lambda: self.standing == standing, f"{self.name}: {standing}\n{self.log.read_text()}")

    def send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None


class TwoServers:
    """A federation whose kits name two servers, both of which run."""

    def __init__(self, folder: Path, url: str, sites: tuple[str, ...]) -> None:
        self.folder, self._things = folder, ExitStack()
        ports = _free_ports(2)
        addresses = tuple(f"127.0.0.1:{port}" for port in ports)
        described = Project(**{**project(sites=sites).model_dump(), "server": {"address": addresses}})
        authority = Authority.create(folder / "kits" / "authority", described)
        for identity in described.participants():
            write_kit(folder / "kits" / identity.name, authority, identity)
        self.authority = authority
        store = folder / "store.yml"
        store.write_text(f"database: {url}\ntensors: {shared_place(folder)}\n")
        store.chmod(0o600)
        self.hosts = [ServerHost(folder, name, store) for name in described.server.names]

    @property
    def active(self) -> ServerHost:
        """The host that serves, once there is one."""

        def serving() -> ServerHost | None:
            return next((host for host in self.hosts if host.standing == SERVES), None)

        found: ServerHost = until(serving, "one of the servers to serve")
        return found

    def other(self, host: ServerHost) -> ServerHost:
        return next(item for item in self.hosts if item is not host)

    def start(self) -> None:
        for host in self.hosts:
            host.start()
            host.wait_for(SERVES if host is self.hosts[0] else STANDS_BY)

    def kill_active(self) -> ServerHost:
        """Kill the server that serves, wait for the other one to stand in, and start the first again."""
        host = self.active
        host.kill()
        host.log.write_text("")
        self.other(host).wait_for(SERVES)
        host.start()
        host.wait_for(STANDS_BY)
        return host

    def freeze_active(self) -> Callable[[], None]:
        """Stop the process that serves until the other one stands in; returns what wakes it up."""
        host = self.active
        host.send(signal.SIGSTOP)
        until(lambda: self.other(host).standing == SERVES, "the other server to stand in")
        return lambda: host.send(signal.SIGCONT)

    def transport(self, name: str) -> KitTransport:
        kit = self.folder / "kits" / name
        transport = KitTransport(kit, read_kit(kit).addresses)
        self._things.callback(transport.close)
        return transport

    def site(self, name: str, patience_s: float = 60.0) -> Site:
        return Site(name, self.transport(name), patience_s)

    def ask(self, method: str, **fields: Any) -> dict[str, Any]:
        return ControlClient(self.transport("ada")).ask(method, patience_s=30.0, **fields)

    def close(self) -> None:
        self._things.close()
        for host in self.hosts:
            host.kill()


@contextmanager
def two_servers(folder: Path, url: str, sites: tuple[str, ...]) -> Iterator[TwoServers]:
    """Run two servers with one store for the block."""
    both = TwoServers(folder, url, sites)
    try:
        both.start()
        yield both
    finally:
        both.close()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
