"""A provisioned federation under faults: its queue of jobs, its server, and the daemons and scripts of its sites."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from chaos_disk import Disk
from chaos_federation import ChaosError, Process, environment_of
from chaos_plan import Fault
from chaos_targets import HERE, Bits, QueueTarget
from study import project
from tcp_proxy import TcpProxy

from fl_adapters.environments.processes import free_ports
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConfigError, FederationError, StoreError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit

_PATIENCE_S = 600.0
_STOP_S = 60.0
_LOOK_S = 0.05


class QueueFederation:
    """One run of a queue target in `folder`; the jobs' files are on `disk`.

    An admin submits all jobs at the start, whatever happens meanwhile. Sites reach the server through proxies.
    """

    def __init__(self, target: QueueTarget, folder: Path, disk: Disk) -> None:
        self.target, self.folder, self.disk = target, folder, disk
        self.counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._filled = False  # the disk has been, since the server ended the last time
        self._names = tuple(f"site-{index + 1}" for index in range(target.sites))
        self._address = f"127.0.0.1:{free_ports(1)[0]}"
        self._scripts = folder / "scripts"
        self._scripts.mkdir()
        self.proxies = [TcpProxy(self._address) for _ in self._names]
        self._provision()
        environment = environment_of() | {"CHAOS_PROCESSES": str(self._scripts)}
        base = [sys.executable, "-m", "fl_adapters.cli"]
        server = [*base, "server", "--kit", str(folder / "kits" / "server"), "--data", str(disk.folder)]
        self.server = Process("server", server, environment, folder / "server.txt")
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

    def _provision(self) -> None:
        """Write kits whose sites know the server by the address of their proxy."""
        kits = self.folder / "kits"
        authority = Authority.create(kits / "authority", project(self._address, self._names))
        own = dict(zip(self._names, (proxy.address for proxy in self.proxies), strict=True))
        for identity in authority.project.participants():
            authority.project = project(own.get(identity.name, self._address), self._names)
            write_kit(kits / identity.name, authority, identity)
        command = f"{sys.executable} {HERE / 'queue_site.py'} {self.target.kib}"
        for name in self._names:
            rules = {"apps": {"chaos": command}, "resources": {"processes": self.target.at_once}}
            (kits / name / "policy.yml").write_text(json.dumps(rules))

    def _submit_all(self) -> None:
        fields = {"app": "chaos", "rounds": self.target.rounds, "min_sites": len(self._names), "exact_restart": True}
        fields |= {"deadline_s": 1800.0, "rejoin_s": 900.0}  # beyond a restart on a machine that is busy
        try:
            with closing(ControlClient.of_kit(self.folder / "kits" / "lena", self._address)) as control:
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
        for process in (self.server, *self.sites):
            process.start()
        self._submitting.start()

    # -- faults ------------------------------------------------------------------------------------------------

    def suffer(self, fault: Fault) -> None:
        """Make a fault happen, and return once everything that it ended is running again."""
        number = fault.site % len(self.sites)
        site, proxy = self.sites[number], self.proxies[number]
        match fault.kind:
            case "kill the server":
                self._kill(self.server, fault)
            case "kill a site" if fault.direction == "up":
                self._kill(site, fault)
            case "kill a site":
                self._kill_a_script(self._names[number])
            case "delay a connection":
                proxy.hold(fault.for_s)
                self.counts[fault.kind] += 1
            case "fill the disk":
                self._fill(fault)
            case _:  # TLS makes every damage a cut
                proxy.cut()
                self.counts["cut a connection"] += 1

    def _kill(self, process: Process, fault: Fault) -> None:
        with self._lock:
            if process.status is not None:
                return
            process.kill()
        self.counts["kill the server" if process is self.server else "kill a daemon"] += 1
        time.sleep(fault.for_s)
        with self._lock:
            process.start()

    def _kill_a_script(self, site: str) -> None:
        process_id = self._script_of(site)
        if process_id:
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
                self.counts["kill a script"] += 1

    def _script_of(self, site: str) -> int:
        """Process ID of the newest script of a site that runs; 0 if there is none."""
        marks = sorted(self._scripts.glob(f"{site}-*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        process_ids = [int(mark.name.rpartition("-")[2]) for mark in marks]
        return next((number for number in process_ids if "queue_site.py" in _command_of(number)), 0)

    def _fill(self, fault: Fault) -> None:
        with self._lock:
            if self.server.status is not None:
                return
            self._filled = True
            self.disk.fill(self.server.pid)
        self.counts[fault.kind] += 1
        end = time.monotonic() + fault.for_s
        while self.server.status is None and time.monotonic() < end:
            time.sleep(_LOOK_S)
        with self._lock:
            self.disk.free(self.server.pid if self.server.status is None else None)
            self.watch()

    def watch(self) -> None:
        """Raise ChaosError if a process has ended on its own. Only a full disk may end the server."""
        with self._lock:
            for process in (self.server, *self.sites):
                if process.status is None or process.lies_dead:
                    continue
                if process is self.server and self._filled:
                    self._filled = False
                    self.counts["(the full disk ended the server)"] += 1
                    process.start()
                    continue
                raise ChaosError(f"{process.name} ended with status {process.status}:\n{process.tail()}")
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
                self._hangs("no script runs at some site")
            time.sleep(_LOOK_S)

    def finish(self, timeout_s: float) -> None:
        """Wait for the end of all jobs and of what sites do for them, then stop all processes. Raises ChaosError."""
        end = time.monotonic() + timeout_s
        while not (self.over and all(self._at_site(job, site) for job in self.target.jobs for site in self._names)):
            self.watch()
            if time.monotonic() > end:
                self._hangs("the jobs did not end")
            time.sleep(_LOOK_S)
        for process in (*self.sites, self.server):
            process.stop(_STOP_S)

    def _hangs(self, what: str) -> None:
        for process in (self.server, *self.sites):
            process.dump()
        states = {job: self._state(job) for job in self.target.jobs}
        ends = "\n".join(f"-- {p.name}:\n{p.tail(80)}" for p in (self.server, *self.sites))
        raise ChaosError(f"{what}: {states}\n{ends}")

    def _at_site(self, job: str, site: str) -> bool:
        return (self._job_folder(job, site) / "model" / "model.safetensors").exists() or self._state(job) != "finished"

    def _job_folder(self, job: str, site: str) -> Path:
        return self.folder / "kits" / site / "jobs" / job

    def close(self) -> None:
        for process in (self.server, *self.sites):
            process.close()
        for site in self._names:
            while process_id := self._script_of(site):
                with suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
                time.sleep(_LOOK_S)
        for proxy in self.proxies:
            proxy.__exit__()

    def check(self, wanted: Bits) -> None:
        """Check every job: finished once, with the bits of a plain loop at the server and all sites.

        No round that a site had an acknowledgement for may be missing. Raises ChaosError.
        """
        there = {path.parent.name for path in self.disk.folder.glob("*/job.json")}
        if there != set(self.target.jobs):
            raise ChaosError(f"the queue has the jobs {sorted(there)}")
        for job in self.target.jobs:
            record: dict[str, Any] = json.loads((self.disk.folder / job / "job.json").read_text())
            if record["state"] != "finished":
                raise ChaosError(f"{job} is {record['state']}:\n{self.server.tail()}")
            self._check_rounds(job)
            _same(self.disk.folder / job, wanted, f"the server's model of {job}")
            for site in self._names:
                _same(self._job_folder(job, site), wanted, f"the model of {job} at {site}")

    def _check_rounds(self, job: str) -> None:
        with closing(sqlite3.connect(self.disk.folder / job / "server" / "journal.sqlite")) as db:
            rows = db.execute("SELECT round, result FROM round WHERE round > 0 ORDER BY round").fetchall()
        sites = {number: tuple(json.loads(result)["sites"]) for number, result in rows if result}
        if sites != dict.fromkeys(range(1, self.target.rounds + 1), self._names):
            raise ChaosError(f"the rounds of {job} have the updates of: {sites}")
        for site in self._names:
            lines = (self._job_folder(job, site) / "log.txt").read_text(errors="replace").splitlines()
            told = {int(line.split()[1]) for line in lines if line.startswith("acknowledged ")}
            if not told <= set(sites):
                raise ChaosError(f"{site} had acknowledgements for rounds {sorted(told - set(sites))} of {job}")


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
