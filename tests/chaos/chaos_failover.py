"""A queue of jobs under faults of two servers that share a PostgreSQL, of which one serves at a time."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg
from chaos_disk import Disk
from chaos_plan import Fault
from chaos_processes import ChaosError, Process
from chaos_queue import QueueFederation
from chaos_targets import QueueTarget
from postgres import running_postgres
from tcp_proxy import TcpProxy

from fl_adapters.environments.download import download
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConnectionLostError
from fl_runtime.store.postgres import SCHEMA

_TAKE_OVER_S = 60.0  # a lease lasts for 5 s; the machine may be busy
_ASK_S = 0.5
_PATIENCE_S = 120.0
_LOOK_S = 0.05


class FailoverFederation(QueueFederation):
    """One run of a queue target with two servers. The active one is killed and frozen, and the database restarted."""

    servers_count = 2

    def __init__(self, target: QueueTarget, folder: Path, disk: Disk) -> None:
        self._things = ExitStack()
        self._database = self._things.enter_context(running_postgres())
        self._asked_at, self._known = 0.0, dict[str, str]()
        self._outcomes: dict[str, Mapping[str, Any]] = {}
        super().__init__(target, folder, disk)
        self._control = self._things.enter_context(
            closing(ControlClient.of_kit(folder / "kits" / "lena", self._addresses))
        )

    def _server_options(self) -> list[tuple[str, list[str], Path]]:
        store = self.folder / "store.yml"
        store.write_text(f"database: {self._database.url}\ntensors: {self.disk.folder / 'shared'}\n")
        store.chmod(0o600)
        return [
            (name, ["--data", str(self.disk.folder / name), "--store", str(store)], self.folder / f"{name}.txt")
            for name in self._project(self._addresses).server.names
        ]

    def close(self) -> None:
        for server in self.servers:
            if server.status is None:
                server.send(signal.SIGCONT)
        super().close()
        self._things.close()

    # -- faults ------------------------------------------------------------------------------------------------

    def _kill_a_server(self, fault: Fault) -> None:
        active = self._until(self._active, "no server has the lease")
        if fault.direction == "down" and fault.site % 3 == 0:  # one fault in six hits the one that stands by
            standby = next(server for server in self.servers if server is not active)
            self._kill(standby, "kill the standby server", fault)
        else:
            self._kill(active, "kill the active server", fault)

    def _other(self, act: str, fault: Fault, proxies: Sequence[TcpProxy]) -> None:
        match act:
            case "freeze the server":
                self._freeze(fault)
            case "restart the database":
                self._restart_the_database(fault)
            case _:
                super()._other(act, fault, proxies)

    def _freeze(self, fault: Fault) -> None:
        """Stop the active server for a moment, or until the other one has taken over, so that it wakes up too late."""
        active = self._until(self._active, "no server has the lease")
        active.send(signal.SIGSTOP)
        try:
            if fault.direction == "up":
                self._until(lambda: self._active() not in (None, active), f"nobody stands in for {active.name}")
        finally:
            time.sleep(fault.for_s)
            active.send(signal.SIGCONT)
        self.counts["freeze until taken over" if fault.direction == "up" else "freeze for a moment"] += 1

    def _restart_the_database(self, fault: Fault) -> None:
        crashes = fault.direction == "up"
        self._database.stop(signal.SIGQUIT if crashes else signal.SIGINT)
        time.sleep(fault.for_s)
        self._database.start()
        self.counts["crash the database" if crashes else "restart the database"] += 1

    def _active(self) -> Process | None:
        """The server whose lease lasts at this moment, by the database's clock."""
        with psycopg.connect(self._database.url) as connection:
            row = connection.execute(f"SELECT holder FROM {SCHEMA}.lease WHERE until > clock_timestamp()").fetchone()
        name = "" if row is None else str(row[0]).partition(" on ")[0]
        return next((server for server in self.servers if server.name == name), None)

    def _until(self, condition: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + _TAKE_OVER_S
        while True:
            try:
                if found := condition():
                    return found
            except psycopg.errors.UndefinedTable:  # the first server has not made it yet
                pass
            self.watch()
            if time.monotonic() > end:
                raise self._hangs(what)
            time.sleep(_LOOK_S)

    # -- what the servers say ----------------------------------------------------------------------------------

    def _state(self, job: str) -> str:
        if time.monotonic() - self._asked_at > _ASK_S:
            try:
                jobs = self._control.ask("Status", patience_s=0.0)["jobs"]
                self._known = {str(item["job"]): str(item["state"]) for item in jobs}
            except ConnectionLostError:
                pass
            self._asked_at = time.monotonic()
        return self._known.get(job, "")

    def _jobs_there(self) -> set[str]:
        return set(self._known)

    def collect(self) -> None:
        for job in self.target.jobs:
            download(self._control, job, self._results(job), patience_s=_PATIENCE_S)
            self._outcomes[job] = self._control.ask("ShowJob", patience_s=_PATIENCE_S, job=job)["outcome"]

    def _results(self, job: str) -> Path:
        return self.folder / "downloads" / job

    def _rounds(self, job: str) -> dict[int, tuple[str, ...]]:
        if job not in self._outcomes:
            raise ChaosError(f"{job} has no outcome")
        return {int(item["round"]): tuple(item["sites"]) for item in self._outcomes[job]["rounds"]}
