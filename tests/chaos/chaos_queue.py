"""A provisioned federation under faults: its queue of jobs, its server, and the daemons and scripts of its sites."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from chaos_disk import Disk
from chaos_plan import Fault
from chaos_processes import ChaosError, FaultyRun, Process, environment_of
from chaos_targets import HERE, Bits, QueueTarget
from study import project
from tcp_proxy import TcpProxy

from fl_adapters.environments.processes import free_ports
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConfigError, FederationError, StoreError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit
from fl_runtime.trust.project import Project

_PATIENCE_S = 600.0
_STOP_S = 60.0
_LOOK_S = 0.05


class QueueFederation(FaultyRun):
    """One run of a queue target in `folder`; the jobs' files are on `disk`.

    An admin submits all jobs at the start, whatever happens meanwhile. Sites reach the server through proxies.
    """

    def __init__(self, target: QueueTarget, folder: Path, disk: Disk) -> None:
        super().__init__(folder, disk)
        self.target = target
        self._names = tuple(f"site-{index + 1}" for index in range(target.sites))
        self._addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(self.servers_count))
        self._scripts = folder / "scripts"
        self._scripts.mkdir()
        self.proxies = [[TcpProxy(address) for address in self._addresses] for _ in self._names]
        self._provision()
        environment = environment_of() | {"CHAOS_PROCESSES": str(self._scripts)}
        base = [sys.executable, "-m", "fl_adapters.cli"]
        self.servers = [
            Process(name, [*base, "server", "--kit", str(folder / "kits" / name), *options], environment, log)
            for name, options, log in self._server_options()
        ]
        self.server = self.servers[0]
        self.sites = [
            Process(
                name,
                [*base, "site", "--kit", str(folder / "kits" / name), "--restarts", "1000000"],
                environment,
                folder / f"{name}.txt",
            )
            for name in self._names
        ]
        self._submitting = threading.Thread(target=self._submit_all, daemon=True)
        self._submit_error: FederationError | None = None

    servers_count = 1

    def _server_options(self) -> list[tuple[str, list[str], Path]]:
        """For each server its name, the options of its command, and the file of its output."""
        return [("server", ["--data", str(self.disk.folder)], self.folder / "server.txt")]

    @property
    def processes(self) -> list[Process]:
        return [*self.servers, *self.sites]

    def _provision(self) -> None:
        """Write kits whose sites know the servers by the addresses of their proxies."""
        kits = self.folder / "kits"
        authority = Authority.create(kits / "authority", self._project(self._addresses))
        for identity in self._project(self._addresses).participants():
            own = self._addresses
            if identity.name in self._names:
                own = tuple(proxy.address for proxy in self.proxies[self._names.index(identity.name)])
            authority.project = self._project(own)
            write_kit(kits / identity.name, authority, identity)
        command = f"{sys.executable} {HERE / 'queue_site.py'} {self.target.kib}"
        for name in self._names:
            rules = {"apps": {"chaos": command}, "resources": {"processes": self.target.at_once}}
            (kits / name / "policy.yml").write_text(json.dumps(rules))

    def _project(self, addresses: tuple[str, ...]) -> Project:
        listed = addresses if len(addresses) > 1 else addresses[0]
        return Project(**{**project(sites=self._names).model_dump(), "server": {"address": listed}})

    def _submit_all(self) -> None:
        fields = {"app": "chaos", "rounds": self.target.rounds, "min_sites": len(self._names), "exact_restart": True}
        fields |= {"deadline_s": 1800.0, "rejoin_s": 900.0}  # beyond a restart on a machine that is busy
        try:
            with closing(ControlClient.of_kit(self.folder / "kits" / "lena", self._addresses)) as control:
                for job in self.target.jobs:
                    self._submit(control, {"name": job, **fields})
        except FederationError as error:
            self._submit_error = error

    def _submit(self, control: ControlClient, job: dict[str, Any]) -> None:
        """Submit a job as a patient admin does: again while the server's disk is full."""
        while True:
            try:
                control.ask("SubmitJob", patience_s=_PATIENCE_S, job=job)
            except StoreError:
                time.sleep(_LOOK_S)
            except ConfigError as error:
                if "name" not in error.where:
                    raise
                return  # it is there already: only the answer was lost
            else:
                return

    def start(self) -> None:
        super().start()
        self._submitting.start()

    # -- faults ------------------------------------------------------------------------------------------------

    def suffer(self, fault: Fault) -> None:
        """Make a fault happen, and return once everything that it ended is running again."""
        number = fault.site % len(self.sites)
        site, proxies = self.sites[number], self.proxies[number]
        match self.target.acts.get(fault.kind, fault.kind):
            case "kill the server":
                self._kill_a_server(fault)
            case "kill a site" if fault.direction == "up":
                self._kill(site, "kill a daemon", fault)
            case "kill a site":
                self._signal_a_script(site.name, signal.SIGKILL, "kill a script")
            case "stop a site" if fault.direction == "up":
                self._stop(site, fault)
            case "stop a site":
                self._signal_a_script(site.name, signal.SIGTERM, "stop a script")
            case "reboot a site":
                self._reboot(site, fault)
            case "delay a connection":
                for proxy in proxies:
                    proxy.hold(fault.for_s)
                self.counts[fault.kind] += 1
            case "fill the disk":
                self._fill(fault)
            case act:
                self._other(act, fault, proxies)
        self.watch()

    def _other(self, act: str, fault: Fault, proxies: Sequence[TcpProxy]) -> None:
        """Cut a connection: TLS makes every damage a cut."""
        for proxy in proxies:
            proxy.cut()
        self.counts["cut a connection"] += 1

    def _kill_a_server(self, fault: Fault) -> None:
        self._kill(self.server, "kill the server", fault)

    def _kill(self, process: Process, kind: str, fault: Fault) -> None:
        with self._lock:
            if process.status is not None:
                return
            process.kill()
        self.counts[kind] += 1
        time.sleep(fault.for_s)
        with self._lock:
            process.start()

    def _stop(self, site: Process, fault: Fault) -> None:
        """Stop a daemon as a service manager does, and start it again."""
        if site.status is not None:
            return
        site.stop(_STOP_S)
        self.counts["stop a daemon"] += 1
        time.sleep(fault.for_s)
        site.start()

    def _reboot(self, site: Process, fault: Fault) -> None:
        """End all processes of a site at once, as a machine that loses its power does."""
        if site.status is not None:
            return
        others = _children_of(site.pid)
        site.kill()
        while others := [number for number in others if _killed(number)]:
            time.sleep(_LOOK_S)
        self.counts["reboot a site"] += 1
        time.sleep(fault.for_s)
        site.start()

    def _signal_a_script(self, site: str, number: int, kind: str) -> None:
        process_id = self._script_of(site)
        if process_id:
            with suppress(ProcessLookupError):
                os.kill(process_id, number)
                self.counts[kind] += 1

    def _script_of(self, site: str) -> int:
        """Process ID of the newest script of a site that runs; 0 if there is none."""
        marks = sorted(self._scripts.glob(f"{site}-*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        process_ids = [int(mark.name.rpartition("-")[2]) for mark in marks]
        return next((number for number in process_ids if "queue_site.py" in _command_of(number)), 0)

    def watch(self) -> None:
        super().watch()
        if self._submit_error is not None:
            raise ChaosError(f"a job could not be submitted: {self._submit_error}\n{self.server.tail()}")

    # -- the end -----------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether all jobs have ended."""
        return all(self._state(job) in ("finished", "failed", "aborted") for job in self.target.jobs)

    def _state(self, job: str) -> str:
        try:
            return str(json.loads((self.disk.folder / job / "job.json").read_text())["state"])
        except (OSError, ValueError):
            return ""

    def gather(self, timeout_s: float) -> None:
        """Wait until a script of every site runs, so that faults hit more than starting processes."""
        end = time.monotonic() + timeout_s
        while not self.over and not all(self._script_of(site) for site in self._names):
            self.watch()
            if time.monotonic() > end:
                raise self._hangs("no script runs at some site")
            time.sleep(_LOOK_S)

    def finish(self, timeout_s: float) -> None:
        """Wait for the end of all jobs and of what sites do for them, then stop all processes. Raises ChaosError."""
        end = time.monotonic() + timeout_s
        while not (self.over and all(self._at_site(job, site) for job in self.target.jobs for site in self._names)):
            self.watch()
            if time.monotonic() > end:
                raise self._hangs("the jobs did not end")
            time.sleep(_LOOK_S)
        self.collect()
        for process in reversed(self.processes):
            process.stop(_STOP_S)

    def collect(self) -> None:
        """Fetch what the checks need of servers that run."""

    def _hangs(self, what: str) -> ChaosError:
        return self.hangs(f"{what}: { {job: self._state(job) for job in self.target.jobs} }", 80)

    def _at_site(self, job: str, site: str) -> bool:
        return (self._job_folder(job, site) / "model" / "model.safetensors").exists() or self._state(job) != "finished"

    def _job_folder(self, job: str, site: str) -> Path:
        return self.folder / "kits" / site / "jobs" / job

    def close(self) -> None:
        super().close()
        for site in self._names:
            while process_id := self._script_of(site):
                with suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
                time.sleep(_LOOK_S)
        for proxy in itertools.chain(*self.proxies):
            proxy.__exit__()

    def check(self, wanted: Bits) -> None:
        """Check every job: finished once, with the bits of a plain loop at the server and all sites.

        No round that a site had an acknowledgement for may be missing. Raises ChaosError.
        """
        if self._jobs_there() != set(self.target.jobs):
            raise ChaosError(f"the queue has the jobs {sorted(self._jobs_there())}")
        for job in self.target.jobs:
            if self._state(job) != "finished":
                raise ChaosError(f"{job} is {self._state(job)}:\n{self.server.tail()}")
            self._check_rounds(job)
            _same(self._results(job), wanted, f"the server's model of {job}")
            for site in self._names:
                _same(self._job_folder(job, site), wanted, f"the model of {job} at {site}")

    def _check_rounds(self, job: str) -> None:
        sites = self._rounds(job)
        if sites != dict.fromkeys(range(1, self.target.rounds + 1), self._names):
            raise ChaosError(f"the rounds of {job} have the updates of: {sites}")
        with open(self._results(job) / "history.csv", newline="") as file:
            rows = Counter((row["round"], row["site"]) for row in csv.DictReader(file))
        if twice := [key for key, count in rows.items() if count > 1]:
            raise ChaosError(f"history.csv of {job} has more than one row for {twice}")
        for site in self._names:
            lines = (self._job_folder(job, site) / "log.txt").read_text(errors="replace").splitlines()
            told = {int(line.split()[1]) for line in lines if line.startswith("acknowledged ")}
            if not told <= set(sites):
                raise ChaosError(f"{site} had acknowledgements for rounds {sorted(told - set(sites))} of {job}")

    def _jobs_there(self) -> set[str]:
        return {path.parent.name for path in self.disk.folder.glob("*/job.json")}

    def _results(self, job: str) -> Path:
        """Folder with the result files of a job that has finished."""
        return self.disk.folder / job

    def _rounds(self, job: str) -> dict[int, tuple[str, ...]]:
        """The sites whose updates each closed round of a job has."""
        with closing(sqlite3.connect(self.disk.folder / job / "server" / "journal.sqlite")) as db:
            rows = db.execute("SELECT round, result FROM round WHERE round > 0 ORDER BY round").fetchall()
        return {number: tuple(json.loads(result)["sites"]) for number, result in rows if result}


def _same(folder: Path, wanted: Bits, what: str) -> None:
    found = {name: array.tobytes() for name, array in read_tensors(folder / "model" / "model.safetensors").items()}
    differing = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if differing:
        raise ChaosError(f"{what} is not that of an undisturbed run: {', '.join(differing)}")


def _command_of(process_id: int) -> str:
    """The command line of a process that runs, or "" if it has ended."""
    try:
        return Path(f"/proc/{process_id}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _children_of(process_id: int) -> list[int]:
    """Process IDs of all descendants of a process."""
    found, parents = [], [process_id]
    while parents:
        tasks = Path(f"/proc/{parents.pop()}/task").glob("*/children")
        with suppress(OSError):
            children = [int(number) for task in tasks for number in task.read_text().split()]
            found += children
            parents += children
    return found


def _killed(process_id: int) -> bool:
    """Kill a process; returns whether it was there still."""
    try:
        os.kill(process_id, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return bool(_command_of(process_id))
